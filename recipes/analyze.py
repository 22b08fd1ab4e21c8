"""Analyse why safety broke, as tables and pictures. See ``--help``."""

import sys

from hftlight.cli.analyze import analyze

if __name__ == "__main__":
    sys.exit(analyze())
