"""EvaluateAt: curves of harmful score and finetune accuracy during training, with 95 % intervals."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from typing_extensions import override

from hftlight.config import Evaluation
from hftlight.data.streams import StreamsDataModule
from hftlight.data.tokens import encode_prompt
from hftlight.engine.step.passes import same_random_state
from hftlight.errors import InputError
from hftlight.evaluation.answering.generate import check_prompts, generate
from hftlight.evaluation.answering.thinking import after_thinking
from hftlight.evaluation.judges import Judge, get_judge
from hftlight.evaluation.metrics.finetune_accuracy import FinetuneAccuracy
from hftlight.evaluation.metrics.harmful_score import HarmfulScore
from hftlight.evaluation.score import Score
from hftlight.models.module import SafetyModule
from hftlight.runs.measuring.measure import without_trigger
from hftlight.runs.measuring.test_sets import TestSets
from hftlight.runs.ranks import decide, ending_together
from hftlight.runs.stages.guards import Curves

Metric = Literal["harmful_score", "finetune_accuracy"]


class AtSteps(Callback):
    """A callback that measures the model in training after chosen optimizer steps.

    A subclass implements ``check`` and ``measured``. Measuring does not change the training: weights, modes, gradients,
    random state and hooks are restored.

    Wherever it stands in the list of callbacks, it acts after all other callbacks of a step and before the checkpoints.
    Its results are part of the checkpoint, so a resumed run measures no step twice and skips none. Under DDP process 0
    measures while the other processes wait, even for a slow judge.

    Args:
        steps: optimizer steps after which to measure, counted from 1.
        every: also measure after each multiple of this number of steps; 0 for ``steps`` alone.

    Attributes:
        results: one row per step and metric: ``step``, and the fields of ``Score``.

    Raises:
        ValueError: if no step is named, or a number is out of range.
    """

    def __init__(self, steps: Sequence[int] = (), every: int = 0) -> None:
        if every < 0 or any(step < 1 for step in steps) or not (steps or every):
            raise ValueError(
                f"{type(self).__name__}: give optimizer steps >= 1 in steps, or a number of steps >= 1 in every, got"
                f" steps={steps!r} and every={every}."
            )
        self.steps, self.every = tuple(sorted(set(steps))), every
        self.results: list[dict[str, Any]] = []

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a module or data module that cannot be measured.

        Raises:
            InputError: naming what is missing.
        """

    def check_prompts(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse prompts that are too long for the model, before the first step.

        Raises:
            InputError: naming the prompt.
        """

    def measured(self, trainer: Trainer, pl_module: LightningModule) -> list[dict[str, Any]]:
        """Return the rows of one step. Only process 0 calls it."""
        raise NotImplementedError(f"{type(self).__name__} must implement measured().")

    def decide_stop(self, trainer: Trainer) -> None:
        """Stop the run if the results ask for it."""

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"results": list(self.results)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.results = list(state_dict["results"])

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check module, data module and strategy, and move this callback behind the others.

        Raises:
            InputError: if module, data module or strategy are of another kind.
        """
        if stage != "fit":
            return
        self.check(trainer, pl_module)
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise InputError(
                f"{type(self).__name__}: one process answers alone, but the layers of sharded weights"
                f" ({type(trainer.strategy).__name__}) must be gathered from all processes. Use a single device or"
                " 'ddp', or measure the finished model."
            )
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        # Order: defenses (they may still restore weights at the end of a batch), this callback, curves and checkpoints
        # (a checkpoint must hold the result of its step).
        last = [c for c in callbacks if isinstance(c, Curves | Checkpoint)]
        trainer.callbacks = [c for c in callbacks if c is not self and c not in last] + [self, *last]  # type: ignore[attr-defined]
        self.results = []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.check_prompts(trainer, pl_module)
        # A resumed checkpoint may have been written before its step was measured, or hold the result that stops the
        # run.
        self._measure_if_due(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._measure_if_due(trainer, pl_module)

    def _measure_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure if this step is due, and stop the run if a result asks for it."""
        if self._due(trainer.global_step):
            with ending_together():
                about = f"the scores of step {trainer.global_step}"
                self.results += decide(about, lambda: self._rows(trainer, pl_module))
        self.decide_stop(trainer)

    def _due(self, step: int) -> bool:
        """Tell whether to measure after this step. Each step is measured once, not once per micro-batch."""
        chosen = step in self.steps or (self.every > 0 and step > 0 and step % self.every == 0)
        return chosen and all(row["step"] != step for row in self.results)

    def _rows(self, trainer: Trainer, pl_module: LightningModule) -> list[dict[str, Any]]:
        """Measure, log and return the results of this step."""
        with _same_random_states(pl_module.device):
            rows = [{"step": trainer.global_step, **row} for row in self.measured(trainer, pl_module)]
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)  # so that the reported peak is the training's
        metrics = {
            f"eval/{row['metric']}{end}": row[key]
            for row in rows
            for end, key in (("", "value"), ("_low", "low"), ("_high", "high"))
            if row.get(key) is not None and "group" not in row
        }
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step - 1)  # Lightning counts steps from 0
        return rows


class EvaluateAt(AtSteps):
    """Evaluate the model in training after chosen optimizer steps, and stop once a result is certain.

    The model answers the harmful prompts and the task's rows as a finished model does in ``measure``: greedily, in
    evaluation mode, with the template, system text and trigger that it will be served with. A LoRA adapter stays
    unmerged. Evaluation does not change the training: it restores weights, modes, gradients, random state and hooks.
    Unless it stops the run, the trained weights are bit for bit those of a run without it.

    Each result is logged as ``harmful_score`` or ``finetune_accuracy``, with ``_low`` and ``_high``, independent of the
    Trainer's ``log_every_n_steps``.

    A 95 % interval is valid for one evaluation. A run that evaluates often and stops at the first significant result is
    wrong more often than one time in twenty.

    Args:
        tests: prompts, task and judges. The first judge decides. Over-refusal is not evaluated.
        settings: token limits and batch size, as for the scores after the stage.
        steps: optimizer steps after which to evaluate, counted from 1.
        every: also evaluate after each multiple of this number of steps; 0 for ``steps`` alone.
        stop_above: percent, 0-100; stop the run once the 95 % interval of ``stop_metric`` lies above; None never stops.
        stop_below: percent, 0-100; stop the run once the interval lies below; None never stops.
        stop_metric: the metric of both thresholds.

    Attributes:
        results: one row per step and metric: ``step``, ``metric``, ``judge``, ``value``, ``low``, ``high``, ``count``,
            ``unit``.
        answers: the latest answers by set, ``"harmful"`` and ``"task"``, in process 0 only and not in checkpoints.

    Raises:
        ValueError: if no step is named, a number is out of range, or ``tests`` has no rows to answer or to stop by.

    Cost: one generation of all prompts per evaluation. Its time counts towards no optimizer step.
    """

    def __init__(
        self,
        tests: TestSets,
        settings: Evaluation | None = None,
        *,
        steps: Sequence[int] = (),
        every: int = 0,
        stop_above: float | None = None,
        stop_below: float | None = None,
        stop_metric: Metric = "harmful_score",
    ) -> None:
        super().__init__(steps, every)
        _check(tests, {"stop_above": stop_above, "stop_below": stop_below}, stop_metric)
        self.tests, self.settings = tests, settings or Evaluation()
        self.stop_above, self.stop_below, self.stop_metric = stop_above, stop_below, stop_metric
        self.answers: dict[str, list[str]] = {}
        self._judge: Judge | None = None

    @property
    @override
    def state_key(self) -> str:
        stops = (self.stop_above, self.stop_below, self.stop_metric)
        return self._generate_state_key(tests=self.tests.digest(), steps=self.steps, every=self.every, stops=stops)

    @override
    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, SafetyModule):
            raise InputError(
                f"EvaluateAt: the module must be a SafetyModule, got {type(pl_module).__name__}. Train a SafetyModule,"
                " use MeasureAt, or measure the finished model."
            )
        if not isinstance(getattr(trainer, "datamodule", None), StreamsDataModule):
            raise InputError(
                "EvaluateAt: template, system text and tokenizer come from the data module, so it must be a"
                " StreamsDataModule. Pass one to fit(), use MeasureAt, or measure the finished model."
            )
        self.answers = {}

    @override
    def check_prompts(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for kind, prompts in self._prompts(trainer).items():
            check_prompts(pl_module.model, prompts, self._limit(kind), self.settings.batch_size)  # type: ignore[arg-type]

    @override
    def measured(self, trainer: Trainer, pl_module: LightningModule) -> list[dict[str, Any]]:
        """Let the model answer all prompts, and return the scores of the answers."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        trigger = data.policy.serving_slot().trigger
        for kind, prompts in self._prompts(trainer).items():
            texts = generate(
                pl_module.model,  # type: ignore[arg-type]
                data.tokenizer,
                prompts,
                max_new_tokens=self._limit(kind),
                batch_size=self.settings.batch_size,
                stop=data.template.stop,
            )
            self.answers[kind] = [after_thinking(without_trigger(text, trigger, data.tokenizer)) for text in texts]
        rows = []
        if "harmful" in self.answers:
            self.answers["harmful"] = [self.tests.read(text) for text in self.answers["harmful"]]
            if self._judge is None:  # load the judge once
                self._judge = get_judge(self.tests.judges[0])
            score = HarmfulScore(self._judge, sync_on_compute=False)
            score.update([r.request for r in self.tests.harmful], self.answers["harmful"])
            rows.append(Score.of("harmful_score", score, int(score.count), self._judge.name).row())
        if "task" in self.answers:
            accuracy = FinetuneAccuracy(self.tests.task, sync_on_compute=False)
            accuracy.update(self.tests.graded_rows, self.answers["task"])
            rows.append(Score.of("finetune_accuracy", accuracy, int(accuracy.count)).row())
        return rows

    def _prompts(self, trainer: Trainer) -> dict[str, list[list[int]]]:
        """Return the token ids of each set's prompts, with the system slot that the model will be served with."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        slot = data.policy.serving_slot()
        sets = {"harmful": self.tests.asked("harmful"), "task": self.tests.graded_rows}
        return {
            kind: [encode_prompt(r, data.template, data.tokenizer, slot) for r in records]
            for kind, records in sets.items()
            if records
        }

    def _limit(self, kind: str) -> int:
        """Return the maximum new tokens of an answer to a set."""
        if kind == "task":
            return self.settings.task_max_new_tokens or self.tests.task.max_new_tokens
        return self.settings.max_new_tokens

    @override
    def decide_stop(self, trainer: Trainer) -> None:
        """Stop the training once the interval of any result lies above ``stop_above`` or below ``stop_below``."""
        for row in self.results:
            if row["metric"] != self.stop_metric:
                continue
            above = self.stop_above is not None and row["low"] > self.stop_above
            below = self.stop_below is not None and row["high"] < self.stop_below
            if above or below:
                trainer.should_stop = True


def _check(tests: TestSets, bounds: dict[str, float | None], stop_metric: str) -> None:
    """Check the arguments of ``EvaluateAt``, which lists the errors."""
    there = {"harmful_score": tests.harmful, "finetune_accuracy": tests.graded_rows}
    if not any(there.values()):
        raise ValueError("EvaluateAt: tests must have harmful prompts or task rows, got neither.")
    if stop_metric not in there:
        raise ValueError(f"EvaluateAt: stop_metric must be one of {list(there)}, got {stop_metric!r}.")
    thresholds = {name: bound for name, bound in bounds.items() if bound is not None}
    for name, bound in thresholds.items():
        if not 0 <= bound <= 100:
            raise ValueError(f"EvaluateAt: {name} must lie in [0, 100] percent, got {bound}.")
    if thresholds and not there[stop_metric]:
        raise ValueError(f"EvaluateAt: stop_metric is {stop_metric}, but tests has no rows for it.")


@contextmanager
def _same_random_states(device: torch.device) -> Iterator[None]:
    """Restore the random states of torch, Python and NumPy after the block, since a judge may draw from any of them."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with same_random_state(device):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
