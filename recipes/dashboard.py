"""Write the specification of a comparison's W&B report, and create the report in W&B. See ``--help``."""

import sys

from hftlight.cli.dashboard import dashboard

if __name__ == "__main__":
    sys.exit(dashboard())
