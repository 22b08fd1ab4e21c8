"""The inputs of a reproduction, all checked at once before the first step: files, columns, rows, model and judge."""

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hftlight.attacks.protocols.results import CHOSEN_BY_USER, JUDGED, PaperTable
from hftlight.builtin_models import DEMO, TINY
from hftlight.comparison.reproduction.settings import BUILTIN, Part
from hftlight.config import Data, RunConfig
from hftlight.data.sources import get_task
from hftlight.data.sources.task import PublicTask
from hftlight.data.table import SUFFIXES, read_rows
from hftlight.errors import InputError
from hftlight.evaluation.judges import FORMATS
from hftlight.evaluation.judges.moderation import BEAVER_DAM
from hftlight.model_files import model_path
from hftlight.registry import defense_class
from hftlight.runs.sources import Sources

DEFENDER = ("harmful", "pairs")  # sources that are read only if a defense draws from them
FIRST_ROW = {"legacy_minus_one": 1}  # harmful rows at the start that a way of counting skips


class Needed:
    """The sources that a part reads, each with the number of rows that the protocol takes from it.

    Args:
        part: a comparison of the reproduction.
        table: the paper's table.
    """

    def __init__(self, part: Part, table: PaperTable) -> None:
        self.config = part.counted
        counts: dict[str, int] = {}
        for name in part.grid.attacks:
            attack = part.grid.attack(name)
            for p in part.grid.ratios(name):
                resolved = attack.resolved(replace(self.config, harmful_ratio=p))
                for source, count in resolved.counts().items():
                    skipped = FIRST_ROW.get(getattr(resolved, "count_mode", ""), 0) if source == "attack" else 0
                    counts[source] = max(counts.get(source, 0), count + skipped)
        drawn = {s for word in part.grid.defenses for name in _names(word) for s in _streams(name)}
        graded = any(metric not in JUDGED for metric in table.cells)
        self.rows: dict[str, int] = {"test": self.config.evaluation.prompts}
        if part.config.alignment.steps and part.grid.defenses != ("unaligned",):
            self.rows["alignment"] = self._range("alignment")
        self.rows |= {source: self._range(source) for source in DEFENDER if source in drawn}
        if "attack" in counts:
            self.rows["attack"] = counts["attack"]
        if "task" in counts or graded:
            self.rows |= {"task_train": counts.get("task", 1), "task_test": part.config.evaluation.task_rows}

    def _range(self, source: str) -> int:
        """Return the rows that the options of a source ask for, 1 if they do not say."""
        take = self.config.data.take(source)
        if take.first:
            return take.first
        start, stop = take.range.start or 0, take.range.stop
        return stop - start if stop is not None and not take.conditions else 1

    def way_out(self, source: str, rows: int) -> str:
        """Return the options that ask for fewer rows of a source, each of which departs from the protocol."""
        if source == "test":
            return f"--evaluation.prompts {rows}"
        if source == "task_test":
            return f"--evaluation.task_rows {rows}"
        if source in ("attack", "task_train"):
            return "a smaller --num_samples"
        ranged = self.config.data.take(source).rows
        return f"--data.rows.{source} 0:{rows}" if ranged else f"--data.first.{source} {rows}"


def _names(word: str) -> list[str]:
    return [name for name in word.split("+") if name not in ("none", "unaligned")]


def _streams(name: str) -> set[str]:
    cls = defense_class(name)
    return {stream for stream in (*cls.streams, cls.main) if stream}


def check_inputs(part: Part, table: PaperTable, dry: bool) -> tuple[list[str], list[str]]:
    """Check every source that a part reads, and its model.

    Args:
        part: a comparison of the reproduction.
        table: the paper's table.
        dry: whether the network must not be used.

    Returns:
        What is missing or wrong, each with the option and the origin of the rows; and what was not read, because it
        is on the hub.
    """
    needed, wrong, unread = Needed(part, table), [], []
    data = part.config.data
    missing: dict[str, list[str]] = {}  # options by the origin of their rows: one file serves all of them
    for source, count in needed.rows.items():
        place, option, origin = _place(data, source), f"--data.{source}", _origin(part.config, table, source)
        if place == CHOSEN_BY_USER:
            option = "--data.task" if source.startswith("task_") else option
            missing.setdefault(origin, []).append(f"{option} ({_what(source)})")
        elif place == BUILTIN:
            continue
        elif _on_the_hub(place) and dry:
            unread.append(f"{option} {place}")
        else:
            wrong += _read(needed, source, count, option, place, origin)
    for origin, named in missing.items():
        options = list(dict.fromkeys(named))
        several = f"{', '.join(options)} are missing, and one of them serves all" if len(options) > 1 else ""
        wrong.append(f"{several or f'{options[0]} is missing'}. {origin}")
    if part.config.num_samples == 0:
        wrong.append("--num_samples is missing: the rows of the upload, which the protocol leaves to the file.")
    model = part.config.model
    if not here(model):
        if _offline():
            wrong.append(f"--model {model}: not on this machine, and the hub is off. Name a folder with --model.")
        else:
            unread.append(f"--model {model}")
    return wrong, unread


def _read(needed: Needed, source: str, count: int, option: str, place: str, origin: str) -> list[str]:
    """Read a source and return what is wrong with it: the error of the reader, or that there are too few rows."""
    data = needed.config.data
    try:
        sources = Sources(data)
        if source.startswith("task_"):
            found = len(sources.task(source.removeprefix("task_")))
        else:
            found = len(sources.records(source, need_response=source != "test"))  # type: ignore[arg-type]
    except InputError as error:
        total = _rows_in(place, data, source)
        start = data.take(source).range.start or 0
        if total is None or start < total:
            named = "--data.where" in str(error)
            way = " If the file holds the right rows alone, set --data.where null, a departure." if named else ""
            return [f"{option} {place}: {error}{way} {origin}"]
        found = 0
    if found >= count:
        return []
    total = _rows_in(place, data, source) or found
    take = data.take(source)
    which = f" in the range {take.rows}" if take.rows else ""
    which += f" with {', '.join(take.where)}" if take.where else ""
    way = needed.way_out(source, found or min(total, count))
    return [
        f"{option} {place}: the protocol takes {count} rows{which}, and the file has {found} of them"
        f" ({total} rows in all). Give the whole file, or take fewer rows with {way}. {origin}"
    ]


def _rows_in(place: str, data: Data, source: str) -> int | None:
    """Return the number of rows in a file, None if it cannot be read."""
    try:
        return len(read_rows(place, data.take(source).split or "train"))
    except InputError:
        return None


def _place(data: Data, source: str) -> str:
    """Return the file or the hub name of a source."""
    if not source.startswith("task_"):
        return str(getattr(data, source))
    if data.task in (BUILTIN, CHOSEN_BY_USER):
        return data.task
    task = get_task(data.task)
    own = getattr(data, source)
    return str(own or (task.hub if isinstance(task, PublicTask) else data.task))


def _what(source: str) -> str:
    return {
        "alignment": "safe answers",
        "harmful": "the defender's harmful answers",
        "pairs": "the defender's pairs of a safe and a harmful answer",
        "attack": "the harmful rows of the upload",
        "test": "harmful test prompts",
    }.get(source, "rows of the user's task")


def _origin(config: RunConfig, table: PaperTable, source: str) -> str:
    """Return where the rows of a source come from, as a sentence."""
    name = source if source in table.files else source.partition("_")[0]
    if name in table.files:
        return f"Origin: {table.origin(name)}."
    task = None if config.data.task in (BUILTIN, CHOSEN_BY_USER) else get_task(config.data.task)
    if isinstance(task, PublicTask):
        return (
            f"Origin: {task.hub}, split {task.splits[source.removeprefix('task_')]}; columns {', '.join(task.columns)}."
        )
    return ""


def _on_the_hub(place: str) -> bool:
    path = Path(place).expanduser()
    return (
        not path.exists() and path.suffix not in SUFFIXES and re.fullmatch(r"\w[\w.-]*/\w[\w.:-]*", place) is not None
    )


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "ON", "YES")


def here(model: str) -> bool:
    """Tell whether a model can be read without network: a built-in model, a folder, or a hub id in the hub's cache."""
    if model in (DEMO, TINY) or Path(model).expanduser().exists():
        model_path(model)  # refuses a folder that is no model, and says how to fetch the demo model
        return True
    from huggingface_hub import try_to_load_from_cache

    hub_id, _, revision = model.partition("@")
    try:
        return isinstance(try_to_load_from_cache(hub_id, "config.json", revision=revision or None), str)
    except ValueError:  # no hub id
        return False


def judge_here(name: str) -> bool:
    """Tell whether a judge works without network and without an endpoint."""
    if name.startswith("keyword"):
        return True
    model = BEAVER_DAM if name.startswith("moderation") else FORMATS[name].model if name in FORMATS else None
    return model is not None and here(model)


def uncompared(table: PaperTable, judge: str) -> dict[str, str]:
    """Return the metrics that cannot be compared under a judge, each with its reason.

    Args:
        table: the paper's table.
        judge: the run's judge, with its model after a colon if it has one.
    """
    if judge.partition(":")[0] == table.judge:
        return {}
    way = f"--evaluation.judge {table.judge}" + (":MODEL" if table.judge not in ("moderation", *FORMATS) else "")
    why = f"the paper's judge is {table.judge}, and this run has {judge}. {way} compares it" + (
        "; --evaluation.judge moderation:FOLDER names a copy of the model" if table.judge == "moderation" else ""
    )
    return {metric: why for metric in table.cells if metric in JUDGED}


def filled(data: Data, files: Sequence[str], table: PaperTable) -> Data:
    """Return the sources with those that share a public file filled in from each other.

    Sources that the protocol does not name come from the made-up world, and are not read by the paper's arms.

    Args:
        data: the user's sources; ``CHOSEN_BY_USER`` stands for one that was not given.
        files: the sources that the table names.
        table: the paper's table.
    """
    for source in files:
        if getattr(data, source) != CHOSEN_BY_USER:
            continue
        same = [s for s in files if table.files[s] == table.files[source] and getattr(data, s) != CHOSEN_BY_USER]
        if same:
            data = replace(data, **{source: getattr(data, same[0])})
    # A set on the hub has splits; a file has none.
    splits = {s: table.files[s].partition(":")[2] for s in files if _on_the_hub(str(getattr(data, s)))}
    splits = {source: split for source, split in splits.items() if split}
    return replace(data, split={**splits, **(data.split or {})} or None) if splits else data
