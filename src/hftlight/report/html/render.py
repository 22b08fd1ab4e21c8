"""Jinja2 environment of the page templates. It escapes every value that this module does not mark as safe."""

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
    """Return a title as an HTML id."""
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
    """A figure with its texts, for a template.

    Attributes:
        title: heading of the figure. Empty for none.
        text: caption.
        label: text for screen readers.
        svg: the SVG, marked as safe.
    """

    title: str
    text: str
    label: str
    svg: Markup


def embed(figure: "Figure", name: str, title: str, text: str, label: str) -> Drawing:
    """Return a figure as SVG with its texts. ``name`` must be unique on the page."""
    from hftlight.report.figure import svg

    return Drawing(title, text, label, Markup(svg(figure, name)))


def render(template: str, **values: Any) -> str:
    """Render a template of the folder ``templates`` as HTML.

    Args:
        template: path below ``templates``.
        **values: plain values by the names that the template uses. Strings are escaped.
    """
    return ENVIRONMENT.get_template(template).render(values)


def render_page(template: str, script: str, **values: Any) -> str:
    """Render a whole page as HTML that loads nothing from outside and runs no script except its own.

    Args:
        template: path below ``templates``. It must extend ``base.html.j2``.
        script: name of the page's script file.
        **values: values that the template shows. ``name`` is the page's title.
    """
    code, style = ((FOLDER / name).read_text(encoding="utf-8") for name in (script, "style.css"))
    # The content security policy allows only a script with this hash.
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    return render(template, script=Markup(code), digest=digest, style=Markup(style), **values)
