"""Markdown about the defenses, generated from the code: overview table, pair matrix, and a card per method."""

import inspect
import re
from collections.abc import Mapping
from functools import cache
from itertools import combinations
from typing import Any

from hftlight.engine import Stage, check
from hftlight.registry import Entry, defense_class, defenses

Measured = Mapping[str, Mapping[str, Mapping[str, Any]]]
SIGNS = {"together": "●", "stages": "○", "refused": "–"}
WHEN = {
    Stage.ALIGNMENT: "while you align the model, before any upload",
    Stage.FINETUNING: "while the upload trains the aligned model",
    Stage.POST_FINETUNING: "once, on the finished weights, after the upload has trained the model",
}
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{5})")
PARTS = ("Args", "Raises", "Cost", "Source", "Differs")
TUNINGS = {"lora": "under LoRA", "full": "with all weights trained"}


@cache
def matrix() -> dict[tuple[str, str], str]:
    """Return how each pair of public defenses combines.

    A key is a pair of names in alphabetical order. ``"together"`` means that both run in one Trainer. ``"stages"``
    means that they run one after the other in ``run()``. ``"refused"`` means that they do not combine. Every defense
    has its default arguments.
    """
    instances = {name: defense_class(name)() for name in sorted(defenses())}
    return {pair: _kind(instances[pair[0]], instances[pair[1]]) for pair in combinations(instances, 2)}


def _kind(first: Any, second: Any) -> str:
    """Return how two defenses combine, as ``matrix`` names it."""
    try:
        check([first, second], one_stage=False)
    except ValueError:
        return "refused"
    return "together" if first.stage is second.stage else "stages"


def own() -> dict[str, Entry]:
    """Return the defenses of this package, ordered by stage."""
    return {name: entry for name, entry in defenses().items() if entry.module.startswith("hftlight.")}


def overview() -> str:
    """Return a Markdown table of the defenses: stage, slots, purpose, first clause of the cost, and papers."""
    lines = ["| name | stage | slots | what it does | cost | source |", "| --- | --- | --- | --- | --- | --- |"]
    for name in own():
        defense = defense_class(name)()
        text = docstring_parts(type(defense))
        papers = [f"[{paper}](https://arxiv.org/abs/{paper})" for paper in ARXIV.findall(text["Source"])]
        clause = re.split(r"[.;:] ", _plain(text["Cost"]))[0].rstrip(".")
        slots = ", ".join(slot.name.lower() for slot in defense.slots)
        cells = [f"`{name}`", defense.stage.value, slots, text["purpose"], clause, ", ".join(papers)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def pairs() -> str:
    """Return the pair matrix as a Markdown table, ordered by stage and name."""
    names = list(own())
    lines = ["| | " + " | ".join(str(i + 1) for i in range(len(names))) + " |", "|---" * (len(names) + 1) + "|"]
    for i, name in enumerate(names):
        cells = ["" if name == other else SIGNS[_together(name, other)] for other in names]
        lines.append(f"| {i + 1} `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _together(name: str, other: str) -> str:
    """Return how two defenses combine, whatever the order of the names."""
    return matrix()[min(name, other), max(name, other)]


def cards(measured: Measured | None = None) -> str:
    """Return a card per method as Markdown: purpose, stage, needs, cost, presets, source, differences and pairs.

    Args:
        measured: tuning -> setting -> row, one block of the output of ``benchmarks/defenses.py``. None omits the
            measured time and memory.
    """
    return "\n\n".join(card(name, measured) for name in own())


def card(name: str, measured: Measured | None = None) -> str:
    """Return the card of one method.

    Args:
        name: the defense's name in the registry.
        measured: as in ``cards``.
    """
    kind = defense_class(name)
    made, text, entry = kind(), docstring_parts(kind), own()[name]
    file = f"{entry.stage}/{entry.module.rpartition('.')[2]}.py"
    facts = {
        "When": f"{WHEN[made.stage]}; slot: {', '.join(slot.name.lower() for slot in made.slots)}.",
        "Needs": _needs(made),
        "Cost": _plain(text["Cost"]),
        "Measured": _cost(kind.__name__, measured) if measured else "",
        "Presets": _presets(kind),
        "Source": ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", _plain(text["Source"])),
        "Differs": _plain(text["Differs"]),
        "Pairs": _partners(name),
    }
    lines = [f"- **{head}:** {fact}" for head, fact in facts.items() if fact]
    head = f"### `{name}`\n\n**{text['purpose']}** Class `{kind.__name__}` in [{file}]({file})."
    return "\n\n".join(part for part in (head, _markdown(text["body"]), "\n".join(lines)) if part)


def docstring_parts(kind: type) -> dict[str, str]:
    """Return a defense's docstring by part: ``purpose``, ``body``, ``Args``, ``Raises``, ``Cost`` and so on.

    A part that the docstring lacks is an empty string.
    """
    text = inspect.getdoc(kind) or ""
    # The split keeps the headings: pieces is [purpose and body, heading, text, heading, text, ...].
    pieces = re.split(rf"^({'|'.join(PARTS)}):", text, flags=re.MULTILINE)
    purpose, _, body = pieces[0].partition("\n")
    parts = dict(zip(pieces[1::2], pieces[2::2], strict=True))
    return {"purpose": purpose, "body": body.strip(), **{part: parts.get(part, "") for part in PARTS}}


def _needs(defense: Any) -> str:
    # An alignment defense trains on the alignment rows unless it names another stream.
    main = [f"the stream `{defense.main}` to train on"] if defense.main not in ("", "alignment") else []
    streams = [f"the stream `{name}`" for name in defense.streams]
    models = [f"the {name} model" for name in getattr(defense, "needs", ())]
    aligned = ["a plainly aligned model to start from"] if defense.aligned_first else []
    needs = [*main, *streams, *models, *aligned, *(["the model before the stage"] if defense.selects else [])]
    return f"{' and '.join(needs)}." if needs else "no side stream and no other model's folder."


def _cost(label: str, measured: Measured) -> str:
    """Return a method's measured settings, each with its ratios to plain fine-tuning under each tuning."""
    # A setting starts with the class name, before any "(". The first tuning lists the settings; others may lack some.
    settings = [setting for setting in next(iter(measured.values())) if setting.partition("(")[0] == label]
    said = []
    for setting in settings:
        rows = {TUNINGS.get(tuning, tuning): rows[setting] for tuning, rows in measured.items() if setting in rows}
        ratios = [
            f"{row['ratio']:.2f} times the time and {row['peak']:.2f} times the peak memory {how}"
            for how, row in rows.items()
        ]
        said.append(f"`{setting}`: {', '.join(ratios)}")
    return f"{'; '.join(said)}, against plain fine-tuning." if said else ""


def _presets(kind: Any) -> str:
    """Return the presets of a defense, each with the arguments that it sets."""
    said = []
    for name, arguments in kind.presets.items():
        values = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        said.append(f"`{name}` ({f'`{values}`' if values else 'the defaults'})")
    return f"{', '.join(said)}." if said else ""


def _partners(name: str) -> str:
    """Return which methods share a Trainer with this method, and which are refused."""
    others = {other: _together(name, other) for other in own() if other != name}
    together, refused = ([f"`{o}`" for o, kind in others.items() if kind == of] for of in ("together", "refused"))
    said = [f"in one Trainer with {', '.join(together)}"] if together else []
    said += [f"refused with {', '.join(refused)}"] if refused else []
    said += ["after or before every other method in `run()`"] if "stages" in others.values() else []
    return f"{'; '.join(said)}."


def _plain(text: str) -> str:
    """Return a part of a docstring as one line of Markdown."""
    return _inline(" ".join(text.split()))


def _markdown(text: str) -> str:
    """Return paragraphs of a docstring as Markdown, with displayed equations as fenced blocks."""
    blocks = []
    for block in text.split("\n\n"):
        if block.lstrip().startswith(".. math::"):
            lines = (line.strip() for line in block.replace(".. math::", "", 1).splitlines())
            blocks.append("\n".join(["```math", *(line for line in lines if line), "```"]))
        else:
            blocks.append(_inline(block))
    return "\n\n".join(blocks)


def _inline(text: str) -> str:
    """Return the text with reStructuredText's inline maths and code replaced by GitHub's."""
    text = re.sub(r":math:`([^`]+)`", lambda found: f"$`{' '.join(found[1].split())}`$", text)
    return text.replace("``", "`")
