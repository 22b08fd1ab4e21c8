"""Parameters of a test of which some are slow."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def some_slow(values: Iterable[Any], fast: Collection[Any]) -> list[Any]:
    """Return the values as parameters of a test, with those outside ``fast`` marked slow.

    Args:
        values: one parameter each; a function is called by its name.
        fast: the values that every run of the tests takes.
    """
    return [
        pytest.param(
            value,
            marks=[] if value in fast else [pytest.mark.slow],
            id=value.__name__ if callable(value) else str(value),
        )
        for value in values
    ]
