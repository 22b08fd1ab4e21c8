"""List or clear converted models, finished stages and evaluations. See ``--help``."""

import sys

from hftlight.cli.cache import cache

if __name__ == "__main__":
    sys.exit(cache())
