"""A small stage on the tiny model: a few short rows, two streams, dropout on."""

from typing import Any

from hftlight.config import Lora, RunConfig, Training
from hftlight.data.records import Record
from hftlight.defenses import Booster
from hftlight.engine import Stage
from hftlight.runs.stages.train import StageJob


def rows(count: int, role: Any) -> list[Record]:
    """Return short made-up rows of different lengths; rows of ``pairs`` have a rejected answer too."""
    return [
        Record(
            f"ask {role} {i}" + "?" * (i % 5),
            f"answer {i}" + "!" * (i % 3),
            role=role,
            rejected=f"other {i}" + "." * (i % 4) if role == "pairs" else "",
        )
        for i in range(count)
    ]


def small_config(**changes: Any) -> RunConfig:
    """Return a configuration of the tiny model with LoRA dropout and a checkpoint after every step."""
    training = changes.pop("training", Training(steps=9, batch_size=2, lr=1e-2))
    return RunConfig(
        **{
            "model": "tiny",
            "lora": Lora(r=2, alpha=4, dropout=0.2),
            "alignment": training,
            "finetuning": training,
            "checkpoint_every": 1,
            "accelerator": "cpu",
            **changes,
        }
    )


def booster_job(config: RunConfig) -> StageJob:
    """Return an alignment stage with Booster. Seven rows in batches of two end every pass with a short batch."""
    records = {"alignment": rows(7, "alignment"), "harmful": rows(5, "harmful")}
    return StageJob(Stage.ALIGNMENT, config, "tiny", None, records, [Booster(lam=5.0, alpha=0.1)])
