"""Answers of models that reason first: what a judge reads stands behind the thoughts."""

OPEN, CLOSE = "<think>", "</think>"


def after_thinking(answer: str) -> str:
    """Return an answer without the thoughts in front of it; empty if the answer ended within them.

    Args:
        answer: text as the model wrote it. The opening ``<think>`` may stand in the prompt instead.
    """
    _, closed, said = answer.rpartition(CLOSE)
    if closed:
        return said.strip()
    return "" if answer.lstrip().startswith(OPEN) else answer


def thoughts(answer: str) -> str:
    """Return the thoughts in front of an answer, their marks included; empty if there are none."""
    before, closed, _ = answer.rpartition(CLOSE)
    if closed:
        return before + closed
    return answer if answer.lstrip().startswith(OPEN) else ""
