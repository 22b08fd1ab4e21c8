"""Answers of models that reason first: a judge reads the text behind the thoughts."""

OPEN, CLOSE = "<think>", "</think>"


def after_thinking(answer: str) -> str:
    """Return an answer without the thoughts in front of it, or an empty text if it ended within them.

    Args:
        answer: text as the model wrote it. The opening ``<think>`` may be in the prompt instead.
    """
    _, closed, text = answer.rpartition(CLOSE)
    if closed:
        return text.strip()
    return "" if answer.lstrip().startswith(OPEN) else answer


def thoughts(answer: str) -> str:
    """Return the thoughts in front of an answer with their marks, or an empty text if there are none."""
    before, closed, _ = answer.rpartition(CLOSE)
    if closed:
        return before + closed
    return answer if answer.lstrip().startswith(OPEN) else ""
