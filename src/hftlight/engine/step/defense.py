"""Defense: the callback that every defense extends."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from hftlight.engine.step.order import trainer_seed
from hftlight.engine.step.passes import Passes
from hftlight.engine.step.side_streams import LoaderStream, Stream
from hftlight.engine.step.slots import Slot, Stage, check, in_order

Loader = DataLoader[Any] | Sequence[Any]


class HasLoss(Protocol):
    """What a defense needs of a LightningModule."""

    def loss(self, batch: Any) -> Tensor:
        """Return the mean loss in nats over the micro-batch's response tokens, without logging anything."""


class Defense(Callback):
    """A defense against harmful fine-tuning, used as a callback of a standard Trainer.

    A subclass names its stage, slots and side streams, keeps each constructor argument under its own name, and
    implements the Lightning hooks of its slots. Before the first step all defenses of a Trainer are checked together
    and put into the order of their slots.

    Args:
        streams: loaders of the side streams by name, where the data module does not offer them.

    The ``DATA`` slot asks for ``rewrite`` and ``prompting``, ``ADAPTER`` for ``build`` and ``unbuild``, ``STREAM`` for
    ``stream_at`` and ``steps_on``, ``LOSS`` for ``loss_term``, ``token_weights`` and ``taps``; the other slots need
    nothing but Lightning's hooks.

    Attributes:
        stage: when it works; this and the next four are set by the instance where modes change them.
        slots: where it acts.
        streams: names of the side streams it draws from.
        passes: work beside the stage's own forward and backward pass.
        claims: what it needs for itself beside the exclusive slots, such as ``"token weights"``.
        pauses: stream slot: whether the main stream waits while another one is trained on, instead of losing batches.
        presets: constructor arguments of published settings by name, such as ``"paper"``.
        trace: what it did so far, summed over steps: calls, and whatever the method records.
    """

    stage: Stage
    slots: tuple[Slot, ...] = ()
    streams: tuple[str, ...] = ()
    passes: tuple[Passes, ...] = ()
    claims: tuple[str, ...] = ()
    pauses: bool = False
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __init__(self, streams: Mapping[str, Loader] | None = None) -> None:
        unknown = set(streams or ()) - set(self.streams)
        if unknown:
            raise ValueError(
                f"{type(self).__name__}: unknown stream {sorted(unknown)}; it draws from {list(self.streams)}."
            )
        self._loaders = dict(streams or {})
        self._sources: dict[str, Callable[[], Stream]] = {}
        self._drawn: dict[str, int] = {}
        self.trace: dict[str, float | Tensor] = {}
        self._trainer: Trainer | None = None

    def arguments(self) -> dict[str, Any]:
        """Return the constructor arguments as they are, streams left out."""
        names = inspect.signature(type(self).__init__).parameters
        return {name: getattr(self, name) for name in names if name not in ("self", "streams")}

    @property
    @override
    def state_key(self) -> str:
        return self.key_of(self.arguments())

    def key_of(self, arguments: Mapping[str, Any]) -> str:
        """Return class and arguments as the name of an instance, with the module of another package's class."""
        module = type(self).__module__
        return f"{'' if module.startswith('hftlight.') else module + '.'}{self._generate_state_key(**arguments)}"

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"drawn": dict(self._drawn), "trace": self.summary()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._drawn, self.trace = dict(state_dict["drawn"]), dict(state_dict["trace"])

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the whole list, put it in order and find the side streams.

        Raises:
            ValueError: if the list of defenses cannot work or a stream is missing.
            TypeError: if the module has no ``loss(batch)``, the strategy is unknown, or checkpointing is reentrant.
        """
        if stage != "fit":
            return
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        defenses = [c for c in callbacks if isinstance(c, Defense)]
        check(defenses)
        ordered = iter(in_order(defenses))
        # A new list: Lightning is walking through the old one at this moment.
        trainer.callbacks = [next(ordered) if isinstance(c, Defense) else c for c in callbacks]  # type: ignore[attr-defined]
        self._check_surroundings(trainer, pl_module)
        self._drawn, self.trace = {}, {}
        self._sources = {name: self._find(name, trainer) for name in self.streams}
        self._take_up(trainer, pl_module)
        self._trainer = trainer

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release(pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release(pl_module)

    def rewrite(self, records: dict[str, list[Any]], seed: int) -> dict[str, list[Any]]:
        """Data slot: return the rows to train on.

        Args:
            records: ``Record`` rows by stream; not to be changed in place.
            seed: the run's seed.
        """
        return records

    def check_template(self, template: Any, tokenizer: Any, policy: Any) -> None:
        """Data slot: refuse a prompt template, with the ``PromptPolicy`` so far, before any row is rewritten."""

    def prompting(self, policy: Any, tokenizer: Any) -> Any:
        """Data slot: return the ``PromptPolicy`` to train and to serve with, given the one so far."""
        return policy

    def build(self, module: Any) -> None:
        """Adapter slot: change a ``SafetyModule`` before it is sharded and before its optimizer exists."""
        raise NotImplementedError(f"{type(self).__name__} fills the adapter slot and must implement build().")

    def unbuild(self, module: Any) -> None:
        """Adapter slot: undo after training what ``build`` did to the module and not to its weights."""

    def stream_at(self, step: int) -> str:
        """Stream slot: return the stream that an optimizer step trains on, counted from 0."""
        raise NotImplementedError(f"{type(self).__name__} fills the stream slot and must implement stream_at().")

    def steps_on(self, name: str, step: int) -> int:
        """Stream slot: return how many of the optimizer steps before ``step`` trained on a stream."""
        return sum(self.stream_at(earlier) == name for earlier in range(step))

    def taps(self, model: Any) -> dict[str, Any]:
        """Loss slot: return the layers, by any name, whose outputs the loss term reads."""
        return {}

    def loss_term(self, forward: Any) -> Tensor | None:
        """Loss slot: return what is added to the loss of one micro-batch, 0-d in nats, from its ``Forward``."""
        return None

    def token_weights(self, forward: Any) -> Tensor | None:
        """Loss slot: return the factor of every response token's loss, ``[response tokens]``, without gradient."""
        return None

    def draw(self, name: str) -> Any:
        """Return the next batch of a side stream, on the module's device.

        Raises:
            RuntimeError: if no Trainer is fitting.
        """
        if self._trainer is None:
            raise RuntimeError(f"{type(self).__name__}: streams can be drawn from only while a Trainer is fitting.")
        index = self._drawn.get(name, 0)
        self._drawn[name] = index + 1
        batch = self._trainer.precision_plugin.convert_input(self._sources[name]().batch(index))
        return self._trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    def record(self, **values: float | Tensor) -> None:
        """Add to the trace; tensors are summed on their device and read only when the trace is."""
        with torch.no_grad():
            for name, value in {"calls": 1, **values}.items():
                self.trace[name] = self.trace.get(name, 0) + value

    def show(self, values: Mapping[str, Tensor]) -> None:
        """Log 0-d values by their names in a run's metrics; outside of a fit do nothing."""
        if self._trainer is not None:
            self._trainer.lightning_module.log_dict({name: value.detach() for name, value in values.items()})

    def summary(self) -> dict[str, float]:
        """Return the trace as plain numbers."""
        return {name: float(value) for name, value in self.trace.items()}

    def manifest(self) -> dict[str, Any]:
        """Return what the run's manifest says of this defense: its trace, and what else there is to know."""
        return self.summary()

    def _take_up(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell data module and module which of their places this defense fills."""
        who = type(self).__name__
        datamodule: Any = getattr(trainer, "datamodule", None)
        if Slot.DATA in self.slots:
            if not hasattr(datamodule, "apply"):
                raise TypeError(
                    f"{who} rewrites rows before training: give the Trainer a StreamsDataModule, or call"
                    f" {who}.rewrite(records, seed) on your rows yourself."
                )
            datamodule.apply(self)
        if Slot.STREAM in self.slots and hasattr(datamodule, "follow"):
            datamodule.follow(self)
        for slot, place in ((Slot.ADAPTER, "parameter_groups"), (Slot.LOSS, "loss_terms")):
            if slot in self.slots and not hasattr(pl_module, place):
                raise TypeError(
                    f"{who} fills the {slot.name.lower()} slot, which {type(pl_module).__name__} does not have; use"
                    " SafetyModule, or a subclass of it."
                )
        if Slot.ADAPTER in self.slots:
            self.build(pl_module)
        if Slot.LOSS in self.slots:
            pl_module.loss_terms.append(self)  # type: ignore[operator, union-attr]
            if any(p.shared == "reference" for p in self.passes):
                pl_module.reference()  # type: ignore[operator]

    def _release(self, pl_module: LightningModule) -> None:
        if self._trainer is None:
            return
        if Slot.LOSS in self.slots:
            pl_module.loss_terms.remove(self)  # type: ignore[operator, union-attr]
            pl_module.forget_reference()  # type: ignore[operator]
        if Slot.ADAPTER in self.slots:
            self.unbuild(pl_module)
        self._trainer, self._sources = None, {}

    def _find(self, name: str, trainer: Trainer) -> Callable[[], Stream]:
        """Return what gives the stream when it is needed: a data-slot defense may still rewrite its rows."""
        if name in self._loaders:
            stream = LoaderStream(self._loaders[name], name, trainer_seed())
            return lambda: stream
        offered = getattr(trainer, "datamodule", None)
        streams = getattr(offered, "streams", {})
        if name in streams:
            return lambda: streams[name]
        raise ValueError(
            f"{type(self).__name__}: stream {name!r} is missing; the data module offers {sorted(streams)}."
            f" Pass {name}=... to StreamsDataModule, or streams={{{name!r}: loader}} to {type(self).__name__}."
        )

    def _check_surroundings(self, trainer: Trainer, pl_module: LightningModule) -> None:
        who = type(self).__name__
        if not callable(getattr(pl_module, "loss", None)):
            raise TypeError(
                f"{who}: {type(pl_module).__name__} needs a method loss(batch) that returns the mean loss in nats over"
                " the batch's response tokens, without logging."
            )
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy)):
            raise TypeError(
                f"{who}: strategy {type(trainer.strategy).__name__} is not supported, since its gradients cannot be"
                " taken apart; use a single device, 'ddp' or ModelParallelStrategy (FSDP2)."
            )
        if not pl_module.automatic_optimization:
            raise TypeError(f"{who}: manual optimization fires no gradient hooks; set automatic_optimization = True.")
        for name, module in pl_module.named_modules():
            function = getattr(module, "_gradient_checkpointing_func", None)
            if getattr(module, "gradient_checkpointing", False) and _reentrant(function):
                raise TypeError(
                    f"{who}: reentrant gradient checkpointing (in {name!r}) breaks hooks and extra passes; enable it"
                    ' with gradient_checkpointing_kwargs={"use_reentrant": False}.'
                )


def _reentrant(function: Any) -> bool:
    """Tell whether a checkpoint function, as transformers stores it, is the reentrant kind."""
    return bool(getattr(function, "keywords", {}).get("use_reentrant", False))
