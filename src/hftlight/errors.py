"""The errors that hftlight raises on purpose. Every other exception is a bug in hftlight."""


class InputError(ValueError):
    """An option, file or model of the user is not valid (exit status 2).

    The message says who refuses, what is allowed, what came and what to do.
    """


class RunError(RuntimeError):
    """A failure after the run has started, such as a loss that is not finite (exit status 1)."""


class ConditionError(Exception):
    """A measured score meets a condition of ``--fail_if`` (exit status 3)."""
