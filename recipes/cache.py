"""List or clear the cache: models, stages, evaluations and replies of judges. See ``--help``."""

import sys

from hftlight.cli.cache import cache

if __name__ == "__main__":
    sys.exit(cache())
