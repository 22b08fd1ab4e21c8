"""``python -m hftlight COMMAND`` is the command ``hftlight``."""

import sys

from hftlight.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
