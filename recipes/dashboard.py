"""Write what a W&B dashboard of a comparison shows, and upload it as a report. See ``--help``."""

import sys

from hftlight.cli.dashboard import dashboard

if __name__ == "__main__":
    sys.exit(dashboard())
