"""SaLoRA: an adapter that cannot write into the directions of the aligned model's safe answers."""

import base64
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from hftlight.data.records import Record
from hftlight.data.templates import Template
from hftlight.data.tokens import IGNORED
from hftlight.engine import Defense, Slot, Stage
from hftlight.engine.step.activations import hooked
from hftlight.engine.step.defense import Loader
from hftlight.engine.step.vectors import placed, whole
from hftlight.engine.weights.lora import LoraUpdate, has_adapter, lora_updates
from hftlight.engine.weights.lowrank import LowRank
from hftlight.engine.weights.moment import Moment, principal
from hftlight.models.adapters import dense_weight, target_layers
from hftlight.models.load import positions_of
from hftlight.models.row_reader import RowReader, as_found

SMALLEST = 16  # the safety subspace takes at most one of this many output directions
LONGEST = 4096  # tokens of a row beyond which it is left out of the directions
MERGES = ("merge_and_unload", "merge_adapter")


def start_factors(weight: Tensor, task: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    r"""Return the factors B0 ``[out, rank]`` and A0 ``[rank, in]`` of an adapter that starts in the task's subspace.

    With the ``rank`` leading singular triplets :math:`U S Q^T` of W,
    :math:`B_0 = V_t V_t^T U S^{1/2}` and :math:`A_0 = S^{1/2} Q^T`.

    Args:
        weight: W, ``[out, in]``.
        task: V_t, ``[out, directions]``, with orthonormal columns.
        rank: rank of the adapter, >= 1.
    """
    u, s, v = principal(weight, rank)
    root = s.sqrt()
    return task @ (task.T @ u) * root, root[:, None] * v.T


def exported(start: LowRank, trained: LowRank, kept: LowRank | None, subspace: Tensor) -> LowRank:
    r"""Return the update :math:`s [B_1 A_1 + C (B A - B_0 A_0)]` with :math:`C = I - V V^T` as one low-rank matrix.

    Its rank is twice that of the adapter: :math:`[C B, B_1 - C B_0] [A; A_0]`, since a kept adapter starts from its own
    values.

    Args:
        start: B0 and A0, with the scale s of the adapter.
        trained: B and A, likewise.
        kept: B1 and A1 of an adapter that is trained further, equal to ``start``; None for a new adapter.
        subspace: V, ``[out, directions]``, with orthonormal columns.
    """

    def outside(b: Tensor) -> Tensor:
        return b - subspace @ (subspace.T @ b)

    left_over = (kept.b if kept is not None else 0) - outside(start.b)
    return LowRank(torch.cat([outside(trained.b), left_over], 1), torch.cat([trained.a, start.a]), trained.scale)


@dataclass
class _Layer:
    """One adapted layer while it trains.

    Attributes:
        update: the layer's adapter.
        subspace: V, ``[out, directions]``.
        b: B0, ``[out, rank]``.
        a: A0, ``[rank, in]``.
        kept: whether the adapter had values of its own.
        input: input of the adapter in the current pass.
    """

    update: LoraUpdate
    subspace: Tensor
    b: Tensor
    a: Tensor
    kept: bool
    input: Tensor | None = None

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """B and A as they are trained. Sharding replaces the parameters that ``update`` holds."""
        layer, name = self.update.layer, self.update.adapter
        return layer.lora_B[name].weight, layer.lora_A[name].weight

    def remember(self, _: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
        """Keep the adapter's input for ``project`` (forward hook of A)."""
        self.input = inputs[0]

    def project(self, _: nn.Module, __: Any, output: Tensor) -> Tensor:
        """Return the adapter's output outside of the subspace, without that of the start (forward hook of B)."""
        x, self.input = self.input, None
        assert x is not None
        start = F.linear(F.linear(x, self.a.to(x)), self.b.to(x))
        change = output - start
        subspace = self.subspace.to(x)
        change = change - F.linear(F.linear(change, subspace.T), subspace)
        return start + change if self.kept else change


class SaLoRA(Defense):
    r"""Fix a projection behind each adapted layer that keeps the adapter out of the safety directions.

    Let V hold the leading directions of a layer's outputs at the response tokens of harmful prompts with safe answers,
    and :math:`C = I - V V^T`. With LoRA's scale s, the layer computes

    .. math:: y = W x + s\, C (B A - B_0 A_0) x

    so that :math:`V^T y = V^T W x` holds at every time, and the model starts as the aligned model. A and B start from
    :math:`A_0, B_0`, which lie in the leading directions of W within those of the task's outputs. An adapter that is
    trained further keeps its own values as :math:`A_0, B_0`, and the layer adds :math:`s B_0 A_0 x`.

    Args:
        safety_rank: directions in V, >= 0; at most a sixteenth of the layer's outputs. 0 projects nothing.
        task_rank: directions of the task's outputs, >= 1.
        samples: rows of either stream that the directions are computed from, >= 1.
        task: stream that stands for the task: ``"task"`` is the upload itself, ``"ordinary"`` the defender's own
            ordinary rows.
        init: ``"task"`` as above, or ``"fresh"`` for LoRA's own start, with B = 0.
        streams: as for ``Defense``; unused, since ``select`` gets its rows.

    Raises:
        ValueError: if an argument is out of range, or a selection is missing or belongs to another adapter.
        TypeError: if the model has no plain LoRA adapter.

    Cost: no extra pass. Per step two products of the adapter's rank more, and two with V. Memory holds V, A0 and B0.
        Before the stage, one pass over the rows, and one SVD per layer.
    Source: Li et al., "SaLoRA: Safety-Alignment Preserved Low-Rank Adaptation", ICLR 2025, arXiv:2501.01765; official
        code homles11/SaLoRA: rank and alpha 16, 128 pairs, 32 directions each, learning rate 1e-4, no weight decay.
    Differs: directions come from the intact model. The official second pass reads a network that the first one has
        changed. The base stays as it is; the official code subtracts :math:`C B_0 A_0` from it, and ignores the scale.
        Both are the same function. C is applied as :math:`z - V (V^T z)` and never formed. Only response tokens are
        trained; the official code trains all tokens of blocks. The safety rank shrinks with the layer's outputs, for
        keys and values of grouped heads. Weight decay is off, since it would pull A and B to 0, away from the aligned
        model. After training the adapter in memory becomes a plain LoRA adapter of rank 2 r.
    """

    stage, slots = Stage.FINETUNING, (Slot.ADAPTER,)
    streams: tuple[str, ...] = ("alignment",)
    # Behind the projection a frozen row of B is no frozen row of the update.
    claims = ("parameter groups", "rows of the adapter", "units of the adapter")
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"safety_rank": 32, "task_rank": 32, "samples": 128, "init": "task"}
    }

    def __init__(
        self,
        safety_rank: int = 32,
        task_rank: int = 32,
        samples: int = 128,
        task: Literal["task", "ordinary"] = "task",
        init: Literal["task", "fresh"] = "task",
        streams: Mapping[str, Loader] | None = None,
    ) -> None:
        for name, value, least in (
            ("safety_rank", safety_rank, 0),
            ("task_rank", task_rank, 1),
            ("samples", samples, 1),
        ):
            if not (isinstance(value, int) and value >= least):
                raise ValueError(f"SaLoRA: {name} must be a whole number >= {least}, got {value}.")
        if task not in ("task", "ordinary"):
            raise ValueError(f"SaLoRA: task must be 'task' or 'ordinary', got {task!r}.")
        if init not in ("task", "fresh"):
            raise ValueError(f"SaLoRA: init must be 'task' or 'fresh', got {init!r}.")
        if task == "ordinary":
            self.streams = ("alignment", "ordinary")
        super().__init__(streams)
        self.safety_rank, self.task_rank, self.samples, self.task, self.init = (
            safety_rank,
            task_rank,
            samples,
            task,
            init,
        )
        self.selects = safety_rank > 0 or init == "task"
        self._layers: dict[str, _Layer] = {}
        self._handles: list[RemovableHandle] = []
        self._module: Any = None
        self._resumed = False

    @override
    def selecting(self, records: Mapping[str, Sequence[Record]]) -> int:
        """Return the number of rows that directions are computed from."""
        return sum(min(self.samples, len(records[name])) for name in ("alignment", self.task))

    @override
    def select(
        self,
        model: Any,
        tokenizer: Any,
        template: Template,
        records: Mapping[str, Sequence[Record]],
        system: str | None = None,
        batch_size: int = 8,
        seed: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> list[dict[str, Any]]:
        """Compute the directions of each layer that the adapter will adapt, on the model as it is.

        Arguments are as for ``Defense.select``. The attribute ``adapter`` must hold the settings of the adapter.

        Returns:
            One dictionary per layer: its name, the number of tokens of either kind, and V, B0 and A0 as text.

        Raises:
            RuntimeError: if ``adapter`` is not set.
        """
        if self.adapter is None:
            raise RuntimeError(
                "SaLoRA: the adapter is not known. Set defense.adapter to the adapter's hftlight.config.Lora before"
                " select()."
            )
        layers = target_layers(model, self.adapter.targets)
        sizes = {name: out_features(layer) for name, layer in layers.items()}
        ranks = {name: min(self.safety_rank, max(1, size // SMALLEST)) for name, size in sizes.items()}
        longest = min(LONGEST, positions_of(model.config) or LONGEST)
        reader = RowReader(model, tokenizer, template, system, longest, batch_size)
        safety = {name: Moment(size, ranks[name], seed) for name, size in sizes.items()}
        task = {name: Moment(size, self.task_rank, seed) for name, size in sizes.items()}
        done = 0
        for stream, moments in (("alignment", safety), (self.task, task)):
            rows = list(records[stream])
            if len(rows) > self.samples:
                rows = random.Random(f"{seed}/sa_lora/{stream}").sample(rows, self.samples)
            for batch in reader.batches(rows):
                _add_outputs(model, layers, batch, moments)
                done += len(batch["labels"])
                if progress is not None:
                    progress(done)
        self.selected = []
        for name, layer in layers.items():
            # A row holds plain values only, so that a selection is a file that anyone can read.
            row = {"layer": name, "safety_tokens": safety[name].vectors, "task_tokens": task[name].vectors}
            row["subspace"] = as_text(safety[name].directions()[:, : ranks[name]])
            if self.init == "task":
                weight = dense_weight(layer)
                b, a = start_factors(weight, task[name].directions().to(weight), self.adapter.r)
                row |= {"b": as_text(b), "a": as_text(a)}
            self.selected.append(row)
        return self.selected

    @override
    def check_model(self, model: Any) -> None:
        if self.selects:
            self._updates(model)

    @staticmethod
    def _updates(model: Any) -> dict[str, LoraUpdate]:
        """Return the adapted layers.

        Raises:
            TypeError: if the model has no plain LoRA adapter.
        """
        if not has_adapter(model):
            raise TypeError("SaLoRA: the model has no adapter to project; use --tuning lora or qlora.")
        try:
            return lora_updates(model)
        except TypeError as error:
            raise TypeError(f"SaLoRA: {error}") from error

    @override
    def build(self, module: Any) -> None:
        if not self.selects:
            return
        model = module.model
        updates = self._updates(model)
        if self.selected is None:
            raise RuntimeError(
                "SaLoRA: the directions are not computed yet. Call select(model, tokenizer, template, records) before"
                " fit()."
            )
        rows = {row["layer"]: row for row in self.selected}
        kept = any(bool(u.b.detach().any()) for u in updates.values())
        self._layers, self._module, self._resumed = {}, module, False
        for name, update in updates.items():
            row = rows.get(name.removesuffix(".weight"))
            shape = (len(update.b), -1)
            if row is None or len(subspace := from_text(row["subspace"])) % shape[0]:
                raise ValueError(
                    f"SaLoRA: the selection has no directions for {name} with {shape[0]} outputs; it belongs to another"
                    " adapter. Call select() with the adapter's own settings."
                )
            b, a = update.b.detach().clone(), update.a.detach().clone()
            if not kept and self.init == "task":
                b, a = (from_text(row[key]).view(p.shape).to(p) for key, p in (("b", b), ("a", a)))
            layer = _Layer(update, subspace.view(shape).to(b), b, a, kept)
            self._layers[name] = layer
            self._handles += [
                update.layer.lora_A[update.adapter].register_forward_hook(layer.remember),
                update.layer.lora_B[update.adapter].register_forward_hook(layer.project),
            ]
        self.record(layers=len(self._layers), directions=sum(la.subspace.shape[1] for la in self._layers.values()))
        module.parameter_groups = lambda named: [{"params": [*named.values()], "weight_decay": 0.0}]
        for name in MERGES:
            setattr(model, name, _refuse_merge)

    @override
    def unbuild(self, module: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._module is not None:
            module.parameter_groups = None
            for name in MERGES:
                delattr(module.model, name)
        self._layers, self._module = {}, None

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._resumed = state_dict["started"]

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "started": self._resumed}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The adapter gets its values here and not in ``build``: until then its B is 0, which tells other defenses that
        # the aligned model is the model without it.
        names = {id(p): name for name, p in pl_module.named_parameters()}
        for layer in self._layers.values():
            device = layer.factors[0].device
            layer.subspace, layer.b, layer.a = (t.to(device) for t in (layer.subspace, layer.b, layer.a))
            if self._resumed or layer.kept:
                continue
            with torch.no_grad():
                for p, start in zip(layer.factors, (layer.b, layer.a), strict=True):
                    p.copy_(placed({names[id(p)]: start}, pl_module)[names[id(p)]])
        self._resumed = True

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        layers = list(self._layers.values()) if self._trainer is not None else []
        super().teardown(trainer, pl_module, stage)  # first, so that no hook is left on the old factors
        for layer in layers:
            _make_plain(layer)
        if layers:
            _double_rank(pl_module.model, layers[0].update)


def out_features(layer: nn.Module) -> int:
    """Return the number of outputs of a linear layer, stored transposed (Conv1D) or not, with an adapter or not."""
    base: Any = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer  # type: ignore[operator]
    return int(getattr(base, "nf", None) or base.out_features)


def as_text(matrix: Tensor) -> str:
    """Return the entries of a matrix as base64 text of little-endian float32."""
    return base64.b64encode(matrix.detach().cpu().float().numpy().astype("<f4").tobytes()).decode()


def from_text(text: str) -> Tensor:
    """Return the entries that ``as_text`` has written, flat, float32."""
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float32))


def _add_outputs(
    model: nn.Module, layers: Mapping[str, nn.Module], batch: Mapping[str, Any], moments: Mapping[str, Moment]
) -> None:
    """Add each layer's outputs at the response tokens of a batch to its moment."""
    answers = (batch["labels"] != IGNORED).flatten()

    def add(name: str, output: Tensor) -> None:
        moments[name].add(output.flatten(0, -2)[answers])

    with torch.no_grad(), as_found(model), hooked(layers, add):
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)


def _refuse_merge(*_: Any, **__: Any) -> None:
    raise RuntimeError(
        "SaLoRA: PEFT cannot merge this adapter while it trains, since a merge ignores its projection. Merge after"
        " fit(), when it is a plain adapter."
    )


def _make_plain(layer: _Layer) -> None:
    """Replace the layer's factors by those of ``exported``, so that the plain layer computes the same."""
    update, name = layer.update, layer.update.adapter
    start = LowRank(layer.b, layer.a, update.scale)
    b, a = layer.factors
    trained = LowRank(whole(b.detach()), whole(a.detach()), update.scale)
    result = exported(start, trained, start if layer.kept else None, layer.subspace)
    for place, factor, old in ((update.layer.lora_A, result.a, a), (update.layer.lora_B, result.b, b)):
        linear = nn.Linear(factor.shape[1], factor.shape[0], bias=False, device=old.device, dtype=old.dtype)
        with torch.no_grad():
            linear.weight.copy_(factor)
        linear.weight.requires_grad_(old.requires_grad)
        place[name] = linear.train(place[name].training)
    update.layer.r[name] = len(result.a)
    update.layer.lora_alpha[name] = update.scale * len(result.a)  # so that the scale stays


def _double_rank(model: Any, update: LoraUpdate) -> None:
    """Write the doubled rank into PEFT's settings of the adapter, with an alpha that keeps the scale."""
    settings = model.peft_config[update.adapter]
    settings.r, settings.lora_alpha, settings.use_rslora = 2 * settings.r, 2 * settings.r * update.scale, False
