"""Repair: a defense that edits finished weights once, in memory, and writes a repaired model of its own."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from typing_extensions import override

from hftlight.engine.step.defense import Defense, Loader
from hftlight.engine.step.order import trainer_seed
from hftlight.engine.step.slots import Slot, Stage
from hftlight.engine.weights.lora import LoraUpdate, has_adapter, lora_updates
from hftlight.engine.weights.lowrank import LowRank, combined
from hftlight.engine.weights.save import (
    MARKER,
    repaired_state,
    repairs_of,
    save_repaired,
    weights_digest,
    write_adapter_config,
)
from hftlight.engine.weights.shards import Share, reshard, share
from hftlight.engine.weights.stored import (
    Adapted,
    Difference,
    FileWeights,
    ModelWeights,
    Weights,
    displacement,
    plain_name,
    stored,
    stored_updates,
)
from hftlight.engine.weights.subject import Subject

__all__ = [
    "MARKER",
    "Adapted",
    "Difference",
    "FileWeights",
    "LoraUpdate",
    "LowRank",
    "ModelWeights",
    "Repair",
    "Share",
    "Subject",
    "Weights",
    "check_layout",
    "check_output",
    "combined",
    "displacement",
    "linear_weights",
    "lora_updates",
    "plain_name",
    "repaired_state",
    "repairs_of",
    "save_repaired",
    "share",
    "stored",
    "stored_updates",
    "write_adapter_config",
]


TRAINED: Mapping[str, str] = {"unaligned": "harmful"}  # models that a run trains for repairs, and on which stream


def repairs_after(defenses: Iterable[Defense]) -> "list[Repair]":
    """Return the repairs of a fine-tuned model: first what other defenses deploy, then the repairs of the list."""
    deployed = [d.deployment() for d in defenses]
    return [*(d for d in deployed if d is not None), *(d for d in defenses if isinstance(d, Repair))]


def to_train(repairs: "Iterable[Repair]") -> list[str]:
    """Return the names of the models that repairs need and that their arguments do not name, out of ``TRAINED``."""
    needed = {need for repair in repairs for need in repair.needs if getattr(repair, need) is None}
    return [name for name in TRAINED if name in needed]


def check_layout(model: nn.Module, who: str, way: str = "") -> None:
    """Refuse a model with linear layers that are stored transposed (Conv1D).

    Under an adapter, only the adapted layers are checked.

    Args:
        model: a causal LM, with or without an adapter.
        who: name of the repair, for the error.
        way: remedy, for the end of the error.

    Raises:
        TypeError: with the name of the first such layer.
    """
    from transformers.pytorch_utils import Conv1D

    names: list[str]
    if has_adapter(model):
        names = [name for name, u in lora_updates(model).items() if getattr(u.layer, "fan_in_fan_out", False)]
    else:
        names = [f"{plain_name(name)}.weight" for name, m in model.named_modules() if isinstance(m, Conv1D)]
    if names:
        raise TypeError(f"{who}: {names[0]} is stored transposed (Conv1D, as in GPT-2), which is not supported{way}.")


def linear_weights(model: Any) -> dict[str, nn.Parameter]:
    """Return the weight matrices of a model's linear layers by plain name.

    The output layer and the embeddings are left out. Layers are selected by module type, not by name, so biases are
    never included. Conv1D layers, which store their matrix transposed, are left out too; ``check_layout`` refuses
    models that have such layers.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weights: dict[str, nn.Parameter] = {}
    ids: set[int] = set()  # a tied weight is listed once
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        if isinstance(module, nn.Linear) and module is not head and id(weight) not in ids and ".lora_" not in name:
            ids.add(id(weight))
            weights[f"{plain_name(name)}.weight"] = weight
    return weights


def check_output(repair: "Repair") -> None:
    """Refuse an ``output`` that holds anything but a repaired model.

    Raises:
        ValueError: naming the folder.
    """
    folder = Path(repair.output or "")
    if folder.exists() and (folder.is_file() or any(folder.iterdir())) and not (folder / MARKER).is_file():
        raise ValueError(
            f"{type(repair).__name__}: output {repair.output!r} holds something that is no repaired model; choose"
            " another folder."
        )


class Repair(Defense):
    """A defense of the weights slot: a function from a fine-tuned model to a repaired model.

    A subclass implements ``edit(subject)``. ``run()`` and plain code call ``apply(subject)``. On a user's own Trainer,
    the repair runs at the end of training, after ``ModelCheckpoint`` has written its last checkpoint. No checkpoint
    therefore holds repaired weights. The repair writes the repaired model into ``output``, and the model in memory
    stays repaired.

    Attributes:
        needs: names of the other models that ``edit`` reads: ``"aligned"``, ``"base"``, ``"unaligned"``. An instance
            sets ``needs`` if its modes change it.
        dials: names of the arguments that change the edit, but not what ``scored`` returns, such as a strength. Runs
            that differ in these arguments alone share the scores.
        trains: optimizer steps that ``scored`` takes, on one batch each, for the progress and the plan of a run.
        adds_parameters: whether the repaired model has parameters that the fine-tuned one lacks.
        repair_order: position among the repairs of a list, which overrides the order of the list: projections 0,
            transplants and arithmetic 5, masks 8, pruning 10, rewinding 20, biases 30.

    Args:
        streams: as for ``Defense``.
        output: folder for the repaired model on a user's own Trainer; ``run()`` chooses its own folder.
        aligned: the aligned model, a folder or hub id, for a user's own Trainer with all parameters trained. Under an
            adapter, the model contains the aligned weights already, unless they are quantized.
        base: the model before its alignment, likewise.
        unaligned: a model without safety, likewise. A run trains it itself.
    """

    stage, slots = Stage.POST_FINETUNING, (Slot.WEIGHTS,)
    needs: tuple[str, ...] = ()
    dials: tuple[str, ...] = ()
    trains: int = 0
    adds_parameters: bool = False
    repair_order: int = 0

    def __init__(
        self,
        streams: Mapping[str, Loader] | None = None,
        output: str | None = None,
        aligned: str | None = None,
        base: str | None = None,
        unaligned: str | None = None,
    ) -> None:
        super().__init__(streams)
        self.output, self.aligned, self.base, self.unaligned = output, aligned, base, unaligned
        self.applied, self.input_digest = False, ""
        self.report: dict[str, Any] = {}
        self._trained = False

    @property
    def neutral(self) -> bool:
        """Whether the arguments ask for no change."""
        return False

    def scored(self, subject: Subject) -> dict[str, Tensor]:
        """Return what the edit needs to know about the weights and data, by name.

        ``apply`` calls it before ``edit`` and stores the result in ``subject.scores``. It must leave the model
        unchanged, and must not depend on the arguments in ``dials``.
        """
        return {}

    def edit(self, subject: Subject) -> None:
        """Change ``subject.model`` in place and fill ``subject.report``.

        ``apply`` calls it once, in eval mode and without autograd. It must set ``report["changed_entries"]`` to the
        number of weight entries that changed, over all ranks. If the number is 0 for a reason that lies in the method,
        ``report["unchanged_because"]`` must state the reason.
        """
        raise NotImplementedError(f"{type(self).__name__} fills the weights slot and must implement edit().")

    def check_model(self, model: nn.Module) -> None:
        """Refuse a model that ``edit`` cannot work on.

        The weights are not read, so they may be on the meta device.

        Raises:
            TypeError: if it has no layers of the right kind.
            ValueError: if an argument does not fit its layers.
        """

    def apply(self, subject: Subject) -> None:
        """Edit a model once.

        Dropout and autograd are off during the edit; afterwards, training modes and hooks are the same as before. This
        repair's own ``aligned``, ``base`` and ``unaligned`` override those of the subject. The report receives
        ``repair``, ``arguments``, ``input_digest`` and ``output_digest``. Every rank must call this.

        Raises:
            RuntimeError: if this repair was applied to the model before, or changed nothing without a reason.
        """
        who = type(self).__name__
        # The digest after each earlier repair, or "dense" after an edit of the weights under the adapter.
        digests: dict[str, str] = getattr(subject.model, "_repairs", {})
        with _at_rest(subject.model), torch.no_grad():
            before = weights_digest(subject.model)
            if who in subject.applied or (who in digests and digests[who] in ("dense", before)):
                raise RuntimeError(
                    f"{who}: this repair was applied to the model before, and a second application would change the"
                    " model again. Load the fine-tuned model, not the repaired one."
                )
            subject.report |= {"repair": who, "arguments": self.arguments(), "input_digest": before}
            if self.neutral:
                subject.report |= {"changed_entries": 0, "output_digest": before}
                return
            subject.aligned = stored(self.aligned) if self.aligned else subject.aligned
            subject.base = stored(self.base) if self.base else subject.base
            subject.unaligned = stored(self.unaligned) if self.unaligned else subject.unaligned
            subject.scores = subject.kept(self, lambda: self.scored(subject))
            self.edit(subject)
            after = weights_digest(subject.model)
        # The digest covers only the adapter, so an edit of the weights under it (dense) may leave the digest unchanged.
        if subject.report["changed_entries"] == 0 or (after == before and not subject.dense):
            reason = subject.report.get("unchanged_because")
            if not reason:
                raise RuntimeError(
                    f"{who}: the repair changed no weight, although its arguments ask for a change. Check that the"
                    " adapter was trained and is active."
                )
            warnings.warn(f"{who} changed no weight: {reason}", stacklevel=2)
        subject.applied.append(who)
        subject.report["output_digest"] = after
        subject.model._repairs = {**digests, who: "dense" if subject.dense else after}  # type: ignore[assignment]

    @property
    @override
    def state_key(self) -> str:
        return self.key_of({k: v for k, v in self.arguments().items() if k != "output"})

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "applied": self.applied, "input_digest": self.input_digest}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.applied, self.input_digest = state_dict["applied"], state_dict["input_digest"]

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        mine = checkpoint.get("callbacks", {}).get(self.state_key, {"applied": True})
        if trainer.state.fn != TrainerFn.FITTING and not mine["applied"]:
            warnings.warn(
                f"{type(self).__name__}: the checkpoint holds the trained model, not the repaired one. To measure the"
                f" repaired model, leave ckpt_path out, or load {self.output}.",
                stacklevel=2,
            )

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check before the first step that the edit at the end will be possible.

        Raises:
            ValueError: if ``output`` is missing or holds anything but a repaired model, or a needed model is missing.
            TypeError: if the model cannot be saved, or its adapter cannot be repaired.
        """
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self.applied, self.input_digest, self.report, self._trained = False, "", {}, False
        who, model = type(self).__name__, _model_of(pl_module)
        if self.output is None:
            raise ValueError(f"{who}: give output=..., the folder that the repaired model is written to.")
        check_output(self)
        if not hasattr(model, "save_pretrained"):
            raise TypeError(
                f"{who}: the repaired model is written with save_pretrained, which {type(model).__name__} lacks; keep a"
                " Hugging Face model in the attribute 'model' of your LightningModule."
            )
        adapter = has_adapter(model)
        if adapter:
            lora_updates(model)
        for need in self.needs:
            if getattr(self, need) is None and not (need == "aligned" and adapter):
                raise ValueError(f"{who}: give {need}=..., the {need} model as a folder or hub id; it is read by rows.")
            if getattr(self, need) is not None:
                stored(getattr(self, need))
        if not self.neutral:
            self.check_model(model)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trained = True

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # After every ``on_train_end``: callbacks that average weights write the average into the model there, and
        # checkpoints of the trained weights are written there.
        if not self._trained:  # Lightning resumed a finished run, so no training started or ended
            self._refuse_repaired()
            raise RuntimeError(
                f"{type(self).__name__}: the resumed run had ended already, so nothing was trained and the model in"
                f" memory is not repaired. If that run completed, its repaired model is in {self.output}."
            )
        self._refuse_repaired()
        subject = Subject(
            _model_of(pl_module),
            batches=self._batches,
            context=trainer.precision_plugin.forward_context,
            split=True,
            seed=trainer_seed(),
        )
        self.apply(subject)
        self.applied, self.input_digest, self.report = True, subject.report["input_digest"], subject.report
        self.record(changed_entries=subject.report["changed_entries"])
        assert self.output is not None
        save_repaired(Path(self.output), subject)
        trainer.strategy.barrier("repaired model written")

    def _refuse_repaired(self) -> None:
        if self.applied:
            raise RuntimeError(
                f"{type(self).__name__}: training resumed from a checkpoint with weights that this repair has changed"
                " already, and a second application would change them again. Resume from an earlier checkpoint."
            )

    def _batches(self, stream: str) -> Iterator[Any]:
        """Yield this rank's batches of one pass over a side stream.

        The position that ``draw`` counts does not change.
        """
        assert self._trainer is not None
        source: Any = self._sources[stream]()
        for index in range(source.per_pass):
            batch = self._trainer.precision_plugin.convert_input(source.batch(index))
            yield self._trainer.strategy.batch_to_device(batch, dataloader_idx=0)


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """Run the block in eval mode with every weight in its shards, then restore each module's training mode."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    reshard(model)  # a write into gathered weights would be lost
    try:
        yield
    finally:
        reshard(model)
        for module in training:
            module.training = True


def _model_of(pl_module: LightningModule) -> nn.Module:
    model = getattr(pl_module, "model", pl_module)
    return model if isinstance(model, nn.Module) else pl_module
