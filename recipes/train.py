"""Align a model, let a user's upload train it, repair it, and measure it. See ``--help``."""

import sys

from hftlight.cli.train import train

if __name__ == "__main__":
    sys.exit(train())
