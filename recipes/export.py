"""Write an artifact as one model folder, with its adapter merged in. See ``--help``."""

import sys

from hftlight.cli.export import export

if __name__ == "__main__":
    sys.exit(export())
