"""Repeat a table of a paper, and print paper, ours and the difference. See ``--help``."""

import sys

from hftlight.cli.reproduce import reproduce

if __name__ == "__main__":
    sys.exit(reproduce())
