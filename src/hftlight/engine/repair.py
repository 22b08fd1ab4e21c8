"""Repair: a defense that edits finished weights, once, in memory, and leaves an artifact of its own."""

import copy
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from typing_extensions import override

from hftlight.engine.defense import Defense, Loader
from hftlight.engine.lowrank import LowRank, combined
from hftlight.engine.order import rank_and_world
from hftlight.engine.shards import Share, reshard, share
from hftlight.engine.slots import Slot, Stage
from hftlight.engine.vectors import local, whole
from hftlight.engine.weights import (
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
from hftlight.files import new_folder, write_json

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

MARKER = "repair.json"


def no_batches(stream: str) -> Iterator[Any]:
    """Refuse to give batches.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(f"This repair reads the stream {stream!r}, and none was given.")


@dataclass
class Subject:
    """One fine-tuned model on the table.

    Attributes:
        model: what is edited in place: a causal LM with all parameters trained, or a PEFT model around the aligned
            model whose one active adapter is exactly the user's update.
        aligned: the aligned model, where the user's fine-tuning started; None where only the PEFT model itself holds
            it.
        base: the model before its alignment; None where it is not known, or ``aligned`` is ``Adapted`` and so holds it.
        batches: gives all batches of a stream once, on the model's device; the same number on every rank.
        report: what was done, for the manifest: plain numbers, texts, lists and dictionaries.
        applied: names of the repairs that were applied to this model before; none is applied twice.
        context: what a forward pass runs in, such as autocast.
        split: whether each rank's batches are a share of the stream, so that sums over them are added up over ranks.
        dense: set by an edit that wrote into the weights under the adapter, and left the adapter zero: the artifact is
            a whole model then.
    """

    model: nn.Module
    aligned: Weights | None = None
    base: Weights | None = None
    batches: Callable[[str], Iterator[Any]] = no_batches
    report: dict[str, Any] = field(default_factory=dict)
    applied: list[str] = field(default_factory=list)
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    split: bool = False
    dense: bool = False

    @property
    def start(self) -> Weights | None:
        """The weights that the user's fine-tuning started from: ``aligned``, or those under the adapter."""
        return self.aligned or self._under_adapter

    @cached_property
    def _under_adapter(self) -> Weights | None:
        return ModelWeights.of(self.model) if has_adapter(self.model) else None

    def alignment(self, name: str) -> LowRank | Difference | None:
        """Return what the alignment moved in one weight; None where it did not.

        Raises:
            RuntimeError: if the base model is not known.
            ValueError: if one of the two models lacks the weight, or the shapes differ.
        """
        start = self.start
        base = self.base or (start.under if isinstance(start, Adapted) else None)
        if start is None or base is None:
            raise RuntimeError("The alignment displacement needs the aligned and the base model.")
        return displacement(start, base, name)


@dataclass(frozen=True)
class LoraUpdate:
    """One adapted layer's part of the user's update, ``scale * B A``; writing into the parameters edits the model.

    Attributes:
        name: plain name of the weight it adds to, such as ``model.layers.0.self_attn.q_proj.weight``.
        layer: the LoRA layer.
        a: A, ``[rank, in]``.
        b: B, ``[out, rank]``.
        scale: as the layer uses it, rank-stabilized or not.
        weight: the frozen weight under the adapter; packed where it is quantized.
        adapter: the adapter's name.
    """

    name: str
    layer: Any
    a: nn.Parameter
    b: nn.Parameter
    scale: float
    weight: Tensor
    adapter: str = "default"

    def factors(self) -> LowRank:
        """Return the update with whole factors; under sharding these thin matrices are gathered."""
        return LowRank(whole(self.b.detach()), whole(self.a.detach()), self.scale)


def has_adapter(model: nn.Module) -> bool:
    """Tell whether a model is wrapped by PEFT."""
    return hasattr(model, "peft_config")


def lora_updates(model: nn.Module) -> dict[str, LoraUpdate]:
    """Return the adapted layers of a PEFT model by the plain name of their weight.

    Raises:
        TypeError: if the adapter is anything but plain LoRA on linear layers: another method, several active adapters,
            DoRA or another variant, adapted embeddings, trained biases or modules, or one that is merged or off.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found: dict[str, LoraUpdate] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, AuxiliaryTrainingWrapper):
            raise TypeError(_unfit(name, "it is trained as a whole module (modules_to_save)"))
        if not isinstance(layer, BaseTunerLayer):
            continue
        if not isinstance(layer, LoraLayer):
            raise TypeError(_unfit(name, f"its adapter is {type(layer).__name__}"))
        if layer.merged or layer.disable_adapters:
            raise TypeError(_unfit(name, "its adapter is merged or off"))
        active = [a for a in layer.active_adapters if a in layer.lora_A or a in layer.lora_embedding_A]
        if len(active) > 1:
            raise TypeError(_unfit(name, f"several adapters are active, {active}"))
        if not active:
            continue
        adapter = active[0]
        if adapter in layer.lora_embedding_A or not isinstance(layer.lora_A[adapter], nn.Linear):
            raise TypeError(_unfit(name, f"it is no linear layer ({type(layer.get_base_layer()).__name__})"))
        if adapter in layer.lora_variant or layer.use_dora.get(adapter):
            raise TypeError(_unfit(name, f"its adapter is a variant, {layer.lora_variant.get(adapter) or 'DoRA'}"))
        if layer.lora_A[adapter].bias is not None or layer.lora_B[adapter].bias is not None:
            raise TypeError(_unfit(name, "its adapter has a bias"))
        weight = f"{plain_name(name)}.weight"
        found[weight] = LoraUpdate(
            weight,
            layer,
            layer.lora_A[adapter].weight,
            layer.lora_B[adapter].weight,
            float(layer.scaling[adapter]),
            layer.get_base_layer().weight,
            adapter,
        )
    if not found:
        raise TypeError("No layer of this PEFT model has an active LoRA adapter.")
    return found


def _unfit(name: str, why: str) -> str:
    return (
        f"{plain_name(name)}: {why}; a repair takes one plain LoRA adapter on linear layers. Merge it into the model"
        " and repair all parameters instead."
    )


def check_layout(model: nn.Module, who: str, way: str = "") -> None:
    """Refuse a model whose adapted or, without an adapter, whose linear layers are stored transposed (Conv1D).

    Args:
        model: a causal LM, with or without an adapter.
        who: the repair that asks.
        way: what to do instead, for the error.

    Raises:
        TypeError: naming the first such layer.
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
    """Return the matrices of a model's linear layers by plain name; the output layer and embeddings stay out.

    They are found by the type of their module, not by name, so biases never get in. Conv1D layers, which store their
    matrix transposed, are not among them; ``check_layout`` refuses models that have such layers.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        if isinstance(module, nn.Linear) and module is not head and id(weight) not in seen and ".lora_" not in name:
            seen.add(id(weight))
            found[f"{plain_name(name)}.weight"] = weight
    return found


class Repair(Defense):
    """A defense of the weights slot: a function from one fine-tuned model to a repaired one.

    A subclass implements ``edit(subject)``. ``run()`` and plain code call ``apply(subject)``; on a user's own Trainer
    it runs at the end of training, after ``ModelCheckpoint`` has written what it writes then, so that no checkpoint
    holds repaired weights. There it writes an artifact of its own into ``output`` and leaves the model in memory
    repaired.

    Attributes:
        needs: which other models ``edit`` reads: ``"aligned"``, ``"base"``; set by the instance where modes change it.
        repair_order: repairs of a list act in this order, whatever the list says: projections 0, pruning 10.

    Args:
        streams: as ``Defense`` takes them.
        output: folder for the repaired model, on a Trainer of one's own; ``run()`` has its own place.
        aligned: the aligned model, a folder or hub id, for models with all parameters trained, on a Trainer of one's
            own; under an adapter the aligned weights are in the model already, unless they are quantized.
        base: the model before its alignment, likewise.
    """

    stage, slots = Stage.POST_FINETUNING, (Slot.WEIGHTS,)
    needs: tuple[str, ...] = ()
    repair_order: int = 0

    def __init__(
        self,
        streams: Mapping[str, Loader] | None = None,
        output: str | None = None,
        aligned: str | None = None,
        base: str | None = None,
    ) -> None:
        super().__init__(streams)
        self.output, self.aligned, self.base = output, aligned, base
        self.applied, self.input_digest = False, ""
        self.report: dict[str, Any] = {}
        self._trained = False

    @property
    def neutral(self) -> bool:
        """Whether the arguments ask for no change at all."""
        return False

    def edit(self, subject: Subject) -> None:
        """Change ``subject.model`` in place and fill ``subject.report``; called once, in eval mode, without autograd.

        It must set ``report["changed_entries"]``, the number of entries of weights that differ now, over all ranks;
        where that is 0 for a reason that lies in the method, ``report["unchanged_because"]`` says it.
        """
        raise NotImplementedError(f"{type(self).__name__} fills the weights slot and must implement edit().")

    def check_model(self, model: nn.Module) -> None:
        """Refuse a model that ``edit`` could not work on; its weights are not read, and may be on the meta device.

        Raises:
            TypeError: if it has no layers of the right kind.
            ValueError: if an argument does not fit its layers.
        """

    def apply(self, subject: Subject) -> None:
        """Edit a model once: dropout off, no autograd, training modes and hooks as found afterwards.

        A model named by this repair's own ``aligned`` or ``base`` comes before the subject's. Adds ``repair``,
        ``arguments``, ``input_digest`` and ``output_digest`` to the report. Every rank must call.

        Raises:
            RuntimeError: if this repair was applied to the model before, or changed nothing without a reason.
        """
        who = type(self).__name__
        kept: dict[str, str] = getattr(subject.model, "_repairs", {})
        with _at_rest(subject.model), torch.no_grad():
            before = weights_digest(subject.model)
            if who in subject.applied or (who in kept and kept[who] in ("dense", before)):
                raise RuntimeError(
                    f"{who}: it was applied to this model before, and a second application would change it again. Load"
                    " the fine-tuned model, not the repaired one."
                )
            subject.report |= {"repair": who, "arguments": self.arguments(), "input_digest": before}
            if self.neutral:
                subject.report |= {"changed_entries": 0, "output_digest": before}
                return
            subject.aligned = stored(self.aligned) if self.aligned else subject.aligned
            subject.base = stored(self.base) if self.base else subject.base
            self.edit(subject)
            after = weights_digest(subject.model)
        if subject.report["changed_entries"] == 0 or (after == before and not subject.dense):
            reason = subject.report.get("unchanged_because")
            if not reason:
                raise RuntimeError(
                    f"{who}: it changed no weight, though it was asked to. Was the adapter trained, and is it active?"
                )
            warnings.warn(f"{who} changed no weight: {reason}", stacklevel=2)
        subject.applied.append(who)
        subject.report["output_digest"] = after
        subject.model._repairs = {**kept, who: "dense" if subject.dense else after}  # type: ignore[assignment]

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
                f"{type(self).__name__}: the checkpoint holds the model as it was trained, not repaired; to measure the"
                f" repaired one, leave ckpt_path out, or load {self.output}.",
                stacklevel=2,
            )

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check before the first step that the edit at the end will be possible.

        Raises:
            ValueError: if ``output`` is missing or holds something else, or a model that is needed was not given.
            TypeError: if the model cannot be saved, or its adapter cannot be repaired.
        """
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self.applied, self.input_digest, self.report, self._trained = False, "", {}, False
        who, model = type(self).__name__, _model_of(pl_module)
        if self.output is None:
            raise ValueError(f"{who}: give output=..., the folder that the repaired model is written to.")
        folder = Path(self.output)
        if folder.exists() and (folder.is_file() or any(folder.iterdir())) and not (folder / MARKER).is_file():
            raise ValueError(f"{who}: output {self.output!r} holds something that is no repaired model; name another.")
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

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trained = True

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._refuse_repaired()
        for callback in trainer.checkpoint_callbacks:
            callback.on_train_end(trainer, pl_module)  # what they write now must be what was trained
        subject = Subject(
            _model_of(pl_module),
            batches=self._batches,
            context=trainer.precision_plugin.forward_context,
            split=True,
        )
        self.apply(subject)
        self.applied, self.input_digest, self.report = True, subject.report["input_digest"], subject.report
        self.record(changed_entries=subject.report["changed_entries"])
        assert self.output is not None
        save_repaired(Path(self.output), subject)
        trainer.strategy.barrier("repaired model written")

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._trained:  # Lightning resumed a finished run, and so never came to the end of training
            self._refuse_repaired()
            raise RuntimeError(
                f"{type(self).__name__}: the run that was resumed had ended, so nothing was trained and the model in"
                f" memory is not repaired. The repaired model of that run is in {self.output}, if it came to its end."
            )

    def _refuse_repaired(self) -> None:
        if self.applied:
            raise RuntimeError(
                f"{type(self).__name__}: the checkpoint that training resumed from holds weights that it has repaired"
                " already, and a second application would change them again; resume from an earlier one."
            )

    def _batches(self, stream: str) -> Iterator[Any]:
        """Yield this rank's batches of one pass over a side stream; the stream's own position stays."""
        assert self._trainer is not None
        source: Any = self._sources[stream]()
        for index in range(source.per_pass):
            batch = self._trainer.precision_plugin.convert_input(source.batch(index))
            yield self._trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def repaired_state(subject: Subject) -> dict[str, Tensor]:
    """Return a repaired model's weights on the CPU of the first rank: the adapter, or all by their plain names.

    Sharded weights are gathered one at a time, so every rank must call; on the other ranks the result is empty.
    """
    model: Any = subject.model
    adapter, first = _thin(subject), rank_and_world()[0] == 0
    inner = model.get_base_model() if has_adapter(model) else model
    state: dict[str, Tensor] = {}
    copies: dict[Any, Tensor] = {}  # tied weights stay one tensor
    for name, tensor in (model if adapter else inner).state_dict().items():
        if (".lora_" in name) == adapter:
            full = whole(tensor.detach())
            if first:
                copy = copies.setdefault((local(tensor).data_ptr() or id(tensor), tensor.shape), full.cpu())
                state[name if adapter else plain_name(name)] = copy
    return state


def _thin(subject: Subject) -> bool:
    """Tell whether all of the user's update is still in an adapter."""
    return has_adapter(subject.model) and not subject.dense


def save_repaired(folder: Path, subject: Subject) -> None:
    """Write a repaired model as plain transformers or PEFT load it, with ``repair.json`` beside; every rank must call.

    Sharded weights are gathered one at a time, onto the CPU of the first rank.

    Args:
        folder: replaced if it is there.
        subject: after ``apply``.
    """
    state = repaired_state(subject)
    if rank_and_world()[0] != 0:
        return
    model: Any = subject.model
    folder.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(folder) as place:
        if _thin(subject):
            _save_adapter(place, model, state)
        else:
            (model.get_base_model() if has_adapter(model) else model).save_pretrained(place, state_dict=state)
        write_json(place / MARKER, {"applied": subject.applied, **subject.report})


def write_adapter_config(settings: Any, folder: Path) -> None:
    """Write PEFT's configuration of an adapter, with sets sorted: their order differs between processes."""
    settings = copy.deepcopy(settings)
    for name, value in vars(settings).items():
        if isinstance(value, set):
            setattr(settings, name, sorted(value))
    settings.save_pretrained(str(folder))


def _save_adapter(folder: Path, model: Any, state: dict[str, Tensor]) -> None:
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    (adapter,) = model.active_adapters
    settings = copy.deepcopy(model.peft_config[adapter])
    settings.inference_mode = True
    write_adapter_config(settings, folder)
    kept = get_peft_model_state_dict(model, state_dict=state, adapter_name=adapter, save_embedding_layers=False)
    save_file({name: t.contiguous() for name, t in kept.items()}, folder / "adapter_model.safetensors")


def repairs_of(folder: Path) -> list[str]:
    """Return the names of the repairs that made the model of a folder, for ``Subject.applied``."""
    path = folder / MARKER
    return json.loads(path.read_text(encoding="utf-8"))["applied"] if path.is_file() else []


def weights_digest(model: nn.Module) -> str:
    """Return 16 hexadecimal digits that name what a repair may change: the active adapter, or all parameters.

    Sharded weights are hashed where they are, so the digest depends on how many ranks there are.
    """
    total = hashlib.sha256()
    adapter = has_adapter(model)
    for name, p in model.named_parameters():
        if not adapter or ".lora_" in name:
            # A copy: numpy pins what it looks at, and sharding could not free it.
            data = local(p.detach()).cpu().clone(memory_format=torch.contiguous_format).flatten()
            total.update(f"{plain_name(name)} {p.dtype} {tuple(p.shape)}".encode())
            total.update(data.view(torch.uint8).numpy().data)
    if rank_and_world()[1] > 1 and any(share(p).group is not None for p in model.parameters()):
        parts: list[Any] = [None] * rank_and_world()[1]
        dist.all_gather_object(parts, total.hexdigest())
        total = hashlib.sha256("".join(parts).encode())
    return total.hexdigest()[:16]


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """Run the block in eval mode with every weight in its shards; afterwards each module is in the mode it was in."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    reshard(model)
    try:
        yield
    finally:
        reshard(model)
        for module in training:
            module.training = True


def _model_of(pl_module: LightningModule) -> nn.Module:
    model = getattr(pl_module, "model", pl_module)
    return model if isinstance(model, nn.Module) else pl_module
