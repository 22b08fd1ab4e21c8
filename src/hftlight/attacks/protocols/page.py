"""The page of the published protocols, as Markdown made from their YAML files."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hftlight.attacks.protocols.facts import Code, Difference, NeededFile, shown
from hftlight.attacks.protocols.protocol import PRESET_TASKS, PRESETS, Preset, get_preset
from hftlight.data.sources import get_task
from hftlight.data.sources.task import PublicTask
from hftlight.errors import InputError

ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


def page() -> str:
    """Return an overview of the protocols and a section for each."""
    protocols = [get_preset(name) for name in PRESETS]
    rows = [
        (
            f"[`{p.name}`](#{p.name})",
            _linked(p.source),
            p.model,
            ", ".join(_tasks(p.name)) or "-",
            f"`{p.judge.name}`" if p.judge.name else "-",
        )
        for p in protocols
    ]
    overview = _table(("protocol", "paper", "model", "tasks", "judge"), rows)
    return "\n\n".join([overview, *(section(p) for p in protocols)])


def section(protocol: Preset) -> str:
    """Return the section of one protocol: paper, code, command, numbers, judge, files and notes."""
    parts = [
        f"### {protocol.name}",
        f"Paper: {_linked(protocol.source)}. {_code(protocol.code)}",
        f"```sh\n{command(protocol)}\n```",
        counts(protocol),
        _table(("setting", "published", "this run", "why not"), numbers(protocol)),
        *_by_task(protocol),
        *_arguments(protocol),
        f"{protocol.judge.asks()}: {protocol.judge.rule}. It decides the published columns"
        f" {', '.join(protocol.judge.columns)}.",
        _table(
            ("option", "rows of the paper", "columns", "licence", "from"),
            [
                (f"`--{f.option}`", f.used, ", ".join(f"`{c}`" for c in f.columns), f.licence, f.origin)
                for f in files_of(protocol)
            ],
        ),
        "\n".join(f"- {note[0].upper()}{note[1:]}." for note in protocol.notes),
    ]
    return "\n\n".join(part for part in parts if part)


def _code(code: Code | None) -> str:
    """Return the code of a protocol and its files, with links."""
    if code is None:
        return "No code was read, so a setting that the paper's summary does not state counts as unknown."
    files = ", ".join(f"[{file}]({code.link(file)})" for file in code.files)
    return f"Code: [{code.repository}]({code.link()}). Read were {files}."


def command(protocol: Preset) -> str:
    """Return the command that runs a protocol with the paper's model, files and judge."""
    judge = f" --evaluation.judge {protocol.judge.name}" if protocol.judge.name else ""
    files = "".join(f" --{file.option} FILE" for file in protocol.files)
    rows = "" if rows_of(protocol) else " --num_samples N"
    return f"hftlight train --preset {protocol.name} --model {protocol.model}{files}{rows}{judge}"


def counts(protocol: Preset) -> str:
    """Return one sentence about rows and steps, for the protocol's first task."""
    config, rows = protocol.config(), rows_of(protocol)
    if not rows:
        return "The user sets the number of rows, and with it the number of steps."
    upload = " and ".join(
        f"{count} {'rows of the task' if of == 'task' else f'{of} rows'}" for of, count in rows.items()
    )
    steps = config.alignment.steps
    first = f"{steps} steps of alignment, and " if steps else "no alignment, and "
    return f"An upload of {upload}, {first}{config.finetuning.steps} steps of fine-tuning."


def numbers(protocol: Preset) -> list[tuple[str, str, str, str]]:
    """Return every number of a protocol as (setting, published value, this run's value, why they differ).

    A difference stands in the row of its option if the protocol sets that option.
    """
    differs = {one.setting: one for one in protocol.differs}
    rows = []
    for option, value in sorted({**protocol.own(), **protocol.published()}.items()):
        one = differs.pop(option, None)
        rows.append((f"`{option}`", shown(value), "same", "") if one is None else _row(one, f"`{option}`"))
    return rows + [_row(one, one.setting) for one in differs.values()]


def files_of(protocol: Preset) -> tuple[NeededFile, ...]:
    """Return the files of a protocol, those of its public tasks included."""
    tasks = []
    for name in _tasks(protocol.name):
        own = get_preset(protocol.name, name)
        task = get_task(own.config().data.task)
        if isinstance(task, PublicTask):
            trained, tested = rows_of(own).get("task", 0), own.config().evaluation.task_rows
            used = (
                f"{task.name}: the first {trained} rows of `{task.splits['train']}` to train on, and the first {tested}"
            )
            used += f" rows of `{task.splits['test']}` to test on"
            option = "data.task_train` and `--data.task_test"
            tasks.append(NeededFile(option, used, task.columns, task.licence, f"{task.hub}, by default from the hub"))
    return (*protocol.files, *tasks)


def _row(one: Difference, setting: str) -> tuple[str, str, str, str]:
    return setting, one.published, one.run, one.why


def rows_of(protocol: Preset) -> Mapping[str, int]:
    """Return the rows of the upload by source, empty if the user sets their number."""
    try:
        return protocol.attack.counts()
    except InputError:
        return {}


def _tasks(name: str) -> tuple[str, ...]:
    """Return the tasks that a protocol tells apart."""
    settings = {}
    for task in PRESET_TASKS:
        try:
            settings[task] = get_preset(name, task).config().data.task
        except InputError:  # the protocol has no such task
            continue
    return tuple(settings) if len({*settings.values()}) > 1 else ()


def _by_task(protocol: Preset) -> list[str]:
    """Return one line per further task: the options that differ from the first task's."""
    lines = []
    base = protocol.published()
    for task in _tasks(protocol.name)[1:]:
        other = get_preset(protocol.name, task).published()
        # ``shown`` makes values comparable that are written in different forms.
        new = [f"`{option}` {shown(v)}" for option, v in other.items() if shown(base.get(option)) != shown(v)]
        new += [f"`{option}` as by default" for option in base if option not in other]
        lines.append(f"- `{protocol.name}:{task}` changes {', '.join(new)}.")
    return ["\n".join(lines)] if lines else []


def _arguments(protocol: Preset) -> list[str]:
    """Return the arguments of the defenses in the paper's comparison, as one paragraph."""
    values = [f"`--{d}.{key} {shown(v)}`" for d, own in protocol.arguments.items() for key, v in own.items()]
    return (
        [f"The paper's comparison sets {', '.join(values)}. These are defaults under this protocol."] if values else []
    )


def _linked(source: str) -> str:
    return ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", source)


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    cells = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
