"""Convert the demo model once: ``python -m hftlight.models``."""

import sys

from transformers.utils import logging

from hftlight.builtin_models import DEMO
from hftlight.errors import InputError
from hftlight.model_files import model_path

if __name__ == "__main__":
    logging.disable_progress_bar()
    try:
        print(model_path(DEMO))
    except InputError as error:
        sys.exit(f"hftlight: {error}")
