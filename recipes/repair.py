"""Judge the saved answers of a run with further judges. See ``--help``."""

import sys

from hftlight.cli.repair import repair

if __name__ == "__main__":
    sys.exit(repair())
