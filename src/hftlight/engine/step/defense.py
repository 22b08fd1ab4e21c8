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
    """A LightningModule with the method that every defense needs."""

    def loss(self, batch: Any) -> Tensor:
        """Return the mean loss in nats over the micro-batch's response tokens, without logging anything."""


class Defense(Callback):
    """A defense against harmful fine-tuning, used as a callback of a standard Trainer.

    A subclass names its stage, slots and side streams. It stores each constructor argument in an attribute of the same
    name, and implements the Lightning hooks of its slots. Before the first step, all defenses of a Trainer are checked
    together and sorted by slot.

    Four slots have methods of their own; the other slots need only Lightning's hooks:

    - ``DATA``: ``rewrite``, ``check_template`` and ``prompting``.
    - ``ADAPTER``: ``build``, ``unbuild`` and ``check_model``.
    - ``STREAM``: ``stream_at`` and ``steps_on``.
    - ``LOSS``: ``loss_term``, ``token_weights`` and ``taps``.

    Args:
        streams: loaders of the side streams by name. A loader takes precedence over a stream of the data module.

    Attributes:
        stage: stage in which the defense works. An instance sets this and the next attributes itself if its modes
            change them.
        slots: slots that the defense fills.
        streams: names of the side streams that the defense draws from.
        passes: work beside the stage's own forward and backward pass.
        claims: what the defense needs for itself alone beside the exclusive slots, such as ``"token weights"``.
        main: stream that the stage trains on instead of its own, such as ``"pairs"``. Empty for the stage's own stream.
        aligned_first: alignment stage: whether the stage trains without defenses first, so that all its defenses start
            from a plainly aligned model.
        selects: data and adapter slot: whether ``select`` must run with a model before the stage.
        selecting_passes: roughly how many forward passes ``select`` takes per row, for the estimate of a run's time.
        selecting_tokens: roughly how many tokens ``select`` generates per row, for the same estimate.
        selects_by_gradient: whether ``select`` takes gradients. It then gets the micro-batch of the training, else the
            larger batch of the measurements.
        files: names of the arguments that are paths of files; the content of the files enters the cache key.
        adapter: adapter slot: settings of the adapter that the stage will train, a ``hftlight.config.Lora``. A run sets
            them before ``select``.
        selected: what ``select`` returned, or what a run has stored of it; None before.
        kept: tensors by name that training leaves beside the weights, for ``deployment``; None if there are none. A
            run stores them with the trained model.
        compares: whether the defense reads the aligned model through the module's ``reference()``. Passes that share
            ``"reference"`` say so too.
        acts_first: gradient slot: whether the defense must act before all others of the slot, since it edits the
            gradient of the stage's own loss.
        pauses: stream slot: whether the main stream waits while another stream is trained on, so that it loses no
            batches.
        presets: constructor arguments of published settings by name, such as ``"paper"``.
        trace: sums over the steps so far: number of calls, and the values that the method records.
    """

    stage: Stage
    slots: tuple[Slot, ...] = ()
    streams: tuple[str, ...] = ()
    passes: tuple[Passes, ...] = ()
    claims: tuple[str, ...] = ()
    main: str = ""
    aligned_first: bool = False
    selects: bool = False
    selecting_passes: float = 1.0
    selecting_tokens: float = 0.0
    selects_by_gradient: bool = False
    files: tuple[str, ...] = ()
    adapter: Any = None
    selected: list[dict[str, Any]] | None = None
    kept: Mapping[str, Tensor] | None = None
    compares: bool = False
    acts_first: bool = False
    pauses: bool = False
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __init__(self, streams: Mapping[str, Loader] | None = None) -> None:
        unknown = set(streams or ()) - set(self.streams)
        if unknown:
            raise ValueError(
                f"{type(self).__name__}: unknown stream {sorted(unknown)}; the defense draws from {list(self.streams)}."
            )
        self._loaders = dict(streams or {})
        self._sources: dict[str, Callable[[], Stream]] = {}
        self._drawn: dict[str, int] = {}
        self.trace: dict[str, float | Tensor] = {}
        self._trainer: Trainer | None = None

    def arguments(self) -> dict[str, Any]:
        """Return the constructor arguments by name, without ``streams``."""
        names = inspect.signature(type(self).__init__).parameters
        return {name: getattr(self, name) for name in names if name not in ("self", "streams")}

    def identity(self) -> dict[str, Any]:
        """Return what decides the result beside arguments, rows and code, such as the hash of another model's files."""
        return {}

    @property
    @override
    def state_key(self) -> str:
        return self.key_of(self.arguments())

    def key_of(self, arguments: Mapping[str, Any]) -> str:
        """Return the name of an instance: its class and arguments.

        If the class belongs to another package, its module stands first.
        """
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
        """Check all defenses of the Trainer, sort them by slot and find this defense's side streams.

        Raises:
            ValueError: if the defenses cannot work together or a stream is missing.
            TypeError: if the module has no ``loss(batch)``, the strategy is unknown, or checkpointing is reentrant.
        """
        if stage != "fit":
            return
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        defenses = [c for c in callbacks if isinstance(c, Defense)]
        check(defenses)
        ordered = iter(in_order(defenses))
        # Defenses are sorted among their own places in the list; other callbacks stay where they are.
        # The Trainer gets a new list, because Lightning is iterating over the old one at this moment.
        trainer.callbacks = [next(ordered) if isinstance(c, Defense) else c for c in callbacks]  # type: ignore[attr-defined]
        self._check_surroundings(trainer, pl_module)
        self._drawn, self.trace = {}, {}
        self._sources = {name: self._find(name, trainer) for name in self.streams}
        self._register(trainer, pl_module)
        self._trainer = trainer  # last, because ``_release`` acts only on a defense with a Trainer

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release(pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release(pl_module)

    def rewrite(self, records: dict[str, list[Any]], seed: int) -> dict[str, list[Any]]:
        """Return the rows to train on (data slot).

        Args:
            records: ``Record`` rows by stream; an implementation must not change them in place.
            seed: seed of the run.
        """
        return records

    def check_template(self, template: Any, tokenizer: Any, policy: Any) -> None:
        """Refuse an unsuitable prompt template before any row is rewritten (data slot).

        Args:
            template: prompt template of the run.
            tokenizer: tokenizer of the model.
            policy: ``PromptPolicy`` of the defenses before this one.
        """

    def check_judges(self, judges: Sequence[Any]) -> None:
        """Refuse a judge that must not measure this defense, before any training (data slot).

        Args:
            judges: the ``Judge`` objects of the run.
        """

    def prompting(self, policy: Any, tokenizer: Any) -> Any:
        """Return the ``PromptPolicy`` for training and serving, from the policy of the defenses before (data slot)."""
        return policy

    def selecting(self, records: Mapping[str, Sequence[Any]]) -> int:
        """Return the number of rows that ``select`` works on, for plans and progress.

        Args:
            records: ``Record`` rows by stream.
        """
        return sum(map(len, records.values()))

    def select(
        self,
        model: Any,
        tokenizer: Any,
        template: Any,
        records: Mapping[str, Sequence[Any]],
        system: str | None = None,
        batch_size: int = 8,
        seed: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> list[dict[str, Any]]:
        """Compute with a model what the stage needs, store it in ``selected`` and return it as plain values.

        A run calls this once before the stage, with the model that the stage starts from. On a Trainer of your own,
        call it before ``fit``.

        Args:
            model: the model that the stage starts from; it is left unchanged.
            tokenizer: the model's tokenizer.
            template: how a record becomes a prompt.
            records: ``Record`` rows by stream.
            system: system text of the prompts; None for no system text.
            batch_size: rows per batch, >= 1.
            seed: seed of the run.
            progress: called with the number of rows done so far.

        Returns:
            One dictionary of plain values per row.
        """
        raise NotImplementedError(f"{type(self).__name__} selects and must implement select().")

    def check_model(self, model: Any) -> None:
        """Refuse a model that the defense cannot work on, which may be on the meta device (adapter slot).

        Without ``selects`` a run tries ``build`` instead.
        """

    def build(self, module: Any) -> None:
        """Change a ``SafetyModule`` before it is sharded and before its optimizer exists (adapter slot)."""
        raise NotImplementedError(f"{type(self).__name__} fills the adapter slot and must implement build().")

    def unbuild(self, module: Any) -> None:
        """Undo after training what ``build`` changed in the module, except for its weights (adapter slot)."""

    def stream_at(self, step: int) -> str:
        """Return the stream that optimizer step ``step``, counted from 0, trains on (stream slot)."""
        raise NotImplementedError(f"{type(self).__name__} fills the stream slot and must implement stream_at().")

    def steps_on(self, name: str, step: int) -> int:
        """Return how many of the optimizer steps before ``step`` trained on stream ``name`` (stream slot)."""
        return sum(self.stream_at(earlier) == name for earlier in range(step))

    def taps(self, model: Any) -> dict[str, Any]:
        """Return the layers, by any name, whose outputs the loss term reads (loss slot)."""
        return {}

    def loss_term(self, forward: Any) -> Tensor | None:
        """Return the term that is added to the loss of one micro-batch, 0-d in nats, or None (loss slot).

        Args:
            forward: the ``Forward`` of the micro-batch.
        """
        return None

    def token_weights(self, forward: Any) -> Tensor | None:
        """Return a factor for each response token's loss, ``[response tokens]``, or None (loss slot).

        The factors carry no gradient.

        Args:
            forward: the ``Forward`` of the micro-batch.
        """
        return None

    def deployment(self, output: str | None = None) -> Any:
        """Return the repair that turns the trained model into the one that is deployed, or None if they are the same.

        A run applies it as the first repair.

        Args:
            output: folder for the deployed model, without a run.
        """
        return None

    def draw(self, name: str) -> Any:
        """Return the next batch of a side stream, on the module's device.

        Raises:
            RuntimeError: if no Trainer is fitting.
        """
        if self._trainer is None:
            raise RuntimeError(f"{type(self).__name__}: draw() works only while a Trainer is fitting.")
        index = self._drawn.get(name, 0)
        self._drawn[name] = index + 1
        batch = self._trainer.precision_plugin.convert_input(self._sources[name]().batch(index))
        return self._trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    def record(self, **values: float | Tensor) -> None:
        """Add one call and the values to the trace.

        Tensors are summed on their device. They are read on the host only when the trace is read.
        """
        with torch.no_grad():
            for name, value in {"calls": 1, **values}.items():
                self.trace[name] = self.trace.get(name, 0) + value

    def show(self, values: Mapping[str, Tensor]) -> None:
        """Log 0-d values under their names in the run's metrics.

        Outside of a fit, nothing is logged.
        """
        if self._trainer is not None:
            self._trainer.lightning_module.log_dict({name: value.detach() for name, value in values.items()})

    def summary(self) -> dict[str, float]:
        """Return the trace as plain numbers."""
        return {name: float(value) for name, value in self.trace.items()}

    def manifest(self) -> dict[str, Any]:
        """Return this defense's entry in the run's manifest: the trace, and what a subclass adds."""
        return self.summary()

    def _register(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Register this defense with the data module and the module, for the slots that it fills."""
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
        if self._reads_reference:
            if not hasattr(pl_module, "reference"):
                raise TypeError(
                    f"{who} compares with the aligned model, which {type(pl_module).__name__} does not offer; use"
                    " SafetyModule, or a subclass of it."
                )
            pl_module.reference()  # type: ignore[operator]

    def _release(self, pl_module: LightningModule) -> None:
        # ``on_exception`` and ``teardown`` may both come here; the second call does nothing.
        if self._trainer is None:
            return
        if Slot.LOSS in self.slots:
            pl_module.loss_terms.remove(self)  # type: ignore[operator, union-attr]
        if self._reads_reference:
            pl_module.forget_reference()  # type: ignore[operator]
        if Slot.ADAPTER in self.slots:
            self.unbuild(pl_module)
        self._trainer, self._sources = None, {}

    @property
    def _reads_reference(self) -> bool:
        return self.compares or any(p.shared == "reference" for p in self.passes)

    def _find(self, name: str, trainer: Trainer) -> Callable[[], Stream]:
        """Return a function that looks up the stream when it is needed.

        The look-up must be late, because a data-slot defense may still rewrite the rows of the stream.
        """
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
                f"{who}: strategy {type(trainer.strategy).__name__} is not supported, since a defense cannot edit"
                " its gradients one by one. Use a single device, 'ddp' or ModelParallelStrategy (FSDP2)."
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
    """Tell whether a checkpoint function, as transformers stores it, is reentrant."""
    return bool(getattr(function, "keywords", {}).get("use_reentrant", False))
