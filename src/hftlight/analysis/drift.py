"""Analysis: drift of the hidden states from the aligned model's, by layer and site."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from typing_extensions import override

from hftlight.analysis.analysis import Analysis, Part, Picture, Row
from hftlight.analysis.drawing import layer_figure, legend_below, line, looks, of
from hftlight.analysis.view import View
from hftlight.engine.step.activations import ATTENTION, modules_called
from hftlight.engine.weights.neurons import MLP
from hftlight.errors import InputError
from hftlight.evaluation.answering.inference import evaluating
from hftlight.evaluation.metrics.embedding_drift import adapter_off, distances, outputs_of
from hftlight.evaluation.stats.intervals import ratio
from hftlight.models.module import decoder_layers
from hftlight.report.figure import canvas, styled

SITES = ("residual", "attention", "mlp")
KINDS = {"harmful": "harmful", "over_refusal": "ordinary", "task": "task"}
PANELS = {"harmful": "harmful prompts", "ordinary": "ordinary prompts", "task": "task prompts"}
SITE_PANELS = {"harmful, attention": "attention outputs", "harmful, mlp": "MLP outputs"}
LEGACY_BATCH = 10  # prompts in a batch of the legacy totals


@dataclass(frozen=True)
class SiteDrift:
    r"""Drift of one site's outputs, with all decoder layers together.

    At token t of prompt x the model gives h and the reference h'. The sums go over a prompt's tokens.

    Attributes:
        squared: :math:`\sum_t \|h - h'\|_2^2`, float64 ``[layers, prompts]``.
        reference: :math:`\sum_t \|h'\|_2^2`, float64 ``[layers, prompts]``.
        cosine: :math:`\sum_t 1 - \cos(h, h')`, float64 ``[layers, prompts]``.
        tokens: number of tokens, int64 ``[prompts]``.
        shift: :math:`\sum_x \sum_t h - h'`, float64 ``[layers, hidden]``.
        last: h and h' at each prompt's last token, float32 ``[2, layers, prompts, hidden]``.
    """

    squared: Tensor
    reference: Tensor
    cosine: Tensor
    tokens: Tensor
    shift: Tensor
    last: Tensor

    @property
    def relative(self) -> Tensor:
        r"""Relative drift :math:`R_l = \sum \|h - h'\|_2^2 / \sum \|h'\|_2^2`, dimensionless, ``[layers]``."""
        return self.squared.sum(1) / self.reference.sum(1)

    @property
    def per_dimension(self) -> Tensor:
        r"""Mean squared drift :math:`D_l = \mathrm{mean}_t \|h - h'\|_2^2 / d`, ``[layers]``."""
        return self.squared.sum(1) / (self.tokens.sum() * self.shift.shape[-1])

    @property
    def mean_shift(self) -> Tensor:
        r"""Share of the squared drift that one common shift makes, 0-1, ``[layers]``. It is 0 without drift.

        .. math:: \|\mathrm{mean}_t (h - h')\|_2^2 \,/\, \mathrm{mean}_t \|h - h'\|_2^2

        The rest is the variance of the drift over tokens.
        """
        tiny = torch.finfo(torch.float64).tiny
        return self.shift.square().sum(-1) / self.tokens.sum() / self.squared.sum(1).clamp_min(tiny)

    @property
    def cka(self) -> Tensor:
        """Linear CKA of the states at the prompts' last tokens, ``[layers]``, by ``linear_cka``."""
        return linear_cka(self.last[0], self.last[1])

    def vaccine_sum(self) -> Tensor:
        """Sum of squared norms over layers and tokens, as Vaccine's code totals it, 0-d."""
        return self.squared.sum()

    def antidote_sum(self, batch: int = LEGACY_BATCH) -> Tensor:
        """Sum over layers and batches of one norm over the batch, as Antidote's code totals it, 0-d.

        Args:
            batch: consecutive prompts in one norm, >= 1. The total depends on it.
        """
        return torch.stack([part.sum(1).sqrt().sum() for part in self.squared.split(batch, dim=1)]).sum()


def drift(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    reference: nn.Module | None = None,
    *,
    sites: Sequence[str] = ("residual",),
    skip: int = 1,
    batch_size: int = 16,
) -> dict[str, SiteDrift]:
    """Return the drift of a model from a reference at the outputs of layers, attentions and MLPs.

    Padding does not count. In many models the first token's state is an outlier of great length, which would decide
    every sum, so it is left out.

    Args:
        model: a causal LM, or a LoRA model around one.
        prompts: token ids of each prompt, at least one. Both models get the same ids.
        reference: the model to compare with. None takes ``model`` with its adapter switched off, if that is exact.
        sites: names of ``SITES``. A site without a module of its own in this architecture is left out.
        skip: tokens left out at the start of each prompt, >= 0.
        batch_size: prompts per batch, >= 1. It does not change the result beyond rounding.

    Raises:
        ValueError: if a site is unknown, or a prompt has no token after ``skip``.
        InputError: if there is no reference and switching the adapter off does not give one, or the shapes differ.

    Cost: two forward passes per prompt, without logits.
    """
    if unknown := set(sites) - set(SITES):
        raise ValueError(f"drift: sites are {list(SITES)}, got {sorted(unknown)}.")
    if not prompts or min(map(len, prompts)) <= skip:
        raise ValueError(f"drift: at least one prompt is needed, each with more than {skip} tokens (skip).")
    other = model if reference is None else reference
    taps, taps_other = _taps(model, sites), _taps(other, sites)
    if taps.keys() != taps_other.keys():
        raise InputError("drift: both models need the same layers and modules. Pass one of the same architecture.")
    sums: dict[Any, list[Tensor]] = {}
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    with evaluating(model, other):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            some = [prompts[row] for row in rows]
            here = outputs_of(model, some, taps)
            with adapter_off(model, "drift") if reference is None else nullcontext():
                there = outputs_of(other, some, taps_other)
            for key in taps:
                if here[key].shape != there[key].shape:
                    shapes = here[key].shape[-1], there[key].shape[-1]
                    raise InputError(f"drift: both models need the same hidden size, got {shapes[0]} and {shapes[1]}.")
                _add(sums, key, rows, [len(p) for p in some], skip, here[key], there[key], len(prompts))
    lengths = torch.tensor([len(prompt) - skip for prompt in prompts])
    layers = range(len(decoder_layers(model)))
    return {
        site: SiteDrift(*_stacked([sums[site, layer] for layer in layers], lengths))
        for site in sites
        if (site, 0) in sums
    }


def relative_drift(here: Tensor, there: Tensor) -> Tensor:
    r"""Return the relative drift :math:`\sum \|h - h'\|_2^2 / \sum \|h'\|_2^2` of each layer, float64 ``[layers]``.

    Args:
        here: h, ``[layers, prompts, hidden]``, such as the result of ``last_states``.
        there: h', of the same shape.
    """
    a, b = here.double(), there.double()
    return (a - b).square().sum((-2, -1)) / b.square().sum((-2, -1))


def linear_cka(left: Tensor, right: Tensor) -> Tensor:
    r"""Return the linear CKA of two sets of states of the same prompts, at most 1, float64 ``[...]``.

    With :math:`K = X X^T` and :math:`L = Y Y^T`, both with a zero diagonal, and n prompts

    .. math:: \mathrm{HSIC}(K, L) = \frac{1}{n (n - 3)} \Big[ \mathrm{tr}(K L) + \frac{1^T K 1 \; 1^T L 1}{(n - 1)(n
        - 2)} - \frac{2}{n - 2} 1^T K L 1 \Big], \qquad \frac{\mathrm{HSIC}(K, L)}{\sqrt{\mathrm{HSIC}(K, K)
        \mathrm{HSIC}(L, L)}}

    This estimate has no bias, unlike the usual one, which tends to 1 if there are fewer prompts than dimensions. It is
    about 0 for unrelated states, and NaN for states without variance. Rotations, shifts and one common scale do not
    change it.

    Args:
        left: X, ``[..., n, hidden]`` with n >= 4.
        right: Y, ``[..., n, hidden]``; its hidden size may differ.

    Raises:
        ValueError: if there are fewer than four prompts.

    Source: Kornblith et al., ICML 2019, arXiv:1905.00414, linear CKA; Song et al., JMLR 2012, the unbiased HSIC.
    """
    n = left.shape[-2]
    if n < 4:
        raise ValueError(f"linear_cka: at least 4 prompts are needed, got {n}.")
    grams = []
    for states in (left, right):
        # Centring changes no HSIC. It keeps the sums small, so that less is lost by rounding.
        x = states.double() - states.double().mean(-2, keepdim=True)
        gram = x @ x.mT
        grams.append(gram - torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1)))

    def hsic(k: Tensor, m: Tensor) -> Tensor:
        sums = k.sum((-2, -1)) * m.sum((-2, -1)) / ((n - 1) * (n - 2))
        return (k * m).sum((-2, -1)) + sums - 2 / (n - 2) * (k.sum(-1) * m.sum(-1)).sum(-1)

    return hsic(*grams) / (hsic(grams[0], grams[0]) * hsic(grams[1], grams[1])).sqrt()


def _taps(model: nn.Module, sites: Sequence[str]) -> dict[Any, nn.Module]:
    """Return the modules of the sites by (site, layer)."""
    found: dict[Any, nn.Module] = {}
    for site in sites:
        for number, layer in enumerate(decoder_layers(model)):
            if site == "residual":
                found[site, number] = layer
                continue
            try:
                (found[site, number],) = modules_called(layer, ATTENTION if site == "attention" else MLP).values()
            except ValueError:  # such as OPT, whose layers hold the two matrices of the MLP themselves
                found = {key: module for key, module in found.items() if key[0] != site}
                break
    return found


def _add(
    sums: dict[Any, list[Tensor]],
    key: Any,
    rows: Sequence[int],
    lengths: Sequence[int],
    skip: int,
    here: Tensor,
    there: Tensor,
    count: int,
) -> None:
    """Add the sums of one batch of prompts at one site of one layer."""
    a, b = here.double(), there.to(here.device).double()
    width, ends = a.shape[1], torch.tensor(lengths, device=a.device)
    places = torch.arange(width, device=a.device)
    mask = (places >= skip) & (places < ends[:, None])  # [batch, tokens]
    difference = (a - b) * mask[..., None]
    if key not in sums:
        sums[key] = [
            *(torch.zeros(count, dtype=torch.float64) for _ in range(3)),
            torch.zeros(a.shape[-1], dtype=torch.float64),
            torch.zeros(2, count, a.shape[-1]),
        ]
    squared, reference, cosine, shift, last = sums[key]
    squared[rows] = difference.square().sum((1, 2)).cpu()
    reference[rows] = (b.square().sum(-1) * mask).sum(1).cpu()
    cosine[rows] = (distances(a, b)[0] * mask).sum(1).cpu()
    shift += difference.sum((0, 1)).cpu()
    last[:, rows] = torch.stack([x[range(len(rows)), ends - 1].float().cpu() for x in (a, b)])


def _stacked(layers: Sequence[Sequence[Tensor]], tokens: Tensor) -> tuple[Tensor, ...]:
    """Return the attributes of ``SiteDrift`` from the sums of each layer."""
    squared, reference, cosine, shift = (torch.stack([layer[i] for layer in layers]) for i in range(4))
    return squared, reference, cosine, tokens, shift, torch.stack([layer[4] for layer in layers], dim=1)


@dataclass(frozen=True)
class LayerDrift(Analysis):
    r"""Drift of the hidden states from the aligned model's, by layer.

    Rows, for each decoder layer: ``relative_drift`` R, the squared drift as a fraction of the squared length of the
    aligned model's states; ``squared_drift`` D, its mean per token and dimension; ``cosine_drift``, the mean of 1 - cos
    over tokens, 0-2; ``linear_cka`` of the states at the last tokens, about 0-1, where 1 is equal up to a rotation;
    ``mean_shift_share``, the fraction 0-1 of the squared drift that is one shift for all tokens. ``position`` is the
    kind of prompts, with the site unless it is the layer's output (residual). Intervals are 95 % over prompts.

    ``vaccine_sum`` and ``antidote_sum`` are the totals of two official codes, at attention outputs: squared norms
    summed, and norms of batches of ten prompts summed. They grow with prompts, length, layers and width, so they
    compare only between models on the same prompts.

    A repair should bring the drift down on harmful and ordinary prompts and keep it on the task.

    Args:
        prompts: prompts of each kind, harmful, ordinary and task, >= 4.
        sites: where to measure: residual, attention, mlp.

    Cost: two forward passes per prompt, without logits, and the aligned model beside the model.
    Source: Huang et al., "Vaccine", NeurIPS 2024, arXiv:2402.01109, embedding drift; Huang et al., "Antidote", 2024,
    arXiv:2408.09600, its total.
    Differs: padding and the first token are left out, also of the totals. The CKA is the unbiased one.
    """

    compares: ClassVar[bool] = True
    seconds: ClassVar[float] = 20.0

    prompts: int = 24
    sites: list[str] = field(default_factory=lambda: list(SITES))

    def __post_init__(self) -> None:
        if self.prompts < 4:
            raise ValueError(f"LayerDrift: prompts must be >= 4, got {self.prompts}.")
        if not self.sites or set(self.sites) - set(SITES):
            raise ValueError(f"LayerDrift: sites must be some of {list(SITES)}, got {self.sites}.")
        object.__setattr__(self, "sites", [site for site in SITES if site in self.sites])

    @override
    def parts(self, known: Mapping[str, Sequence[Row]], view: View) -> Sequence[Part]:
        return [{"kind": kind} for kind in KINDS if len(view.tests.rows(kind)) >= 4]

    @override
    def measure(self, part: Part, view: View) -> list[Row]:
        prompts = view.prompts(part["kind"], self.prompts)
        rows = []
        for site, found in drift(view.model, prompts, view.reference, sites=self.sites).items():
            name = KINDS[part["kind"]] if site == "residual" else f"{KINDS[part['kind']]}, {site}"
            rows += rows_of(found, name)
            if site == "attention":
                rows.append(Row("vaccine_sum", float(found.vaccine_sum()), position=name))
                rows.append(Row("antidote_sum", float(found.antidote_sum()), position=name))
        return rows

    @override
    def pictures(self, rows: Sequence[Row]) -> Iterator[Picture]:
        yield Picture(
            "drift",
            "Drift from the aligned model",
            "Squared distance of the states after each decoder layer from the aligned model's, as a fraction of their"
            " squared length (logarithmic). Bands: 95 % intervals over prompts. The aligned model itself is at 0 and"
            " has no line.",
            _drift_figure(rows, PANELS),
        )
        panels = {
            position: title for position, title in SITE_PANELS.items() if any(r.position == position for r in rows)
        }
        if panels:
            yield Picture(
                "drift_sites",
                "Where the drift is written",
                "As the figure above, for what attention and MLP add to the residual, on harmful prompts.",
                _drift_figure(rows, panels),
            )
        yield Picture(
            "drift_shape",
            "Shape of the drift",
            "On harmful prompts. Left: linear CKA with the aligned model, where 1 means that the prompts lie to each"
            " other as before and lower means that they were rearranged. Right: the part of the squared drift that is"
            " one shift for all tokens. The rest differs from token to token. Without intervals.",
            _shape_figure(rows),
        )


def rows_of(found: SiteDrift, position: str) -> list[Row]:
    """Return the drift at one site as rows."""
    tokens = found.tokens.tolist()
    dimensions = [count * found.shift.shape[-1] for count in tokens]
    cka, mean_shift = found.cka.tolist(), found.mean_shift.tolist()
    rows = []
    for layer in range(len(found.squared)):
        squared, reference, cosine = (x[layer].tolist() for x in (found.squared, found.reference, found.cosine))
        for metric, sums, counts in (
            ("relative_drift", squared, reference),
            ("squared_drift", squared, dimensions),
            ("cosine_drift", cosine, tokens),
        ):
            low, high = ratio(sums, counts) or (None, None)
            low = None if low is None else max(0.0, low)
            rows.append(Row(metric, sum(sums) / sum(counts), low, high, layer, position))
        rows.append(Row("linear_cka", cka[layer], layer=layer, position=position))
        rows.append(Row("mean_shift_share", mean_shift[layer], layer=layer, position=position))
    return rows


def _drift_figure(rows: Sequence[Row], panels: Mapping[str, str]) -> Figure:
    present = {p: title for p, title in panels.items() if any(row.position == p for row in rows)}
    moved = [row for row in rows if row.metric != "relative_drift" or row.value > 0]
    figure = layer_figure(moved, "relative_drift", present, "relative squared drift", at=None)
    for axes in figure.axes:
        if axes.lines:
            axes.set_yscale("log")
    return figure


@styled
def _shape_figure(rows: Sequence[Row]) -> Figure:
    figure, axes = canvas(2, height=3.4)
    residual = [row for row in rows if row.position == "harmful"]
    for place, (metric, label) in enumerate((("linear_cka", "linear CKA"), ("mean_shift_share", "share of one shift"))):
        for key, some in of(residual, metric).items():
            line(axes[place], some, looks(rows)[key], [float(row.layer or 0) for row in some])
        axes[place].set(xlabel="decoder layer", ylabel=label)
    legend_below(figure, axes[0])
    return figure
