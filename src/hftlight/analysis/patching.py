"""Analysis: activation patching between the aligned and the attacked model: where the attack cut off the refusal."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from math import nan
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from typing_extensions import override

from hftlight.analysis.analysis import Analysis, Part, Picture, Row, part_name
from hftlight.analysis.drawing import heat_maps, label, layer_grid, legend_below, line, looks, of
from hftlight.analysis.states import mean_row, right_padded
from hftlight.analysis.tone import refusal_log_odds
from hftlight.analysis.view import View
from hftlight.engine.step.activations import hooked
from hftlight.errors import InputError
from hftlight.evaluation.answering.inference import evaluating
from hftlight.evaluation.metrics.embedding_drift import layer_outputs
from hftlight.models.module import decoder_layers
from hftlight.report.figure import INK, MUTED, canvas, styled

GAP = 0.5  # nats; below this difference of the two models, an effect is undefined
SAME_START = 0.5  # cosine of two models' embeddings that shows a common initialisation; that of two random ones is 0

Cell = tuple[int, int]  # decoder layer from 0, and position from the end, -1 for the last token


def effect(patched: Tensor, corrupt: Tensor, clean: Tensor, gap: float = GAP) -> Tensor:
    r"""Return which fraction of the clean model's refusal a patch restores, float64 ``[...]``.

    .. math:: \frac{m_\text{patched} - m_\text{corrupt}}{m_\text{clean} - m_\text{corrupt}}

    0 means that the patch changes nothing, 1 that the corrupt model refuses like the clean one.

    Args:
        patched: refusal log-odds m of the corrupt model with clean activations in it, in nats.
        corrupt: m of the corrupt model, in nats.
        clean: m of the clean model, in nats.
        gap: smallest absolute denominator in nats, > 0; below it the effect is NaN.
    """
    whole = clean.double() - corrupt.double()
    return torch.where(whole.abs() < gap, nan, (patched.double() - corrupt.double()) / whole)


@contextmanager
def patched(model: nn.Module, patches: Mapping[int, tuple[Any, Tensor]]) -> Iterator[None]:
    """Replace entries of decoder layers' outputs inside the block.

    Args:
        model: a causal LM, or a LoRA model around one.
        patches: by the layer's number: an index into its output ``[batch, tokens, hidden]``, and the new values.
    """
    layers: Any = decoder_layers(model)

    def replace(name: str, hidden: Tensor) -> Tensor:
        index, values = patches[int(name)]
        changed = hidden.clone()
        changed[index] = values.to(hidden)
        return changed

    with hooked({str(layer): layers[layer] for layer in patches}, replace):
        yield


def patched_odds(
    model: nn.Module, prompt: Sequence[int], cells: Sequence[Cell], states: Tensor, refusing: Sequence[int]
) -> Tensor:
    """Return the refusal log-odds with one cell patched at a time, in nats, float64 ``[cells]``.

    Cells of one position share the pass over the tokens before it. The cache of that pass is expanded to one row per
    cell, and only the rest of the prompt runs in every row. That is exact, because the tokens before a patched position
    cannot see it.

    Args:
        model: the corrupt model, a causal LM with a key-value cache, or a LoRA model around one.
        prompt: token ids.
        cells: layer and position of each patch, at least one.
        states: clean outputs of every decoder layer on this prompt, ``[layers, tokens, hidden]``.
        refusing: ids of the tokens that open a refusal.

    Cost: for the last token of all L layers, one pass over the prompt and one over L single tokens.
    """
    found = torch.empty(len(cells), dtype=torch.float64)
    order = sorted(range(len(cells)), key=lambda number: cells[number][1])
    device = next(model.parameters()).device
    with evaluating(model), _last_logits(model):
        for position, numbers in groupby(order, key=lambda number: cells[number][1]):
            group = list(numbers)
            start = len(prompt) + position
            cache = None
            if start > 0:
                before = torch.tensor([prompt[:start]], device=device)
                cache = model(input_ids=before, attention_mask=torch.ones_like(before), use_cache=True).past_key_values
                cache.batch_repeat_interleave(len(group))
            rest = torch.tensor([prompt[start:]] * len(group), device=device)
            mask = torch.ones(len(group), len(prompt), dtype=torch.long, device=device)
            rows: dict[int, list[int]] = {}
            for row, number in enumerate(group):
                rows.setdefault(cells[number][0], []).append(row)
            # Row r carries the patch of its own layer only.
            patches = {layer: ((some, 0), states[layer, start]) for layer, some in rows.items()}
            with patched(model, patches):
                logits = model(input_ids=rest, attention_mask=mask, past_key_values=cache, use_cache=True).logits
            found[group] = refusal_log_odds(logits[:, -1], refusing).cpu()
    return found


@contextmanager
def _last_logits(model: Any) -> Iterator[None]:
    """Pass only the last position to the output layer inside the block."""
    with hooked({"head": model.get_output_embeddings()}, lambda _, hidden: hidden[:, -1:], inputs=True):
        yield


@dataclass(frozen=True)
class FirstOrder:
    """First-order patching of a batch of prompts.

    Attributes:
        effects: estimated change of the refusal log-odds by each patch, in nats, float64 ``[layers, prompts, tokens]``;
            0 on padding, which no later token sees.
        clean: refusal log-odds of the clean model, in nats, float64 ``[prompts]``.
        corrupt: likewise, of the corrupt model.
        cosine: cosine of the two models' states at the last token, float64 ``[layers, prompts]``.
    """

    effects: Tensor
    clean: Tensor
    corrupt: Tensor
    cosine: Tensor


def first_order(
    clean: nn.Module, corrupt: nn.Module, prompts: Sequence[Sequence[int]], refusing: Sequence[int]
) -> FirstOrder:
    r"""Return the first-order estimate of every patch in a corrupt model.

    With the clean state h' and the corrupt state h of layer l at token t, and the refusal log-odds m of the corrupt
    model,

    .. math:: m_\text{patched} - m_\text{corrupt} \approx (\nabla_{h_{l,t}} m)^T (h'_{l,t} - h_{l,t})

    Args:
        clean: the clean model, a causal LM, or a LoRA model around one.
        corrupt: the corrupt model, of the same shape.
        prompts: token ids of each prompt, at least one; they form one batch.
        refusing: ids of the tokens that open a refusal.

    Cost: two forward passes and one backward pass, without gradients of weights.
    Source: Nanda, "Attribution patching", 2023.
    """
    ends = torch.tensor([len(prompt) - 1 for prompt in prompts])
    batch = torch.arange(len(prompts))
    layers: Any = decoder_layers(corrupt)
    with evaluating(clean):
        theirs = layer_outputs(clean, prompts, range(len(layers)))
        target = torch.stack([theirs[layer] for layer in range(len(layers))])
        odds_clean = _odds(clean, prompts, refusing)
    states: dict[str, Tensor] = {}

    def tap(name: str, hidden: Tensor) -> Tensor:
        # The first layer's output is a leaf, so that no gradient runs into embeddings.
        states[name] = hidden if hidden.requires_grad and states else hidden.detach().requires_grad_()
        return states[name]

    with evaluating(corrupt), torch.enable_grad(), hooked({str(n): layer for n, layer in enumerate(layers)}, tap):
        odds = _odds(corrupt, prompts, refusing)
        grads = torch.autograd.grad(odds.sum(), [states[str(n)] for n in range(len(layers))])
    ours = torch.stack([states[str(n)].detach() for n in range(len(layers))])
    change = target.to(ours).double() - ours.double()
    effects = (torch.stack(grads).double() * change).sum(-1).cpu()
    pairs = (ours[:, batch, ends].double(), target[:, batch, ends].to(ours).double())
    cosine = nn.functional.cosine_similarity(*pairs, dim=-1).cpu()
    return FirstOrder(effects, odds_clean.cpu(), odds.detach().cpu(), cosine)


def _odds(model: Any, prompts: Sequence[Sequence[int]], refusing: Sequence[int]) -> Tensor:
    """Return the refusal log-odds after each prompt, float64 ``[prompts]``."""
    ids, mask = right_padded(prompts, next(model.parameters()).device)
    rows, ends = torch.arange(len(ids), device=ids.device), mask.sum(1) - 1

    def last(_: str, hidden: Tensor) -> Tensor:
        return hidden[rows, ends][:, None]

    with hooked({"head": model.get_output_embeddings()}, last, inputs=True):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return refusal_log_odds(logits[:, 0], refusing)


@dataclass(frozen=True)
class Patching(Analysis):
    r"""Which states of the aligned model, put into the attacked one, bring its refusals back.

    Both models read the same harmful prompts. One state of the attacked model, the output of a decoder layer at a
    token, is replaced by the aligned model's. The effect is the fraction of the lost refusal log-odds m that this
    restores, :math:`(m_\text{patched} - m_\text{attacked}) / (m_\text{aligned} - m_\text{attacked})`. A prompt whose
    denominator is below 0.5 nat is left out.

    Rows: ``last_token_effect`` by layer, patched exactly, and ``first_order_effect`` by layer and token (``position``,
    counted from the end). ``exact_effect`` confirms the cells before the last token whose first-order effect is
    largest. All three are fractions. ``state_cosine`` by layer is the cosine of both models' states at the last token.
    ``refusal_gap`` is the denominator in nats. ``prompts_left_out`` counts prompts. The intervals are 95 % over
    prompts.

    Args:
        prompts: harmful prompts, >= 2.
        positions: last tokens of the prompt on the map, >= 1.
        cells: cells before the last token that are patched exactly, those with the largest first-order effect, >= 0.

    Cost: per prompt two forward passes and one backward pass for the map, and one forward pass and one token in as many
    rows as layers for the last token. The aligned model is a second model in memory.
    Source: Meng et al., "Locating and Editing Factual Associations in GPT", NeurIPS 2022, arXiv:2202.05262; Leong et
    al., "No Two Devils Alike", 2024, arXiv:2405.16229; Nanda, "Attribution patching", 2023.
    Differs: clean and corrupt are two models on one prompt, not one model on two prompts.
    """

    prompts: int = 16
    positions: int = 16
    cells: int = 10

    compares: ClassVar[bool] = True
    seconds: ClassVar[float] = 40.0

    def __post_init__(self) -> None:
        for name, least in (("prompts", 2), ("positions", 1), ("cells", 0)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"Patching: {name} must be >= {least}, got {value}.")

    @override
    def parts(self, known: Mapping[str, Sequence[Row]], view: View) -> Sequence[Part]:
        first: list[Part] = [{"what": "map"}, {"what": "last token"}]
        rows = known.get(part_name(first[0]))
        best = top_cells(rows, self.cells) if rows else []
        return [*first, {"what": "cells", "cells": best}] if best else first

    @override
    def measure(self, part: Part, view: View) -> list[Row]:
        check_pair(view)
        refusing = view.openings(40)
        prompts = view.prompts("harmful", self.prompts)
        if part["what"] == "map":
            return self._map(view, prompts, refusing)
        if part["what"] == "last token":
            layers = range(len(decoder_layers(view.model)))  # type: ignore[arg-type]
            effects = _exact(view, prompts, [(layer, -1) for layer in layers], refusing)
            return [mean_row("last_token_effect", effects[layer], layer) for layer in layers]
        cells = [(layer, place(position)) for layer, position in part["cells"]]
        effects = _exact(view, prompts, cells, refusing)
        return [
            mean_row("exact_effect", row, layer, position)
            for row, (layer, position) in zip(effects, part["cells"], strict=True)
        ]

    def _map(self, view: View, prompts: Sequence[list[int]], refusing: Sequence[int]) -> list[Row]:
        width = min(self.positions, max(map(len, prompts)))
        maps, gaps, cosines = [], [], []
        for batch in range(0, len(prompts), 8):
            some = prompts[batch : batch + 8]
            found = first_order(view.reference, view.model, some, refusing)
            gap = found.clean - found.corrupt
            part = torch.full((len(found.effects), len(some), width), nan, dtype=torch.float64)
            # Prompts are aligned at their ends. A shorter prompt has no effect at the first positions.
            for row, prompt in enumerate(some):
                own = min(width, len(prompt))
                part[:, row, width - own :] = found.effects[:, row, len(prompt) - own : len(prompt)]
            maps.append(torch.where(gap.abs()[:, None] < GAP, nan, part / gap[:, None]))
            gaps.append(gap)
            cosines.append(found.cosine)
        gap, cosine, effects = torch.cat(gaps), torch.cat(cosines, 1), torch.cat(maps, 1)
        left_out = gap.abs() < GAP
        if bool(left_out.all()):
            raise InputError(
                f"the refusal log-odds of the model and of its aligned model differ by less than {GAP} nat on all"
                f" {len(gap)} harmful prompts, so there is no lost refusal to restore."
            )
        rows = [mean_row("refusal_gap", gap), Row("prompts_left_out", float(left_out.sum()))]
        rows += [mean_row("state_cosine", values, layer) for layer, values in enumerate(cosine)]
        names = places(prompts, width, view.tokenizer)
        rows += [
            mean_row("first_order_effect", effects[layer, :, column], layer, name)
            for layer in range(len(effects))
            for column, name in enumerate(names)
            if not bool(effects[layer, :, column].isnan().all())
        ]
        return rows

    @override
    def pictures(self, rows: Sequence[Row]) -> Iterator[Picture]:
        if of(rows, "first_order_effect"):
            yield Picture(
                "patching_map",
                "Where the refusal can be restored",
                "First-order estimate of the effect of a patch, by decoder layer and token from the end of the prompt,"
                " mean over harmful prompts. 1 means that the aligned model's state at this place alone restores its"
                " refusal log-odds, 0 that it changes nothing. Squares mark the cells that were patched exactly."
                " Intervals are in the table.",
                map_figure(rows),
            )
        if of(rows, "last_token_effect"):
            yield Picture(
                "patching_last_token",
                "Patching the last token, layer by layer",
                "Left: effect of the aligned model's state at the last token of the prompt, patched exactly after each"
                " decoder layer. The layers where the curve rises write the refusal that the attack removed. Right:"
                " cosine of both models' states there. Bands: 95 % intervals over prompts.",
                last_token_figure(rows),
            )
        if of(rows, "last_token_effect"):
            yield Picture(
                "patching_cells",
                "First-order and exact effects",
                "How far the map can be trusted: exact against first-order effects of the last token at every layer"
                " (filled) and of the cells before it with the largest first-order effect (open). On the dashed line"
                " both agree. Bars: 95 % intervals over prompts.",
                cells_figure(rows),
            )


def check_pair(view: View) -> None:
    """Refuse two models between which states cannot be exchanged.

    Raises:
        InputError: if the model is the aligned model itself, or the two differ in shape or initialisation.
    """
    if view.reference is view.model:
        raise InputError("it is the aligned model itself, so there is nothing to patch.")
    weights = [m.get_input_embeddings().weight.detach() for m in (view.model, view.reference)]  # type: ignore[operator]
    shapes = [(len(decoder_layers(m)), *w.shape) for m, w in zip((view.model, view.reference), weights, strict=True)]
    if shapes[0] != shapes[1]:
        raise InputError(
            "patching needs two models of one shape, got (layers, vocabulary, hidden)"
            f" {shapes[0]} and {shapes[1]}. Name the aligned model that it comes from with --reference."
        )
    cosine = float(nn.functional.cosine_similarity(weights[0].float().flatten(), weights[1].float().flatten(), dim=0))
    if cosine < SAME_START:
        raise InputError(
            f"the embeddings of the model and of its aligned model have the cosine {cosine:.2f}, so the two do not come"
            " from one initialisation, and their states mean different things. Name the aligned model that it comes"
            " from with --reference."
        )


def _exact(view: View, prompts: Sequence[list[int]], cells: Sequence[Cell], refusing: Sequence[int]) -> Tensor:
    """Return the effect of each cell on each prompt, float64 ``[cells, prompts]``; NaN where it is undefined."""
    found = torch.full((len(cells), len(prompts)), nan, dtype=torch.float64)
    for number, prompt in enumerate(prompts):
        # A prompt that is too short for a cell does not count for it.
        own = [n for n, (_, position) in enumerate(cells) if position >= -len(prompt)]
        with evaluating(view.reference):
            theirs = layer_outputs(view.reference, [prompt], range(len(decoder_layers(view.reference))))
            clean = _odds(view.reference, [prompt], refusing).cpu()
        with evaluating(view.model):
            corrupt = _odds(view.model, [prompt], refusing).cpu()
        if own and bool((clean - corrupt).abs() >= GAP):
            states = torch.cat([theirs[layer] for layer in range(len(theirs))])
            odds = patched_odds(view.model, prompt, [cells[n] for n in own], states, refusing)
            found[own, number] = effect(odds, corrupt, clean)
    return found


def places(prompts: Sequence[Sequence[int]], width: int, tokenizer: Any) -> list[str]:
    """Return the names of the last positions: number from the end, and the token if all prompts share it."""
    names = []
    for position in range(-width, 0):
        tokens = {prompt[position] if len(prompt) >= -position else None for prompt in prompts}
        shared = next(iter(tokens)) if len(tokens) == 1 else None
        text = "" if shared is None else tokenizer.decode([shared]).strip() or repr(tokenizer.decode([shared]))[1:-1]
        names.append(f"{position} {text}".strip())
    return names


def place(position: str) -> int:
    """Return the position from the end that a name of ``places`` has."""
    return int(position.split()[0])


def top_cells(rows: Sequence[Row], count: int) -> list[tuple[int, str]]:
    """Return layer and position of the largest first-order effects, by absolute value, before the last token.

    The last token is left out, because it is patched exactly at every layer anyway.
    """
    cells = [r for r in rows if r.metric == "first_order_effect" and place(str(r.position)) < -1]
    best = sorted(cells, key=lambda r: (-abs(r.value), r.layer))[:count]
    return [(r.layer or 0, str(r.position)) for r in best]


def map_figure(rows: Sequence[Row]) -> Figure:
    """Draw the first-order map of each model, with the cells that were patched exactly."""
    panels, marks = {}, {}
    exact = of(rows, "exact_effect")
    for key, some in of(rows, "first_order_effect").items():
        ordered = sorted(some, key=lambda r: place(str(r.position)))
        values, columns = layer_grid(ordered, lambda r: str(r.position))
        panels[label(*key)] = (values, columns)
        marks[label(*key)] = [(columns.index(str(r.position)), r.layer or 0) for r in exact.get(key, [])]
    return heat_maps(panels, "token from the end", "decoder layer", "effect", marks=marks)


@styled
def last_token_figure(rows: Sequence[Row]) -> Figure:
    """Draw the exact effect at the last token, and the cosine of the states, over the layers."""
    figure, (left, right) = canvas(2, height=3.4)
    known = looks(rows)
    for axes, metric in ((left, "last_token_effect"), (right, "state_cosine")):
        for key, some in of(rows, metric).items():
            line(axes, some, known[key], [float(row.layer or 0) for row in some])
        axes.set(xlabel="decoder layer")
    for height in (0.0, 1.0):
        left.axhline(height, color=MUTED, lw=0.8)
    left.set_ylabel("effect, fraction of the lost log-odds")
    right.set_ylabel("cosine of the states")
    legend_below(figure, left)
    return figure


@styled
def cells_figure(rows: Sequence[Row]) -> Figure:
    """Draw exact against first-order effects of the last token and of the confirmed cells."""
    figure, (axes,) = canvas(1, height=3.6)
    known, ends = looks(rows), [0.0, 1.0]
    estimates = of(rows, "first_order_effect")
    for metric, filled in (("last_token_effect", True), ("exact_effect", False)):
        for key, exact in of(rows, metric).items():
            first = {(r.layer, place(str(r.position))): r.value for r in estimates.get(key, [])}
            pairs = [(first[cell], r) for r in exact if (cell := (r.layer, place(str(r.position or -1)))) in first]
            x, y = [value for value, _ in pairs], [r.value for _, r in pairs]
            bars = [[abs(r.value - (end if end is not None else r.value)) for r, end in side] for side in (
                [(r, r.low) for _, r in pairs], [(r, r.high) for _, r in pairs])]  # fmt: skip
            look = known[key]
            style = {"color": look.color, "marker": look.marker, "ls": "none", "markersize": 5, "elinewidth": 1}
            style |= {} if filled else {"markerfacecolor": "none"}
            axes.errorbar(x, y, bars, label=look.label if filled else None, **style)  # type: ignore[arg-type]
            ends += [*x, *y]
    axes.plot([min(ends), max(ends)], [min(ends), max(ends)], color=INK, lw=0.8, ls=(0, (3, 3)))
    axes.set(xlabel="first-order effect", ylabel="exact effect")
    legend_below(figure, axes)
    return figure
