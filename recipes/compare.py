"""Compare combinations of defenses: the table of a paper, with its figures and every answer. See ``--help``."""

import sys

from hftlight.cli.compare import compare

if __name__ == "__main__":
    sys.exit(compare())
