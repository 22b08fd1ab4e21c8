"""The two errors a run ends with on purpose; every other exception is a defect."""


class InputError(ValueError):
    """What the user gave cannot be used; says who, what is allowed, what came, what to do (exit status 2)."""


class RunError(RuntimeError):
    """A run that started could not go on, such as a loss that is not finite (exit status 1)."""
