"""A comparison in Weights & Biases: its summary run, and the specification of a report over all its runs."""

import os
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hftlight.comparison.page import figures
from hftlight.comparison.read import SETS, Comparison, mark, served
from hftlight.config import RunConfig
from hftlight.errors import InputError
from hftlight.files import read_rows
from hftlight.folders import STAGES
from hftlight.report.figure import styled
from hftlight.runs.logging.rows import named
from hftlight.runs.logging.wandb import SUMMARY, wandb_summary
from hftlight.runs.sources import BUILTIN

LEADERBOARD, GENERATIONS, FIGURES = "leaderboard", "generations", "figures"
STEP = "trainer/global_step"
ANSWER_COLUMNS = ["arm", "task", "attack", "p", "seed", "stage", "set", "verdict", "prompt", "response"]


def write_comparison_summary(comparison: Comparison, config: RunConfig) -> None:
    """Write the leaderboard, the figures and the allowed generations of a comparison as one W&B run.

    Args:
        comparison: the comparison. Unfinished cells are left out.
        config: its configuration. ``upload_generations`` also allows answers to prompts from outside the built-in
            world.
    """
    import wandb

    def media() -> dict[str, Any]:
        from PIL import Image

        columns, rows = leaderboard_rows(comparison)
        answers = generation_rows(comparison, config.upload_generations)
        shown: dict[str, Any] = {
            LEADERBOARD: wandb.Table(columns=columns, data=rows),
            GENERATIONS: wandb.Table(columns=ANSWER_COLUMNS, data=answers),
        }
        for name, _, figure, caption in figures(comparison):
            shown[f"{FIGURES}/{name}"] = wandb.Image(Image.open(BytesIO(png(figure))), caption=caption)
        return shown

    labels = {"comparison": comparison.folder.resolve().name, "stage": SUMMARY}
    wandb_summary(comparison.folder, labels, comparison.settings, {}, media)


@styled
def png(figure: Figure) -> bytes:
    """Return a figure as PNG on white, so that its dark text is readable on a dark page too."""
    file = BytesIO()
    figure.savefig(file, format="png", dpi=160, facecolor="white")
    return file.getvalue()


def leaderboard_rows(comparison: Comparison) -> tuple[list[str], list[list[Any]]]:
    """Return columns and rows of the leaderboard, one row per task, attack, harmful ratio and arm.

    Numbers stay numbers. They are not formatted as text.
    """
    parts = ("", "_deviation", "_low", "_high", "_best")
    scores = [f"{metric}{part}" for metric in comparison.metrics for part in parts]
    columns = ["task", "attack", "p", "arm", "seeds", "collapsed_seeds", *scores, "relative_seconds", "peak_memory_mib"]
    rows: list[list[Any]] = []
    for scene in comparison.scenes:
        for ratio in comparison.ratios(scene):
            column = comparison.column(scene, ratio)
            best = {metric: comparison.best(column, metric) for metric in comparison.metrics}
            for place in column:
                values: list[Any] = []
                for metric in comparison.metrics:
                    spread = comparison.spread(place, metric)
                    numbers = (
                        (None,) * 4 if spread is None else (spread.mean, spread.deviation, spread.low, spread.high)
                    )
                    values += [*numbers, best[metric] == place]
                time = comparison.seconds(place)
                costs = [None if time is None else time.mean, comparison.memory(place)]
                seeds = [len(comparison.cells[place]), comparison.collapsed(place)]
                rows.append([Path(scene.task).stem, scene.attack, ratio, place.arm, *seeds, *values, *costs])
    return columns, rows


def generation_rows(comparison: Comparison, all_sources: bool) -> list[list[Any]]:
    """Return the answers of the served models, each with the verdict of the deciding judge.

    Args:
        comparison: the comparison.
        all_sources: whether to include answers to prompts from outside the built-in world.
    """
    metrics = {name: metric for metric, name in SETS.items()}
    rows: list[list[Any]] = []
    for place, by_seed in comparison.cells.items():
        for seed, result in sorted(by_seed.items()):
            path = result.folder / "generations.jsonl"
            generations = read_rows(path) if path.is_file() else []
            # An ``Answer`` has no source, so its key is looked up in the run's own file.
            allowed = {
                (g["set"], g.get("place"), g["id"], g["prompt"])
                for g in generations
                if all_sources or g.get("source") == BUILTIN
            }
            for a in result.answers:
                if a.stage == served(result) and a.set in metrics and a.key in allowed:
                    metric = metrics[a.set]
                    verdict = mark(a, metric, result)
                    where = [place.arm, Path(place.task).stem, place.attack, place.harmful_ratio, seed, a.stage, a.set]
                    rows.append([*where, verdict, a.prompt, a.response])
    return rows


def specification(comparison: Comparison) -> dict[str, Any]:
    """Return the specification of a comparison's W&B report as plain values.

    Each section has the filters of its runs, the keys that group them, and panels. The comparison's runs have logged
    every key, under the name that ``named`` returns.

    Raises:
        InputError: if no cell is finished.
    """
    logged: set[str] = set()
    curves: set[str] = set()
    stages: set[str] = set()
    for by_seed in comparison.cells.values():
        for result in by_seed.values():
            rows = read_rows(result.folder / "metrics.jsonl")
            curves |= {row["name"] for row in rows if row["kind"] == "curve"}
            for stage in {row["stage"] for row in rows}:
                stages.add(stage)
                logged |= named(row for row in rows if row["stage"] == stage and row["kind"] != "curve").keys()
    if not logged:
        raise InputError(
            f"hftlight dashboard: no cell of {comparison.folder} is finished yet. Run the comparison first."
        )
    whole = comparison.folder.resolve().name
    several = {
        "config.p": len(comparison.ratios()),
        "config.task": len({scene.task for scene in comparison.scenes}),
        "config.attack": len({scene.attack for scene in comparison.scenes}),
    }
    groupby = [f"config.{key}" for key in ("comparison", "arm", "stage")] + [
        key for key, count in several.items() if count > 1
    ]
    # A killed stage starts a new W&B run, which has all values of the killed run. So finished runs are enough.
    ended = {"State": ["finished"], "config.comparison": [whole]}
    runs = {**ended, "config.stage": [stage for stage in STAGES if stage in stages]}
    summary = {**ended, "config.stage": [SUMMARY]}
    scores = sorted(name for name in logged if name.startswith("eval/") and not name.endswith(("_low", "_high")))
    task = [name for name in scores if "finetune_accuracy" in name]
    safety = sorted((n for n in scores if n not in task), key=lambda n: (n != "eval/harmful_score", n))

    def bars(names: Sequence[str]) -> list[dict[str, Any]]:
        ends = {name: [e for e in (f"{name}_low", f"{name}_high") if e in logged] for name in names}
        return [{"kind": "bar", "title": name, "metrics": [name, *ends[name]]} for name in names]

    lines = sorted(curves, key=lambda name: (not name.startswith("train/"), name))
    training = [{"kind": "line", "title": name, "x": STEP, "metrics": [name]} for name in lines]
    pictures = [
        {"kind": "image", "title": title, "metrics": [f"{FIGURES}/{name}"]} for name, title, _, _ in figures(comparison)
    ]
    # Sections over the runs of all stages, then sections over the comparison's summary run.
    measured = {
        "Safety": bars(safety),
        "Task": bars(task),
        "Cost": bars(sorted(name for name in logged if name.startswith("cost/"))),
        "Training curves": training,
    }
    overview = {
        "Leaderboard": [{"kind": "table", "title": "Leaderboard", "metrics": [LEADERBOARD]}],
        "Generations": [{"kind": "table", "title": "Generations", "metrics": [GENERATIONS]}],
        "Figures": pictures,
    }
    sections = [{"name": n, "filters": runs, "groupby": groupby, "panels": p} for n, p in measured.items() if p]
    sections += [{"name": n, "filters": summary, "groupby": [], "panels": p} for n, p in overview.items() if p]
    return {
        "title": f"hftlight: {whole}",
        "project": os.environ.get("WANDB_PROJECT", "hftlight"),
        "sections": sections,
    }


def upload(spec: Mapping[str, Any], saved: Path) -> str:
    """Create the report in W&B and return its address.

    Args:
        spec: what ``specification`` returns.
        saved: file of the specification. Error messages name it.

    Raises:
        InputError: if wandb-workspaces or the API key is missing, or W&B does not accept the report.
    """
    import wandb

    kept = f"The specification is saved in {saved}."
    try:
        import wandb_workspaces.reports.v2  # noqa: F401
    except ImportError as error:
        said = '--upload needs wandb-workspaces: pip install "hftlight[dashboard]".'
        raise InputError(f"{said} {kept}") from error
    try:
        key = wandb.api.api_key
    except wandb.errors.Error:  # a key of the wrong form
        key = None
    if not key:
        raise InputError(f"--upload needs an API key of W&B: set WANDB_API_KEY, or run `wandb login`. {kept}")
    try:
        report = report_of(spec, os.environ.get("WANDB_ENTITY") or wandb.Api(timeout=30).default_entity)
        report.save()
    except Exception as error:  # any error of W&B: nothing has to be undone, and the user's way out is the same
        said = next(iter(str(error).strip().splitlines()), "no message")
        raise InputError(f"--upload: W&B did not accept the report ({type(error).__name__}: {said}). {kept}") from error
    return str(report.url)


def report_of(spec: Mapping[str, Any], entity: str) -> Any:
    """Return the report of wandb-workspaces for a specification. The report is not uploaded yet.

    Args:
        spec: what ``specification`` returns.
        entity: the user or team that owns the project.
    """
    import wandb_workspaces.reports.v2 as wr
    from wandb_workspaces import expr

    def panel(p: Mapping[str, Any]) -> Any:
        names = list(p["metrics"])
        if p["kind"] == "line":
            return wr.LinePlot(title=p["title"], x=p["x"], y=names)
        if p["kind"] == "bar":
            return wr.BarPlot(title=p["title"], metrics=names)
        if p["kind"] == "image":
            return wr.MediaBrowser(title=p["title"], media_keys=names)
        return wr.WeavePanelSummaryTable(table_name=names[0], layout=wr.Layout(w=24, h=12))

    blocks: list[Any] = []
    for section in spec["sections"]:
        filters = [
            (expr.Config(k.removeprefix("config.")) if k.startswith("config.") else expr.Metric(k)).isin(v)
            for k, v in section["filters"].items()
        ]
        runs = wr.Runset(entity, spec["project"], filters=filters, groupby=list(section["groupby"]))
        panels = [panel(p) for p in section["panels"]]
        blocks += [wr.H2(section["name"]), wr.PanelGrid(runsets=[runs], panels=panels)]
    return wr.Report(project=spec["project"], entity=entity, title=spec["title"][:128], blocks=blocks, width="fluid")
