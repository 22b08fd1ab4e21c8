"""Repair a fine-tuned model in its files, one matrix at a time. See ``--help``."""

import sys

from hftlight.cli.repair import repair

if __name__ == "__main__":
    sys.exit(repair())
