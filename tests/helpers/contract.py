"""Tools to test every public defense: a row of settings, tiny data, and an independent slow loop."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from hftlight import SafetyModule, StreamsDataModule
from hftlight.data.records import Record
from hftlight.data.streams import ExampleStream
from hftlight.data.templates import get_template
from hftlight.data.tokens import collate
from hftlight.engine import Defense, Slot, Stage, count_passes, main_stream, rank_and_world
from hftlight.registry import defenses
from tests.helpers.quadratic import quiet_trainer
from tests.helpers.tiny_lm import reference_loss, tiny_lm
from tests.helpers.tokenizers import CHATML, byte_tokenizer

ROWS_PER_STEP, SIDE_ROWS, STEPS, LR = 8, 4, 4, 0.1
MAIN = {Stage.ALIGNMENT: "alignment", Stage.FINETUNING: "task", Stage.POST_FINETUNING: "task"}
STREAMS = ("alignment", "harmful", "pairs", "task", "retain")


@dataclass(frozen=True)
class Row:
    """How the generated tests use one defense.

    Attributes:
        make: a fresh instance that acts visibly within four steps.
        neutral: a fresh instance that must equal plain fine-tuning bitwise.
        no_neutral: why no neutral instance exists.
        bad: constructor arguments, and the text that their error must contain.
        slow: the independent loop; None for the data and weights slots.
        records: for the data slot, an independent computation of the training rows.
        per_micro_batch: why the result depends on how a step is cut into micro-batches; empty if it does not.
        per_rank: whether each process's micro-batch is treated by itself, so that two processes equal one process
            with twice the micro-batches.
        tunings: the tunings that the defense supports.
        refuses: strategy or Lightning callback -> words of the error.
        thin: whether the aligned model must be a LoRA adapter on the base model.
    """

    make: Callable[[], Defense]
    neutral: Callable[[], Defense] | None = None
    no_neutral: str = ""
    bad: Sequence[tuple[Mapping[str, Any], str]] = ()
    slow: "type[Slow] | None" = None
    records: Callable[[dict[str, list[Record]], int], dict[str, list[Record]]] | None = None
    per_micro_batch: str = ""
    per_rank: bool = False
    tunings: tuple[str, ...] = ("lora", "full")
    refuses: Mapping[str, str] = field(default_factory=dict)
    thin: bool = False


@cache
def rows() -> dict[str, Row]:
    """Return the rows of all public defenses by name. Another package has its row beside the defense."""
    folder = Path(__file__).parents[1] / "defenses" / "rows"
    rows_by_name = {}
    for name, entry in defenses().items():
        if not entry.module.startswith("hftlight."):
            rows_by_name[name] = import_module(f"{entry.module}_row").ROW
        elif (folder / f"{name}.py").is_file():
            rows_by_name[name] = import_module(f"tests.defenses.rows.{name}").ROW
    return rows_by_name


def records(count: int = 16) -> dict[str, list[Record]]:
    """Return rows of one length for every stream. Of 16 task rows, two are the attacker's."""
    streams: dict[str, list[Record]] = {}
    for name in STREAMS:
        for i in range(count):
            role: Any = "attack" if name == "task" and i % 8 == 5 else name
            text = f"{name[:4]}{i:02d}"
            rejected = f"do {i * 11 % 97:02d}{text} now"[: 6 + i % 5] if name == "pairs" else ""
            answer = f"say {(i * 7 + len(name)) % 97:02d}{text[::-1]}"
            streams.setdefault(name, []).append(Record(f"ask {text}", answer, role=role, rejected=rejected))
    return streams


class FixedOrder(StreamsDataModule):
    """Rows in a fixed order: a step has the same rows for any number of micro-batches and processes."""

    def stream(self, name: str, batch_size: int) -> ExampleStream:
        plain = super().stream(name, batch_size)
        return _FixedStream(plain.examples, name, batch_size, plain.pad_id, plain.seed)


class _FixedStream(ExampleStream):
    def rows(self, index: int, rank: int) -> list[Any]:
        first = (index * rank_and_world()[1] + rank) * self.batch_size
        return [self.examples[(first + k) % len(self.examples)] for k in range(self.batch_size)]


def data_module(stage: Stage, accumulate: int = 1, world: int = 1, main: str = "", **options: Any) -> FixedOrder:
    """Return the tiny data. A step takes eight rows for any number of micro-batches and processes."""
    tokenizer = byte_tokenizer(chat_template=CHATML)
    return FixedOrder(
        tokenizer,
        get_template("chat", tokenizer),
        main or MAIN[stage],
        batch_size=ROWS_PER_STEP // accumulate // world,
        side_batch_size=SIDE_ROWS // world,
        **{**records(), **options},
    )


def model_of(tuning: str, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return the tiny model with the byte tokenizer's vocabulary."""
    return tiny_lm(lora=tuning == "lora", dropout=dropout, dtype=dtype, vocabulary=259)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of the trained weights by name, unsharded: the adapter's if there is one, else all."""
    named = {name: p for name, p in module.named_parameters() if ".aligned." not in name}
    adapter = {name: p for name, p in named.items() if "lora_" in name}
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in (adapter or named).items()
    }


def train(
    chosen: Sequence[Defense],
    tuning: str = "lora",
    stage: Stage | None = None,
    accumulate: int = 1,
    clip: float | None = None,
    checkpointing: bool = False,
    steps: int = STEPS,
    dtype: torch.dtype = torch.float64,
    model: nn.Module | None = None,
    data: StreamsDataModule | None = None,
    **options: Any,
) -> SafetyModule:
    """Train the tiny model with some defenses by plain SGD and return the module."""
    stage = stage or (chosen[0].stage if chosen else Stage.FINETUNING)
    model = model_of(tuning, dtype=dtype) if model is None else model
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    module = SafetyModule(model, lr=options.pop("lr", LR), optimizer=options.pop("optimizer", "sgd"))
    trainer = quiet_trainer(
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        callbacks=[*chosen, *options.pop("callbacks", [])],
        use_distributed_sampler=False,
        **options,
    )
    trainer.fit(module, data or data_module(stage, accumulate, trainer.world_size, main_stream(chosen, MAIN[stage])))
    return module


def acts_in_steps(name: str) -> bool:
    """Tell whether a row changes training steps. One row stands for all that change data alone, one for all repairs."""
    return name in ("safety_mix", "antidote") or rows()[name].make().slots not in ((Slot.DATA,), (Slot.WEIGHTS,))


@cache
def _plain(tuning: str, stage: Stage, settings: tuple[tuple[str, Any], ...]) -> dict[str, Tensor]:
    return weights_of(train([], tuning, stage, **dict(settings)))


def plain_weights(tuning: str, stage: Stage, **settings: Any) -> dict[str, Tensor]:
    """Return the weights of plain training. Equal settings are trained once per process."""
    return {name: tensor.clone() for name, tensor in _plain(tuning, stage, tuple(sorted(settings.items()))).items()}


@dataclass(frozen=True)
class Fit:
    """Measurements of one training with one defense's row. Readers must not edit the weights.

    Attributes:
        weights: the trained weights after ``STEPS`` optimizer steps.
        summary: the defense's own summary at the end.
        forwards: forward passes of the model so far, at the end of each micro-batch.
        passes: forward passes per optimizer step that the defense declares, its own and the training's.
        steady: whether every step takes ``passes``. Otherwise ``passes`` is a mean, and a window of steps may differ
            from that mean by one.
        hooks: number of hooks on the model before and after.
    """

    weights: Mapping[str, Tensor]
    summary: Mapping[str, float]
    forwards: Sequence[int]
    passes: float
    steady: bool
    hooks: tuple[int, int]


@cache
def fitted(
    name: str,
    tuning: str,
    accumulate: int = 1,
    clip: float | None = None,
    checkpointing: bool = False,
    steps: int = STEPS,
) -> Fit:
    """Train the tiny model with one defense's row and return the measurements. Equal calls share one training."""
    defense, model = rows()[name].make(), model_of(tuning)
    watch, before = Watch(), hooks_of(model)
    handle = model.get_input_embeddings().register_forward_hook(watch.count)  # type: ignore[operator]
    try:
        train(
            [defense],
            tuning,
            accumulate=accumulate,
            clip=clip,
            checkpointing=checkpointing,
            steps=steps,
            model=model,
            callbacks=[watch],
        )
    finally:
        handle.remove()
    passes, steady = count_passes([defense])[0], not any(p.forward % 1 for p in defense.passes)
    return Fit(watch.weights, defense.summary(), watch.forwards, passes, steady, (before, hooks_of(model)))


class Watch(Callback):
    """Counts forward passes and copies the weights after ``STEPS`` optimizer steps."""

    def __init__(self) -> None:
        self.calls, self.forwards, self.weights = 0, [], {}

    def count(self, *_: Any) -> None:
        self.calls += 1

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.forwards.append(self.calls)
        if trainer.global_step == STEPS and not self.weights:
            self.weights = weights_of(pl_module)


def hooks_of(module: nn.Module) -> int:
    """Return the number of hooks on a module and all below it."""
    places = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(m, place)) for m in module.modules() for place in places)


@cache
def trained_pair(first: str, second: str, steps: int) -> tuple[dict[str, Tensor], list[Mapping[str, float]]]:
    """Train with two rows in this order. Return the weights and each defense's summary."""
    pair = [rows()[name].make() for name in (first, second)]
    return weights_of(train(pair, steps=steps, dtype=torch.float32)), [d.summary() for d in pair]


def distance(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Return the relative L2 distance of two sets of weights with the same names."""
    assert left.keys() == right.keys()
    a, b = (torch.cat([w[name].double().flatten() for name in right]) for w in (left, right))
    return float((a - b).norm() / b.norm())


class Slow:
    """Plain SGD by ``autograd.grad`` on a copy of the model, with the loss computed token by token.

    A defense's row overrides what the method changes, written independently of the library.
    """

    def __init__(self, model: nn.Module, stage: Stage, accumulate: int = 1, steps: int = STEPS) -> None:
        self.model = copy.deepcopy(model)
        self.stage, self.accumulate, self.steps = stage, accumulate, steps
        self.weights = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        data = data_module(stage)
        self._examples = {name: data._encoded(name)[0] for name in STREAMS}
        self.main = MAIN[stage]
        self._pad = 258
        self.side = {name: _Batches(lambda k, n=name: self._cut(n, k, SIDE_ROWS)) for name in STREAMS}

    def _cut(self, name: str, index: int, size: int) -> dict[str, Any]:
        examples = self._examples[name]
        chosen = [examples[(index * size + k) % len(examples)] for k in range(size)]
        batch = collate(chosen, self._pad)
        batch["role"] = ["task" if role == "attack" else role for role in batch["role"]]
        return batch

    def main_like(self, name: str, index: int) -> dict[str, Any]:
        """Return micro-batch number ``index`` of a stream, in the size of the main stream's."""
        return self._cut(name, index, ROWS_PER_STEP // self.accumulate)

    def begin(self) -> None:
        """Prepare everything that depends on the initial weights."""

    def batch_for(self, step: int, micro: int, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the micro-batch to train on, given the main stream's."""
        return batch

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Return the loss of a micro-batch at the current weights."""
        return reference_loss(self.model, batch)

    def gradient_of(self, loss: Tensor) -> list[Tensor]:
        """Return the gradient of a loss for ``self.weights``, zeros for weights without influence."""
        gradients = torch.autograd.grad(loss, [p for _, p in self.weights], allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, (_, p) in zip(gradients, self.weights, strict=True)]

    def micro_gradient(self, batch: dict[str, Any]) -> list[Tensor]:
        """Return the gradient that a micro-batch contributes."""
        return self.gradient_of(self.loss(batch))

    def edit(self, step: int, grads: list[Tensor]) -> list[Tensor]:
        """Return the gradient of the step, given the mean over its micro-batches."""
        return grads

    def learning_rate(self, name: str) -> float:
        """Return the factor of a parameter's learning rate."""
        return 1.0

    def after(self, step: int) -> None:
        """Act after a step has updated the weights."""

    def run(self, clip: float | None = None) -> dict[str, Tensor]:
        """Train and return the weights by name, as ``weights_of(SafetyModule)`` has them."""
        self.begin()
        for step in range(self.steps):
            total: list[Tensor] | None = None
            for micro in range(self.accumulate):
                batch = self.batch_for(step, micro, self.main_like(self.main, step * self.accumulate + micro))
                grads = [g / self.accumulate for g in self.micro_gradient(batch)]
                total = grads if total is None else [a + b for a, b in zip(total, grads, strict=True)]
            assert total is not None
            total = self.edit(step, total)
            if clip is not None:
                length = torch.sqrt(sum((g**2).sum() for g in total))  # type: ignore[arg-type]
                total = [g * min(1.0, clip / (float(length) + 1e-6)) for g in total]
            with torch.no_grad():
                for (name, p), g in zip(self.weights, total, strict=True):
                    p.copy_(p - LR * self.learning_rate(name) * g)
            self.after(step)
        return {f"model.{name}": t for name, t in weights_of(self.model).items()}


class _Batches:
    """Batches by number, each created on access."""

    def __init__(self, make: Callable[[int], dict[str, Any]]) -> None:
        self._make = make

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._make(index)
