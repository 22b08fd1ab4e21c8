"""The environment that renders the templates. It escapes every value that is not marked safe here."""

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = Path(__file__).parent


def anchor(title: str) -> str:
    """Return a title as the name of a place in the page."""
    return title.lower().replace(" ", "-")


ENVIRONMENT = Environment(
    loader=FileSystemLoader(FOLDER / "templates"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    undefined=StrictUndefined,
)
ENVIRONMENT.filters["anchor"] = anchor
ENVIRONMENT.policies["json.dumps_kwargs"] = {"ensure_ascii": False}


@dataclass(frozen=True)
class Drawing:
    """A figure as a template shows it.

    Attributes:
        title: heading of the figure, empty for none.
        text: caption.
        label: what a screen reader says.
        svg: the SVG, marked safe.
    """

    title: str
    text: str
    label: str
    svg: Markup


def embed(figure: "Figure", name: str, title: str, text: str, label: str) -> Drawing:
    """Return a figure as SVG with its words. ``name`` is unique on the page."""
    from hftlight.report.figure import svg

    return Drawing(title, text, label, Markup(svg(figure, name)))


def render(template: str, **values: Any) -> str:
    """Return a template of the folder ``templates`` as HTML.

    Args:
        template: path below ``templates``.
        **values: plain values by the name that the template uses; strings are escaped.
    """
    return ENVIRONMENT.get_template(template).render(values)


def render_page(template: str, script: str, **values: Any) -> str:
    """Return a whole page as HTML that asks for nothing outside itself and runs no script but its own.

    Args:
        template: path below ``templates``; it extends ``base.html.j2``.
        script: name of the page's script file.
        **values: what the template shows; ``name`` is what the page is about.
    """
    code, style = ((FOLDER / name).read_text(encoding="utf-8") for name in (script, "style.css"))
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    return render(template, script=Markup(code), digest=digest, style=Markup(style), **values)
