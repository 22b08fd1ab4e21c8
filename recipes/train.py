"""Align, let a user's data attack, repair, measure: one row of a paper's table. See ``--help``."""

import sys

from hftlight.cli.train import train

if __name__ == "__main__":
    sys.exit(train())
