"""A study in Weights & Biases: its table and its figures as images."""

from dataclasses import asdict, fields
from pathlib import Path

from hftlight.analysis.analysis import Row
from hftlight.analysis.page import FIGURES
from hftlight.analysis.study import Study
from hftlight.runs.logging.wandb import finish_wandb, start_wandb


def log_study(done: Study, folder: Path, title: str) -> None:
    """Write the long table and the figures of a study into one W&B run.

    Args:
        done: the study, whose figures lie in ``folder``.
        folder: the study's folder.
        title: its title, the name of the group in W&B.
    """
    experiment = start_wandb(folder, {"comparison": title, "stage": "analysis"}, {"analyses": list(done.rows)})
    if experiment is None:
        return
    import wandb

    names = [field.name for field in fields(Row)]
    rows = [[name, *map(asdict(row).get, names)] for name, some in done.rows.items() for row in some]
    # W&B wants one type per column, and a position may be a number or a text.
    place = 1 + names.index("position")
    rows = [[str(v) if i == place and v is not None else v for i, v in enumerate(row)] for row in rows]
    experiment.log({"analysis/table": wandb.Table(columns=["analysis", *names], data=rows)})
    for pictures in done.pictures.values():
        for p in pictures:
            image = wandb.Image(str(folder / FIGURES / f"{p.name}.png"), caption=p.caption)
            experiment.log({f"analysis/{p.name}": image})
    finish_wandb(experiment, folder)
