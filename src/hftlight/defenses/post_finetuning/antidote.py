"""Antidote: after the user's fine-tuning, prune the entries that are most active on harmful data."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from hftlight.engine.step.defense import Loader
from hftlight.engine.step.vectors import local, whole
from hftlight.engine.weights.inputs import input_squares
from hftlight.engine.weights.lora import LoraUpdate, has_adapter, lora_updates
from hftlight.engine.weights.repair import Repair, check_layout, linear_weights
from hftlight.engine.weights.scores import wanda_scores
from hftlight.engine.weights.shards import Share, share
from hftlight.engine.weights.stored import Weights, plain_name
from hftlight.engine.weights.subject import Subject
from hftlight.engine.weights.top_k import Top, top_of_rows
from hftlight.models.repaired import repair_model

T = TypeVar("T")
BLOCK = 1024  # rows scored at one time
SAMPLES = "samples"  # name of the number of samples among the scores


@dataclass
class _Matrix:
    """One matrix whose entries may be reset.

    Attributes:
        name: key of the matrix in the report.
        rows: the rows that this rank holds.
        columns: number of columns.
        device: device of the values.
        squares: n, squared inputs per column, ``[columns]``.
        values: returns the entries of some of this rank's rows, which are scored.
        reset: writes a mask in place.
    """

    name: str
    rows: Share
    columns: int
    device: torch.device
    squares: Tensor
    values: Callable[[int, int], Tensor]  # (first row, end row), counted from this rank's first row -> entries
    reset: Callable[[int, Tensor, Tensor], Tensor]  # (first row, entries, mask) -> number of changed entries

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the first row and the values of each block."""
        for at in range(0, self.rows.stop - self.rows.start, BLOCK):
            yield at, self.values(at, at + BLOCK)

    def scores(self, values: Tensor) -> Tensor:
        r"""Return :math:`|M_{ij}| \sqrt{n_j}` of some rows, in float32."""
        return wanda_scores(values, self.squares).float()


class Antidote(Repair):
    r"""Reset the entries of the user's update that are most active on harmful data.

    Let n be the squared input of a layer on the defender's harmful data, summed over tokens and averaged over samples.
    An entry of a matrix M has the score

    .. math:: h_{ij} = |M_{ij}| \sqrt{n_j}

    In each group the fraction ``prune_ratio`` of the entries with the largest scores is reset. M depends on the mode:

    - ``"delta"``: the update, :math:`s B A` or :math:`W_{ft} - W_{al}`. A reset entry has its aligned value again.
      Under an adapter the result has no low rank: the remaining update is added to the weights, and B becomes zero.
    - ``"factor"``: the LoRA matrices A and B, each separately, as in the official code. A reset entry is zero. At rank
      16 and ratio 0.1 this mode leaves about 30 % of the update's energy, and mode ``"delta"`` leaves 56 %.
    - ``"merged"``: all parameters. A reset entry is zero, so the model also loses abilities from before the
      fine-tuning. Discouraged: the mode serves to compare with the official code's full-parameter mode
      (``presets["repo_full"]``), which prunes q, k and v only. ``"delta"`` works on such models too.

    Args:
        prune_ratio: fraction of the entries to reset, in [0, 1]; 0 turns it off.
        mode: entries of the update (``"delta"``), of LoRA's A and B (``"factor"``), or of all weights (``"merged"``).
        group: the entries to which the fraction applies: ``"row"`` for each output row, ``"matrix"``, or ``"model"``
            for all matrices together.
        rounding: ``"down"``, or ``"up"`` as in the official code, which resets at least one entry of each row.
        layers: names of the linear layers to prune, such as q_proj. By default all, or under LoRA all that have an
            adapter.
        streams: loader of the stream ``"harmful"`` (harmful prompts with harmful answers, the defender's own). It is
            needed only if the data module does not offer that stream. It is read once.
        output: as in ``Repair``.
        aligned: as in ``Repair``; needed in mode ``"delta"`` with all parameters trained.

    Raises:
        ValueError: if ``prune_ratio`` is no fraction, or less than one entry of a group. Also if a choice is unknown,
            or the model lacks one of ``layers``.

    Cost: one forward pass over the harmful data, once, and one number per input of each layer. There is no backward
        pass. The official code runs each layer twice and stores the embeddings of all samples.
    Source: Huang et al., "Antidote", ICML 2025, arXiv:2408.09600; the score of Sun et al., "Wanda", arXiv:2306.11695.
    Differs: the default prunes entries of the update. The official code prunes the factors with the fraction rounded
        up, which at rank 8 resets at least 12.5 % of B. Counts are exact here, and a tie goes to the first entry. The
        paper's mask covers the whole model (``presets["paper"]``); the official code has one per row
        (``presets["repo"]``). Padding is masked, so that batches of any size give the same numbers. With all parameters
        trained, every linear layer is pruned by default. The official code prunes q, k and v, at a ratio of 1e-5 that
        its rounding raises to 2.4e-4 at 4096 columns.
    """

    streams = ("harmful",)
    dials = ("prune_ratio", "group", "rounding")
    repair_order = 10
    claims = ("pruning of the update",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"prune_ratio": 0.2, "mode": "factor", "group": "model"},
        "repo": {"prune_ratio": 0.1, "mode": "factor", "group": "row", "rounding": "up"},
        "repo_full": {
            "prune_ratio": 1e-5,
            "mode": "merged",
            "group": "row",
            "rounding": "up",
            "layers": ("q_proj", "k_proj", "v_proj"),
        },
    }

    def __init__(
        self,
        prune_ratio: float = 0.05,
        mode: Literal["delta", "factor", "merged"] = "delta",
        group: Literal["row", "matrix", "model"] = "row",
        rounding: Literal["down", "up"] = "down",
        layers: Sequence[str] | None = None,
        streams: Mapping[str, Loader] | None = None,
        output: str | None = None,
        aligned: str | None = None,
    ) -> None:
        if not 0 <= prune_ratio <= 1:
            hint = f" If that is a percentage, write {prune_ratio / 100:g}." if 1 < prune_ratio <= 100 else ""
            raise ValueError(f"Antidote: prune_ratio must lie in [0, 1] (0 turns it off), got {prune_ratio}.{hint}")
        for name, value, allowed in (
            ("mode", mode, ("delta", "factor", "merged")),
            ("group", group, ("row", "matrix", "model")),
            ("rounding", rounding, ("down", "up")),
        ):
            if value not in allowed:
                raise ValueError(f"Antidote: {name} must be one of {list(allowed)}, got {value!r}.")
        if layers is not None and (isinstance(layers, str) or not layers):
            raise ValueError(f"Antidote: layers must list names such as q_proj, or be None for all, got {layers!r}.")
        if mode == "merged":
            warnings.warn(
                "Antidote: mode 'merged' sets weights of the model to zero, and not back to their aligned values. Use"
                " mode 'delta' to restore those.",
                stacklevel=2,
            )
        super().__init__(streams, output, aligned)
        self.prune_ratio, self.mode, self.group, self.rounding = prune_ratio, mode, group, rounding
        self.layers = None if layers is None else tuple(layers)
        self.needs = ("aligned",) if mode == "delta" else ()

    @property
    @override
    def neutral(self) -> bool:
        return self.prune_ratio == 0

    @override
    def scored(self, subject: Subject) -> dict[str, Tensor]:
        """Return the squared inputs of each layer, ``[in]``, and the number of samples, 0-d."""
        model = subject.model
        self.check_model(model)
        modules = self._layers(model, *self._pruned(model))
        squares, samples = input_squares(model, modules, subject.batches("harmful"), subject.context, subject.split)
        return {**{name: s.cpu() for name, s in squares.items()}, SAMPLES: torch.tensor(samples)}

    @override
    def edit(self, subject: Subject) -> None:
        self.check_model(subject.model)
        adapter = has_adapter(subject.model)
        updates, weights = self._pruned(subject.model)
        device = next(subject.model.parameters()).device
        squares = {name: s.to(device) for name, s in subject.scores.items() if name != SAMPLES}
        before = {name: float(u.factors().squared_norm()) for name, u in updates.items()}
        # _prune edits the matrices in place. In mode "delta" it reads B, so B is zeroed after all matrices are done.
        matrices = self._matrices(subject, updates, weights, squares)
        table = self._prune(matrices, subject.on_weight)
        if adapter and self.mode == "delta":
            for update in updates.values():
                local(update.b.detach()).zero_()
            subject.dense = True
        if self.mode == "factor":
            after = {name: float(u.factors().squared_norm()) for name, u in updates.items()}
            norms = {n: {"norm_before": math.sqrt(before[n]), "norm_after": math.sqrt(after[n])} for n in updates}
            subject.report["updates"] = norms
        total, pruned = (sum(row[key] for row in table.values()) for key in ("entries", "pruned"))
        subject.report |= {
            "samples": int(subject.scores[SAMPLES]),
            "requested_fraction": self.prune_ratio,
            "realised_fraction": pruned / total,
            "matrices": table,
            "changed_entries": sum(row["changed_entries"] for row in table.values()),
        }

    def _count(self, entries: int) -> int:
        """Return how many of a group's entries are reset."""
        exact = self.prune_ratio * entries
        # The tolerance absorbs floating-point error: a product such as 0.07 * 100 is not exactly a whole number.
        return math.floor(exact + 1e-9) if self.rounding == "down" else math.ceil(exact - 1e-9)

    def _pruned(self, model: nn.Module) -> tuple[dict[str, LoraUpdate], dict[str, nn.Parameter]]:
        """Return the updates to prune under an adapter, or the weights to prune without one. The other is empty."""
        if has_adapter(model):
            return self._named(lora_updates(model)), {}
        return {}, self._named(linear_weights(model))

    def _named(self, matrices: Mapping[str, T]) -> dict[str, T]:
        """Return the matrices of the layers to prune, matched by the whole last part of a layer's name."""
        own = {name: name.removesuffix(".weight").rpartition(".")[2] for name in matrices}
        absent = [layer for layer in self.layers or () if layer not in own.values()]
        if absent:
            raise ValueError(
                f"Antidote: layers names {absent[0]!r}; the model has {sorted(set(own.values()))}. Choose among these."
            )
        return {name: m for name, m in matrices.items() if self.layers is None or own[name] in self.layers}

    @override
    def check_model(self, model: nn.Module) -> None:
        """Refuse a model that the mode cannot work on, and a fraction that is less than one entry of a group."""
        adapter = has_adapter(model)
        if not (adapter and self.mode == "factor"):
            check_layout(model, "Antidote", "; use mode='factor' with an adapter")
        if self.mode == ("merged" if adapter else "factor"):
            on = "LoRA adapters" if self.mode == "factor" else "models with all parameters trained"
            raise TypeError(f"Antidote: mode {self.mode!r} works on {on} only; use mode='delta'.")
        shapes: dict[str, tuple[int, ...]] = {}
        for name, update in (self._named(lora_updates(model)) if adapter else {}).items():
            if self.mode == "factor":
                shapes |= {f"{name} (A)": tuple(update.a.shape), f"{name} (B)": tuple(update.b.shape)}
                continue
            if update.weight.dtype not in (torch.float32, torch.float64):
                raise TypeError(
                    f"Antidote: mode 'delta' adds the remaining update to {name}, which is stored in"
                    f" {update.weight.dtype}. In this type most of a small update would round away. Load the model in"
                    " float32, or use mode='factor'."
                )
            shapes[name] = (update.b.shape[0], update.a.shape[1])
        if not adapter:
            shapes = {name: tuple(w.shape) for name, w in self._named(linear_weights(model)).items()}
        for name, shape in shapes.items():
            entries = shape[1] if self.group == "row" else math.prod(shape)
            if self._count(entries) == 0:
                ways = ["group='matrix'"] * (self.group == "row") + ["mode='delta'"] * (self.mode == "factor")
                raise ValueError(
                    f"Antidote: prune_ratio {self.prune_ratio} is less than one of the {entries} entries of each"
                    f" {self.group} of {name}, so nothing would be reset. Use {', '.join(ways)}, prune_ratio >="
                    f" {1 / entries:.3g}, or rounding='up', which resets more than prune_ratio."
                )

    def _layers(
        self, model: nn.Module, updates: Mapping[str, LoraUpdate], weights: Mapping[str, nn.Parameter]
    ) -> dict[str, nn.Module]:
        """Return the layers whose inputs are measured, by the name of their matrix.

        In mode ``"factor"`` the input of ``lora_A`` is the layer's own input, and that of ``lora_B`` is measured
        separately.
        """
        if not updates:
            names = {f"{plain_name(name)}.weight": module for name, module in model.named_modules()}
            return {name: names[name] for name in weights}
        layers: dict[str, nn.Module] = {name: update.layer for name, update in updates.items()}
        if self.mode == "factor":
            layers |= {f"{name} (B)": update.layer.lora_B[update.adapter] for name, update in updates.items()}
        return layers

    def _matrices(
        self,
        subject: Subject,
        updates: Mapping[str, LoraUpdate],
        weights: Mapping[str, nn.Parameter],
        squares: Mapping[str, Tensor],
    ) -> list[_Matrix]:
        """Return the matrices that the mode prunes."""
        matrices = []
        for name, update in updates.items():
            if self.mode == "factor":
                matrices.append(_zeroed(f"{name} (A)", update.a, squares[name]))
                matrices.append(_zeroed(f"{name} (B)", update.b, squares[f"{name} (B)"]))
            else:
                matrices.append(_under_adapter(name, update, squares[name]))
        for name, weight in weights.items():
            if self.mode == "merged":
                matrices.append(_zeroed(name, weight, squares[name]))
            else:
                if subject.start is None:
                    raise RuntimeError("Antidote: mode 'delta' needs the aligned model.")
                matrices.append(_back_to(subject.start, name, weight, squares[name]))
        return matrices

    def _prune(self, matrices: Sequence[_Matrix], on_weight: Callable[[str], None]) -> dict[str, dict[str, Any]]:
        """Reset the chosen entries of every matrix, and return counts and norms by matrix."""
        table: dict[str, dict[str, Any]] = {}
        # For groups larger than a row, Top finds the cut in a first read of all blocks. The second read below must pass
        # the blocks in the same order, since the mask gives tied entries to the first blocks.
        groups = [list(matrices)] if self.group == "model" else [[m] for m in matrices]
        for members in groups:
            top = None
            if self.group != "row":
                top = self._top(members)
            for number, m in enumerate(members):
                on_weight(m.name)
                sums = torch.zeros(4, dtype=torch.float64, device=m.device)
                for at, values in m.blocks():
                    scores = m.scores(values)
                    mask = top_of_rows(scores, self._count(m.columns)) if top is None else top.mask(number, scores)
                    remaining = values.masked_fill(mask, 0)
                    block_sums = [
                        mask.sum(),
                        m.reset(at, values, mask),
                        values.square().sum(),
                        remaining.square().sum(),
                    ]
                    sums += torch.stack([x.double() for x in block_sums])
                pruned, changed, before, after = m.rows.sum(sums)[0].tolist()
                table[m.name] = {
                    "entries": m.rows.total * m.columns,
                    "pruned": int(pruned),
                    "changed_entries": int(changed),
                    "norm_before": math.sqrt(before),
                    "norm_after": math.sqrt(after),
                }
        return table

    def _top(self, members: Sequence[_Matrix]) -> Top:
        """Return the selection of the largest scores of several matrices together."""

        def scored() -> Iterator[tuple[int, Tensor]]:
            for number, m in enumerate(members):
                for _, values in m.blocks():
                    yield number, m.scores(values)

        entries = sum(m.rows.total * m.columns for m in members)
        return Top(scored, self._count(entries), members[0].rows, members[0].device)


def _zeroed(name: str, weight: Tensor, squares: Tensor) -> _Matrix:
    """Return a matrix whose reset entries become zero."""
    mine = local(weight.detach())

    def reset(at: int, values: Tensor, mask: Tensor) -> Tensor:
        changed = (values != 0) & mask
        mine[at : at + len(mask)].masked_fill_(mask, 0)
        return changed.sum()

    return _Matrix(name, share(weight), weight.shape[1], mine.device, squares, lambda i, j: mine[i:j].clone(), reset)


def _under_adapter(name: str, update: LoraUpdate, squares: Tensor) -> _Matrix:
    """Return the update ``s B A``, whose remaining entries are added to the weight under the adapter."""
    dtype = torch.promote_types(update.b.dtype, torch.float32)
    b, a = local(update.b.detach()).to(dtype), whole(update.a.detach()).to(dtype)
    weight = local(update.weight.detach())

    def reset(at: int, values: Tensor, mask: Tensor) -> Tensor:
        part = weight[at : at + len(mask)]
        part.copy_(part.to(dtype) + values.masked_fill(mask, 0))
        return ((values != 0) & mask).sum()

    def values(i: int, j: int) -> Tensor:
        return update.scale * (b[i:j] @ a)

    return _Matrix(name, share(update.b), a.shape[1], weight.device, squares, values, reset)


def _back_to(aligned: Weights, name: str, weight: nn.Parameter, squares: Tensor) -> _Matrix:
    """Return the update ``W_ft - W_aligned``, whose reset entries get their aligned value again."""
    rows, mine = share(weight), local(weight.detach())
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if aligned.shape(name) != tuple(weight.shape):
        raise ValueError(
            f"Antidote: {name} has shape {tuple(weight.shape)}, and {aligned.shape(name)} in the aligned model. Give"
            " the model that the fine-tuning started from."
        )

    def start(i: int, j: int) -> Tensor:
        return aligned.rows(name, rows.start + i, min(rows.start + j, rows.stop)).to(mine.device)

    def values(i: int, j: int) -> Tensor:
        return mine[i:j].to(dtype) - start(i, j).to(dtype)

    def reset(at: int, values: Tensor, mask: Tensor) -> Tensor:
        part = mine[at : at + len(mask)]
        # The stored aligned value is copied, not W_ft - values, so that reset entries are exact.
        part.copy_(torch.where(mask, start(at, at + len(mask)).to(part.dtype), part))
        return ((values != 0) & mask).sum()

    return _Matrix(name, rows, weight.shape[1], mine.device, squares, values, reset)


def antidote(model: nn.Module | str | Path, batches: Iterable[Any], **arguments: Any) -> dict[str, Any]:
    """Repair a fine-tuned model with Antidote in one call, without Lightning.

    Args:
        model: a PEFT model whose active adapter is the user's update, or a causal LM with all parameters trained. It is
            changed in memory. Or the folder of either, which stays unchanged.
        batches: harmful prompts with harmful answers, the defender's own: dictionaries with ``input_ids``,
            ``attention_mask`` and ``labels``, int64 ``[batch, tokens]``. They are read once.
        **arguments: further arguments of ``Antidote``, such as ``output``, the folder for the repaired model.

    Returns:
        The report: matrices, entries and changed entries.

    Raises:
        RuntimeError: if the model is already repaired.
        ValueError: if an argument of ``Antidote`` is out of range, or a folder is repaired without ``output``.
    """
    return repair_model(Antidote(**arguments), model, batches)
