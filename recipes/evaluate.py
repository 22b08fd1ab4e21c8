"""Measure any model: an artifact of a run, a folder, or a hub id. See ``--help``."""

import sys

from hftlight.cli.evaluate import evaluate

if __name__ == "__main__":
    sys.exit(evaluate())
