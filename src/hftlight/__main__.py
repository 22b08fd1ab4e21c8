"""Entry point of ``python -m hftlight COMMAND``, which is the same as ``hftlight COMMAND``."""

import sys

from hftlight.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
