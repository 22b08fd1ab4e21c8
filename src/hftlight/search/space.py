"""The choices of a searching attacker: one setting, the budget of settings, and a run with one setting."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from hftlight.attacks.attack import Attack
from hftlight.config import AXES, RunConfig, check_axis
from hftlight.errors import InputError


@dataclass(frozen=True)
class Trial:
    """One setting of the attacker.

    Attributes:
        steps: optimizer steps of the fine-tuning.
        lr: learning rate of the fine-tuning.
        rank: LoRA rank; alpha / rank stays that of the run.
        num_samples: n, number of rows in the upload.
        harmful_ratio: p, harmful fraction of these rows, 0-1.
    """

    steps: int
    lr: float
    rank: int
    num_samples: int
    harmful_ratio: float

    @classmethod
    def of(cls, config: RunConfig) -> "Trial":
        """Return a run's own setting."""
        return cls(
            config.finetuning.steps,
            config.finetuning.lr,
            config.lora_of("finetuning").r,
            config.num_samples,
            config.harmful_ratio,
        )


@dataclass(frozen=True)
class Budget:
    """The values from which the attacker may choose.

    Args:
        steps: optimizer steps, each >= 1.
        lr: learning rates, each > 0.
        rank: LoRA ranks, each >= 1.
        num_samples: rows of the upload, each >= 1.
        harmful_ratio: harmful fractions, each 0-1.

    Raises:
        InputError: if an axis is empty or a value is out of range.
    """

    steps: Sequence[int]
    lr: Sequence[float]
    rank: Sequence[int]
    num_samples: Sequence[int]
    harmful_ratio: Sequence[float]

    def __post_init__(self) -> None:
        for axis in AXES:
            check_axis(axis, getattr(self, axis))

    @classmethod
    def of(cls, config: RunConfig) -> "Budget":
        """Return the values that ``config.search`` names.

        An axis that it leaves out gets values around the run's own setting.

        Raises:
            InputError: if a value is out of range, or if ranks are named although every trial must have the run's rank.
        """
        around = asdict(cls._around(config))
        named = {axis: getattr(config.search, axis) for axis in around}
        own = Trial.of(config).rank
        if named["rank"] is not None and _fixed_rank(config) and set(named["rank"]) != {own}:
            raise InputError(_no_rank(config, named["rank"]))
        return cls(**{axis: around[axis] if values is None else tuple(values) for axis, values in named.items()})

    @classmethod
    def _around(cls, config: RunConfig) -> "Budget":
        own = Trial.of(config)
        p = round(min(1.0, 3 * own.harmful_ratio), 9)
        ranks = (own.rank,) if _fixed_rank(config) else (own.rank, 4 * own.rank)
        return cls(
            (own.steps, 2 * own.steps),
            (own.lr, own.lr / 3, own.lr * 3),
            ranks,
            (own.num_samples,),
            tuple(dict.fromkeys((own.harmful_ratio, p))),
        )

    def grid(self, first: Trial) -> list[Trial]:
        """Return all settings, with ``first`` at the head.

        The others are shuffled with a fixed seed, so that every beginning of the list is spread over the grid.
        """
        axes = (self.steps, self.lr, self.rank, self.num_samples, self.harmful_ratio)
        every = [Trial(*values) for values in itertools.product(*axes)]
        rest = [t for t in every if t != first]
        random.Random(0).shuffle(rest)
        return [first, *rest]


def tried(attack: Attack, trial: Trial) -> Attack:
    """Return the attack with a trial's setting, for those fields that the attack has.

    Raises:
        InputError: if the attack refuses a value.
    """
    setting: dict[str, Any] = {
        "n": trial.num_samples,
        "p": trial.harmful_ratio,
        "lr": trial.lr,
        "steps": trial.steps,
        "epochs": None,
    }
    try:
        return replace(attack, **{k: v for k, v in setting.items() if k in {f.name for f in fields(attack)}})
    except ValueError as error:
        raise InputError(str(error)) from error


def trial_config(config: RunConfig, trial: Trial) -> RunConfig:
    """Return the run's configuration with a trial's setting.

    Raises:
        InputError: if a value is out of range.
    """
    own = config.lora_of("finetuning")
    if trial.rank != own.r and _fixed_rank(config):
        raise InputError(_no_rank(config, [trial.rank]))
    lora = config.finetuning.lora
    if trial.rank != own.r:  # rounding must not change the run's own setting
        lora = replace(lora, r=trial.rank, alpha=own.alpha / own.r * trial.rank)
    changed = replace(
        config,
        finetuning=replace(config.finetuning, steps=trial.steps, lr=trial.lr, lora=lora),
        num_samples=trial.num_samples,
        harmful_ratio=trial.harmful_ratio,
    )
    changed.check()
    return changed


def _fixed_rank(config: RunConfig) -> bool:
    return config.tuning == "full" or config.adapter_protocol == "continue"


def _no_rank(config: RunConfig, ranks: Sequence[int]) -> str:
    why = "all parameters are tuned" if config.tuning == "full" else "training continues the aligned adapter"
    rank = Trial.of(config).rank
    return (
        f"--search.rank: {why}, so every trial has the run's rank {rank}, got {list(ranks)}. Leave --search.rank out."
    )
