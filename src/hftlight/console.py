"""The console: exit statuses, errors as one line, Ctrl-C, and silenced library logs."""

import sys
from collections.abc import Callable

from hftlight.errors import ConditionError, InputError, RunError
from hftlight.files import full_disk

BAD_INPUT, FAILED, CONDITION_MET, INTERRUPTED = 2, 1, 3, 130


def guarded(work: Callable[[], None]) -> int:
    """Run ``work`` and return the exit status: 0, 2 for bad input, 1 for a failure, 3 for --fail_if, 130 for Ctrl-C."""
    try:
        work()
    except InputError as error:
        return _report(error, BAD_INPUT)
    except RunError as error:
        return _report(error, FAILED)
    except ConditionError as error:
        return _report(error, CONDITION_MET)
    except Exception as error:
        if (full := full_disk(error)) is None:
            raise
        return _report(full, FAILED)
    except KeyboardInterrupt:
        return _report("interrupted; run the same command again to resume.", INTERRUPTED)
    return 0


def _report(message: object, status: int) -> int:
    """Print a message on standard error and return the exit status."""
    print(f"hftlight: {message}", file=sys.stderr)
    return status


def quiet() -> None:
    """Silence progress bars, warnings and info logs of the libraries, so that hftlight's own output stays readable."""
    import logging
    import os
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    lightning = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
    for name in (*lightning, "bitsandbytes.backends.cpu.ops"):  # the last one recommends a faster kernel
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", category=FutureWarning)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
