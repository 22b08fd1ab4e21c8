"""Let further judges judge the saved answers of a run. See ``--help``."""

import sys

from hftlight.cli.rejudge import rejudge

if __name__ == "__main__":
    sys.exit(rejudge())
