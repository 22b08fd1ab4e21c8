"""The console: exit statuses, refusals as one line, Ctrl-C, and quiet libraries."""

import sys
from collections.abc import Callable

from hftlight.errors import InputError, RunError

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130


def guarded(work: Callable[[], None]) -> int:
    """Run ``work`` and return the exit status: 0, 2 for bad input, 1 for a failed run, 130 for Ctrl-C."""
    try:
        work()
    except InputError as error:
        return _say(error, BAD_INPUT)
    except RunError as error:
        return _say(error, FAILED)
    except KeyboardInterrupt:
        return _say("interrupted; the same command goes on where it stopped.", INTERRUPTED)
    return 0


def _say(message: object, status: int) -> int:
    print(f"hftlight: {message}", file=sys.stderr)
    return status


def quiet() -> None:
    """Keep the libraries' own chatter from drowning the run's."""
    import logging
    import os
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    lightning = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
    for name in (*lightning, "bitsandbytes.backends.cpu.ops"):  # the last one wants a faster kernel nobody needs here
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", category=FutureWarning)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
