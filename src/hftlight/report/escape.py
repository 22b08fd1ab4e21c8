"""Texts of others inside Markdown and LaTeX."""

import re
from typing import Any

LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{char: f"\\{char}" for char in "&%$#_{}"},
}


def in_markdown(text: Any) -> str:
    """Return a text in which Markdown has no special characters, on one line. Underscores inside a word stay."""
    plain = " ".join(str(text).split())
    plain = re.sub(r"([\\`*{}\[\]<>#|~$])", r"\\\1", plain)
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", plain)


def in_latex(text: Any) -> str:
    """Return a text in which LaTeX has no special characters, on one line."""
    return "".join(LATEX.get(char, char) for char in " ".join(str(text).split()))
