"""Compare combinations of defenses, and write a table, figures and every answer. See ``--help``."""

import sys

from hftlight.cli.reproduce import reproduce

if __name__ == "__main__":
    sys.exit(reproduce())
