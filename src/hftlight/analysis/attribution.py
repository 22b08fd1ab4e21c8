"""Analysis: direct logit attribution, which heads and layers write the first token's refusal."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from typing_extensions import override

from hftlight.analysis.analysis import Analysis, Part, Picture, Row
from hftlight.analysis.drawing import grid_canvas, heat_maps, label, layer_grid, of
from hftlight.analysis.states import mean_row, right_padded
from hftlight.analysis.view import View
from hftlight.engine.step.activations import ATTENTION, hooked
from hftlight.engine.weights.neurons import MLP, OUTPUTS, READERS
from hftlight.errors import InputError
from hftlight.evaluation.answering.inference import evaluating
from hftlight.models.load import text_config
from hftlight.models.module import decoder_layers, final_norm
from hftlight.report.figure import INK, MUTED, PALETTE, styled

PROJECTIONS = (*OUTPUTS, "c_proj", "dense")  # the layer of an attention that reads the heads, GPT-2 and GPT-NeoX too
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # of a sum, relative to its terms; norms may run in float32


@dataclass(frozen=True)
class FrozenNorm:
    r"""A norm with the scale that it has at one input, which makes it linear: :math:`g \circ (x - \bar x)\, s + b`.

    The mean :math:`\bar x` is 0 in an RMS norm.

    Attributes:
        gain: g, ``[hidden]``.
        scale: s at the input, ``[..., 1]``.
        centered: whether the mean over ``hidden`` is subtracted.
        bias: b, ``[hidden]``; zeros if the norm has none.
    """

    gain: Tensor
    scale: Tensor
    centered: bool
    bias: Tensor

    @classmethod
    @torch.no_grad()
    def at(cls, norm: nn.Module, x: Tensor) -> "FrozenNorm":
        """Return a norm frozen at an input, ``[..., hidden]`` in float64.

        Raises:
            InputError: if the module is neither a LayerNorm nor an RMS norm.
        """
        centered = isinstance(norm, nn.LayerNorm)
        weight = next(norm.parameters())
        eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        eps = torch.finfo(weight.dtype).eps if eps is None else float(eps)
        bias = getattr(norm, "bias", None)
        bias = torch.zeros_like(weight) if bias is None else bias.detach()
        # An RMS norm's own code decides how its weight enters, as w or 1 + w. The vector of ones shows the gain.
        ones = norm(torch.ones_like(weight)) * (1 + eps) ** 0.5
        gain = (weight if centered else ones).detach().double().cpu()
        mean = x.mean(-1, keepdim=True) if centered else torch.zeros_like(x[..., :1])
        frozen = cls(gain, ((x - mean).square().mean(-1, keepdim=True) + eps).rsqrt(), centered, bias.double().cpu())
        _check_sum(frozen(x) + frozen.bias, norm(x.to(weight)).double().cpu(), f"norm {type(norm).__name__}", weight)
        return frozen

    def __call__(self, x: Tensor) -> Tensor:
        """Return the norm's linear part of ``[..., hidden]``, without its bias."""
        return self.gain * (x - x.mean(-1, keepdim=True) if self.centered else x) * self.scale


@dataclass(frozen=True)
class Contributions:
    """Terms of a logit difference, in nats, float64. All but the heads sum to the difference.

    Attributes:
        embedding: of the input of the first layer, ``[prompts]``.
        attention: of each layer's attention, ``[layers, prompts]``.
        mlp: of each layer's MLP, ``[layers, prompts]``.
        bias: of the biases of the final norm and of the output layer, ``[prompts]``.
        heads: of each attention head, ``[layers, heads, prompts]``. With the bias of the attention's output projection
            they sum to ``attention``.
        difference: the model's own logit difference, ``[prompts]``.
    """

    embedding: Tensor
    attention: Tensor
    mlp: Tensor
    bias: Tensor
    heads: Tensor
    difference: Tensor


def attribution(
    model: nn.Module, prompts: Sequence[Sequence[int]], refusing: Sequence[int], complying: Sequence[int]
) -> Contributions:
    r"""Return what each part of a model adds to the logits of refusing against complying tokens after each prompt.

    The state before the final norm is a sum of components c: the embedding, and the output of every attention and every
    MLP. With the final norm's gain g, its scale s frozen at the whole state, and :math:`u` the mean row of the output
    layer's matrix over some tokens, a component contributes

    .. math:: (u_\text{refusing} - u_\text{complying})^T (g \circ c) \, s

    A LayerNorm subtracts the mean of c first. A norm on the output of an attention or MLP, as in Gemma 2, is frozen
    likewise. The logits are those before any soft cap or scale that the model applies after its output layer.

    Args:
        model: a causal LM of a pre-norm family, or a LoRA model around one.
        prompts: token ids of each prompt, at least one; they form one batch.
        refusing: ids of the tokens that open a refusal, at least one.
        complying: ids of the tokens that open another answer, at least one.

    Raises:
        InputError: if the parts do not sum to the state, because the family combines them in another way.

    Cost: one forward pass per prompt, and one product with each output projection per head.
    Source: Elhage et al., "A Mathematical Framework for Transformer Circuits", 2021; Wang et al., "Interpretability in
    the Wild", ICLR 2023, arXiv:2211.00593.
    """
    with evaluating(model):
        parts = _Parts(model, prompts)
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        weight = next(head.parameters()).detach()
        u = weight[list(refusing)].double().mean(0) - weight[list(complying)].double().mean(0)
        u = u.cpu()
        state = parts.embedding + parts.attention.sum(0) + parts.mlp.sum(0)
        _check_sum(state, parts.state, "decoder layers", weight)
        norm = FrozenNorm.at(final_norm(model), state)
        bias = torch.full((len(prompts),), float(u @ norm.bias), dtype=torch.float64)
        if (own := getattr(head, "bias", None)) is not None:
            bias += float(own[list(refusing)].double().mean() - own[list(complying)].double().mean())
        logits = parts.logits.double().cpu()
        difference = logits[:, list(refusing)].mean(1) - logits[:, list(complying)].mean(1)

        def write(components: Tensor) -> Tensor:
            return norm(components) @ u

        found = Contributions(
            write(parts.embedding), write(parts.attention), write(parts.mlp), bias, write(parts.heads()), difference
        )
    total = found.embedding + found.attention.sum(0) + found.mlp.sum(0) + found.bias
    sizes = found.embedding.abs() + found.attention.abs().sum(0) + found.mlp.abs().sum(0) + found.bias.abs()
    _check_sum(total, difference, "contributions", weight, sizes)
    return found


class _Parts:
    """What one forward pass adds to the last token's state, in float64 on the CPU.

    Attributes:
        embedding: input of the first layer, ``[prompts, hidden]``.
        attention: what each layer's attention adds, ``[layers, prompts, hidden]``.
        mlp: likewise, of each MLP.
        state: output of the last layer, ``[prompts, hidden]``.
        logits: output of the output layer, ``[prompts, vocabulary]``.
    """

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]]) -> None:
        layers: Any = decoder_layers(model)
        self._heads = text_config(model.config).num_attention_heads
        ids, mask = right_padded(prompts, next(model.parameters()).device)
        self._at, self._shape = (torch.arange(len(ids), device=ids.device), mask.sum(1) - 1), ids.shape
        # Names are (layer, part). Inputs of norms are read to find the norms on outputs of attention and MLP.
        self._inputs: dict[Any, nn.Module] = {(0, "layer"): layers[0]}
        self._outputs: dict[Any, nn.Module] = {(len(layers) - 1, "layer"): layers[-1]}
        for number, layer in enumerate(layers):
            children = dict(layer.named_children())
            attention = _child(children, ATTENTION, number)
            self._outputs[number, "attention"] = attention
            self._outputs[number, "mlp"] = _child(children, (*MLP, *READERS), number)
            self._inputs[number, "heads"] = _child(dict(attention.named_children()), PROJECTIONS, number)
            norms = {(number, name): m for name, m in children.items() if "norm" in type(m).__name__.lower()}
            self._inputs |= norms
            self._outputs |= norms
        self._read: dict[Any, Tensor] = {}
        self._written: dict[Any, Tensor] = {}
        self._norms: dict[Any, Any] = {}  # name of an attention or MLP -> name of the norm on its output
        self._latest: dict[Any, Tensor] = {}  # whole outputs of the current layer's attention and MLP
        logits: list[Tensor] = []
        head = {"head": model.get_output_embeddings()}
        with (
            hooked(self._inputs, self._enter, inputs=True),
            hooked(self._outputs, self._leave),
            hooked(head, lambda _, hidden: hidden[self._at][:, None], inputs=True),
            hooked(head, lambda _, value: logits.append(value)),
        ):
            model(input_ids=ids, attention_mask=mask, use_cache=False)
        self._latest.clear()
        self.embedding, self.logits = self._read[0, "layer"], logits[0][:, 0]
        self.state = self._written[len(layers) - 1, "layer"]
        self.attention, self.mlp = (
            torch.stack([self._written[self._norms.get((n, part), (n, part))] for n in range(len(layers))])
            for part in ("attention", "mlp")
        )

    def _enter(self, name: Any, x: Tensor) -> None:
        self._read[name] = self._last(x)
        for branch, output in self._latest.items():
            if x is output:
                self._norms[branch] = name

    def _leave(self, name: Any, y: Tensor) -> None:
        self._written[name] = self._last(y)
        if name[1] in ("attention", "mlp"):
            self._latest = {branch: t for branch, t in self._latest.items() if branch[0] == name[0]} | {name: y}

    def _last(self, x: Tensor) -> Tensor:
        x = x.unflatten(0, self._shape) if x.dim() == 2 else x  # OPT's MLP flattens prompts and tokens
        return x[self._at].double().cpu()

    def heads(self) -> Tensor:
        """Return what each head adds, ``[layers, heads, prompts, hidden]``."""
        found = []
        for (number, part), projection in self._inputs.items():
            if part != "heads":
                continue
            x = self._read[number, "heads"]
            size = x.shape[1] // self._heads
            alone = torch.zeros(self._heads, *x.shape, dtype=x.dtype)
            for head in range(self._heads):
                own = slice(head * size, (head + 1) * size)
                alone[head, :, own] = x[:, own]
            weight = next(projection.parameters())
            # The projection of nothing is its bias, which belongs to no head.
            nothing = projection(torch.zeros_like(x[:1]).to(weight))
            added = (projection(alone.flatten(0, 1).to(weight)) - nothing).double().cpu().unflatten(0, alone.shape[:2])
            if (norm := self._norms.get((number, "attention"))) is not None:
                added = FrozenNorm.at(self._outputs[norm], self._written[number, "attention"])(added)
            found.append(added)
        return torch.stack(found)


def _child(children: dict[str, nn.Module], names: Sequence[str], number: int) -> nn.Module:
    """Return the first of a module's children that has one of some names.

    Raises:
        InputError: if there is none.
    """
    for name in names:
        if name in children:
            return children[name]
    raise InputError(
        f"attribution needs a part called one of {', '.join(names)} in decoder layer {number}, which has"
        f" {', '.join(children)}."
    )


def _check_sum(total: Tensor, whole: Tensor, what: str, weight: Tensor, sizes: Tensor | None = None) -> None:
    """Refuse a sum that misses its whole by more than rounding.

    Args:
        total: the sum.
        whole: what it should be.
        what: name of the parts, for the error.
        weight: a weight of the model, whose type sets the tolerance.
        sizes: what the error is relative to; the largest entry of ``whole`` by default.
    """
    scale = whole.abs().max() if sizes is None else sizes.max()
    error = float((total - whole).abs().max() / scale.clamp_min(1e-12))
    if not error <= TOLERANCE.get(weight.dtype, 5e-2):
        raise InputError(
            f"attribution: the {what} of this model do not sum to the whole (relative error {error:.2g}), so the family"
            " combines its parts in a way that is not known here. Leave this analysis out."
        )


@dataclass(frozen=True)
class Attribution(Analysis):
    r"""Which attention heads and MLPs write the first token's refusal, as terms that sum to a logit difference.

    The difference is the mean logit of the refusing tokens less that of the complying tokens, after harmful prompts. A
    refusing token opens more of the aligned model's refusals than of its other answers to the first 40 harmful and 40
    ordinary prompts, and a complying token the reverse. All models of an arm share both.

    Rows: ``logit_difference`` in nats, and its terms ``contribution`` in nats: of ``embedding`` and ``bias`` (layer
    None), and of ``attention``, ``mlp`` and ``head N`` of each layer. Attention, MLPs, embedding and bias sum to the
    difference. The heads of a layer sum to its attention, up to the bias of its projection. The intervals are 95 % over
    prompts.

    Args:
        prompts: harmful prompts, >= 2.

    Cost: one forward pass per prompt, and the aligned model's short answers to 80 prompts once.
    Source: Elhage et al., "A Mathematical Framework for Transformer Circuits", 2021; Leong et al., "No Two Devils
    Alike", 2024, arXiv:2405.16229.
    Differs: the complying tokens come from the aligned model's answers to ordinary prompts. An attacked model may
    comply in other words. A term is a direct effect only: what a head changes in later layers counts as theirs.
    """

    prompts: int = 40

    seconds: ClassVar[float] = 20.0

    def __post_init__(self) -> None:
        if self.prompts < 2:
            raise ValueError(f"Attribution: prompts must be >= 2, got {self.prompts}.")

    @override
    def measure(self, part: Part, view: View) -> list[Row]:
        refusing, complying = view.openings(40), view.compliances(40)
        prompts = view.prompts("harmful", self.prompts)
        batches = [
            attribution(view.model, prompts[at : at + 16], refusing, complying) for at in range(0, len(prompts), 16)
        ]

        def joined(name: str) -> Tensor:
            return torch.cat([getattr(one, name) for one in batches], dim=-1)

        rows = [mean_row("logit_difference", joined("difference"))]
        rows += [mean_row("contribution", joined(name), None, name) for name in ("embedding", "bias")]
        for name in ("attention", "mlp"):
            rows += [mean_row("contribution", one, layer, name) for layer, one in enumerate(joined(name))]
        heads = joined("heads")
        rows += [
            mean_row("contribution", one, layer, f"head {head}")
            for layer, some in enumerate(heads)
            for head, one in enumerate(some)
        ]
        return rows

    @override
    def pictures(self, rows: Sequence[Row]) -> Iterator[Picture]:
        yield Picture(
            "attribution_layers",
            "Which layers write the refusal",
            "Contribution of each layer's attention and MLP to the logit difference of refusing against complying first"
            " tokens, mean over harmful prompts, in nats. Above 0 a part speaks for refusing. The bars of a model, its"
            " embedding and its biases sum to the difference in its title. Lines: 95 % intervals over prompts.",
            layers_figure(rows),
        )
        yield Picture(
            "attribution_heads",
            "Which heads write the refusal",
            "Contribution of each attention head, mean over harmful prompts, in nats. Blue heads write the refusal, red"
            " ones write against it. Compare a model after its attack with the aligned model. Intervals are in the"
            " table.",
            heads_figure(rows),
        )


@styled
def layers_figure(rows: Sequence[Row]) -> Figure:
    """Draw the contributions of attention and MLPs as bars over the layers, one panel per model."""
    models = of(rows, "contribution")
    totals = {key: some[0].value for key, some in of(rows, "logit_difference").items()}
    figure, grid = grid_canvas(len(models), 1, height=1.7, sharey=True, sharex=True)
    for (key, some), axes in zip(models.items(), grid.flat, strict=True):
        for side, (part, color) in enumerate((("attention", PALETTE[1]), ("mlp", PALETTE[2]))):
            own = [r for r in some if r.position == part and r.layer is not None]
            x = [(r.layer or 0) + 0.4 * side - 0.2 for r in own]
            axes.bar(x, [r.value for r in own], width=0.4, color=color, label="MLP" if part == "mlp" else part)
            ends = [(r.value if r.low is None else r.low, r.value if r.high is None else r.high) for r in own]
            axes.vlines(x, [low for low, _ in ends], [high for _, high in ends], color=INK, lw=0.7)
        axes.axhline(0, color=MUTED, lw=0.8)
        axes.set_title(f"{label(*key)}: difference {totals[key]:+.1f} nats")
        axes.set_ylabel("nats")
    grid.flat[-1].set_xlabel("decoder layer")
    handles = grid.flat[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False)
    return figure


def heads_figure(rows: Sequence[Row]) -> Figure:
    """Draw the contributions of the heads, head by layer, one panel per model."""
    panels = {}
    for key, some in of(rows, "contribution").items():
        heads = [r for r in some if str(r.position).startswith("head ")]
        panels[label(*key)] = layer_grid(heads, lambda r: str(r.position).removeprefix("head "))
    return heat_maps(panels, "head", "decoder layer", "nats")
