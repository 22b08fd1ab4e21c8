"""RepNoise: turn the hidden states of harmful answers into noise, so that harmful training finds nothing."""

import math
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from hftlight.data.tokens import IGNORED
from hftlight.engine.ascent import Ascent, Form, bounded, head_mean
from hftlight.engine.step.activations import captured, hooked, modules_called
from hftlight.engine.step.defense import Defense
from hftlight.engine.step.order import rank_and_world, trainer_seed
from hftlight.engine.step.passes import Passes, add_to_grad, gradient
from hftlight.engine.step.simulation import draws
from hftlight.engine.step.slots import Slot, Stage
from hftlight.engine.step.vectors import Vector, scaled
from hftlight.engine.weights.lora import has_adapter
from hftlight.models.module import Forward, decoder_layers, final_norm

MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe")  # what the MLP is called in decoder layers
KERNELS = 5  # Gaussian kernels of the discrepancy, each with twice the bandwidth of the one before
# Discrepancy of two matched samples in many dimensions, times their size: all distances are equal there.
FLOOR = 2 * (KERNELS - sum(math.exp(-4 / 2**i) for i in range(KERNELS)))


def discrepancy(x: Tensor, y: Tensor) -> Tensor:
    r"""Return the squared maximum mean discrepancy of two samples, 0-d, with five Gaussian kernels.

    .. math:: \frac{1}{B^2} \sum_{ij} k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(y_i, x_j), \qquad
              k(a, b) = \sum_{i=0}^{4} \exp\Big(-\frac{\|a - b\|^2}{2^{i}\, \bar d / 4}\Big)

    :math:`\bar d` is the mean squared distance of two different rows of both samples, without gradient. The statistic
    is the biased one, with the diagonal. At B = 1 its value is the same for any two rows.

    Args:
        x: first sample, ``[B, entries]``.
        y: second sample, likewise.
    """
    both, size = torch.cat([x, y]), len(x)
    squares = both.square().sum(1)
    distances = (squares[:, None] + squares[None, :] - 2 * both @ both.T).clamp_min(0)
    distances = distances * (1 - torch.eye(2 * size, dtype=both.dtype, device=both.device))
    width = distances.detach().sum() / (4 * size**2 - 2 * size) / 4
    width = width.clamp_min(torch.finfo(both.dtype).tiny)  # equal samples have distance 0 and no bandwidth
    kernel = sum(torch.exp(-distances / (width * 2**i)) for i in range(KERNELS))
    assert isinstance(kernel, Tensor)
    a, b = slice(None, size), slice(size, None)
    return (kernel[a, a] + kernel[b, b] - kernel[a, b] - kernel[b, a]).mean()


def own_tokens(labels: Tensor, other: Tensor) -> Tensor:
    """Return the mask of an answer's own tokens, bool ``[rows, tokens]``.

    A token is the answer's own if the other answer does not have it at the same place.

    Args:
        labels: labels of the answer's row, int64 ``[rows, tokens]``; -100 on prompt and padding.
        other: labels of the row with the other answer to the same prompt, likewise.
    """
    return (labels != IGNORED) & (labels != other)


def rounded(ids: Tensor, vocabulary: int) -> Tensor:
    """Return token ids as the port in the Booster repository changes them: rounded to bfloat16, here kept in range.

    Args:
        ids: token ids, int64 of any shape.
        vocabulary: number of token ids.
    """
    return ids.to(torch.bfloat16).to(torch.int64).clamp_max(vocabulary - 1)


class RepNoise(Defense):
    r"""Replace the hidden states of harmful answers by noise, while safe answers to the same prompts are learned.

    The stage trains on ``pairs``: prompts with a safe and a harmful answer. Let M select the tokens of an answer that
    the other answer does not have at the same place, and let :math:`\mathrm{CE}_M` be the mean cross-entropy of these
    tokens in nats. With decoder layers 1 to L, MLP outputs :math:`m_l` and hidden states :math:`h_0, \ldots, h_L` of
    the harmful answer, training minimizes

    .. math:: \mathrm{CE}_M(\text{safe}) + \beta \frac1L \sum_l \mathrm{MMD}(m_l M, \epsilon_l M) + \alpha\, a(S),
        \qquad a(S) = -\log(1 + S), \quad
        S = \frac{1}{L+1} \Big[ \mathrm{CE}_M(\text{harmful}) + \sum_{j=0}^{L} \mathrm{CE}_M(\text{head}(h_j)) \Big]

    Here :math:`\epsilon_l` is Gaussian noise, and ``head(h_j)`` is the model's own norm and output layer, applied to an
    earlier hidden state. The ascent term a raises the loss at every depth, so that no layer decodes the harmful answer.

    Args:
        noise_weight: beta, dimensionless, >= 0; 0 leaves the noise out.
        ascent_weight: alpha, dimensionless, >= 0; 0 leaves the ascent out.
        ascent: form of the ascent term, one of those of ``hftlight.engine.ascent.Ascent``. ``"log"`` is the paper's.
        bound: if set, the ascent's gradient is shortened to at most this fraction of the alignment's gradient, > 0.
        double_norm: whether :math:`h_L`, which is normalized already, passes the norm again, as in the official code.
        first_token: whether the first of several differing tokens counts. In the official code it is predicted from
            zeros, so that it adds log V without a gradient.
        labels: ``"exact"``, or ``"bfloat16"`` to round the harmful token ids as the port in the Booster repository
            does. Rounding changes 96 % of the ids of a vocabulary of 32,000, so that other tokens are unlearned.
        aligned_first: whether a run aligns plainly first and then hardens that model.

    Raises:
        ValueError: if an argument is out of range. Also if a micro-batch has one row, the two answers of a pair are
            equal, or the batches hold no rejected answers.
        TypeError: if a decoder layer has no MLP, or the model does not have one final norm.

    Cost: one more forward-backward pass per micro-batch, on the harmful answers, and L + 1 projections onto the
        vocabulary. Memory holds one hidden state per layer and differing token instead of their logits. With ``bound``
        set, the harmful pass runs twice. ``"npo"`` adds a forward pass of the aligned model.
    Source: Rosati et al., "Representation noising effectively prevents harmful fine-tuning on LLMs", NeurIPS 2024,
        arXiv:2405.14577; official code domenicrosati/representation-noising, whose loss decides where the paper's
        Equation 5 and Algorithm 1 disagree about alpha and beta.
    Differs: M covers response tokens only. The official mask includes padding where one answer has ended, and leaves
        out token 0. The ascent's gradient is computed layer by layer with the loss, and held instead of the logits.
        Noise depends on seed, step, layer and micro-batch, so that a resumed step repeats it. The discrepancy is
        computed in float32 per micro-batch and then averaged. Layers before the first trained weight have no noise
        term. Hooks are removed after each pass; the official code adds more at every call. Presets keep LoRA
        possible, the paper trains all parameters. ``booster_port`` keeps the rounded labels of a known-bad port and
        its ascent weight. Its unpaired batches and its mask over prompt and padding are not reproduced.
    """

    stage, slots, main = Stage.ALIGNMENT, (Slot.LOSS, Slot.GRADIENT), "pairs"
    claims = ("token weights",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"noise_weight": 1e-3, "ascent_weight": 1.0, "aligned_first": True},
        "repo": {"noise_weight": 1e-3, "ascent_weight": 1.0, "aligned_first": True, "first_token": False},
        "booster_port": {"noise_weight": 1e-3, "ascent_weight": 0.1, "first_token": False, "labels": "bfloat16"},
    }

    def __init__(
        self,
        noise_weight: float = 1e-3,
        ascent_weight: float = 1.0,
        ascent: Form = "log",
        bound: float | None = None,
        double_norm: bool = True,
        first_token: bool = True,
        labels: Literal["exact", "bfloat16"] = "exact",
        aligned_first: bool = False,
    ) -> None:
        for name, value in (("noise_weight", noise_weight), ("ascent_weight", ascent_weight)):
            if not 0 <= value < math.inf:
                raise ValueError(f"RepNoise: {name} must be >= 0 (0 turns it off), got {value}.")
        if bound is not None and not 0 < bound < math.inf:
            raise ValueError(f"RepNoise: bound is a fraction of the alignment's gradient and must be > 0, got {bound}.")
        if labels not in ("exact", "bfloat16"):
            raise ValueError(f"RepNoise: labels must be 'exact' or 'bfloat16', got {labels!r}.")
        try:
            self._form = Ascent(ascent)
        except ValueError as error:
            raise ValueError(f"RepNoise: {str(error).replace('form', 'ascent', 1)}") from error
        super().__init__()
        self.noise_weight, self.ascent_weight, self.ascent, self.bound = noise_weight, ascent_weight, ascent, bound
        self.double_norm, self.first_token, self.labels = double_norm, first_token, labels
        self.aligned_first = aligned_first
        runs = (noise_weight > 0 or ascent_weight > 0) + (self._bounding and noise_weight > 0)
        self.compares = compared = self._form.compares and ascent_weight > 0
        self.passes = (Passes(runs + compared, runs, per="batch", projected=ascent_weight > 0),) if runs else ()
        self._window: list[dict[str, Any]] = []
        self._noised: dict[str, float | Tensor] = {}

    @property
    def _bounding(self) -> bool:
        return self.bound is not None and self.ascent_weight > 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        model: nn.Module = pl_module.model  # type: ignore[assignment]
        try:
            mlps = self._mlps(model)
            final_norm(model)
        except (TypeError, ValueError) as error:
            raise TypeError(f"RepNoise: {error}") from error
        adapted = [part for mlp in mlps.values() for name, part in mlp.named_modules() if name.endswith("lora_A")]
        if self.noise_weight and has_adapter(model) and not adapted:
            warnings.warn(
                "RepNoise: no MLP has an adapter, so the noise acts on MLP outputs only through other layers. Add MLP"
                " layers such as gate_proj, up_proj and down_proj to the adapter's targets.",
                stacklevel=2,
            )
        # Rows may be cut to the same tokens, so the encoded answers are compared, before the first step.
        pairs = getattr(trainer, "datamodule", None) and trainer.datamodule.stream("pairs", 1).examples  # type: ignore[attr-defined]
        if same := next((e.id for e in pairs or () if e.rejected and e.input_ids == e.rejected.input_ids), None):
            raise ValueError(
                f"RepNoise: the two answers of a pair must differ, but those of row {same} are equal. Remove the row."
            )

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not isinstance(batch, Mapping) or "rejected" not in batch:
            raise ValueError(
                "RepNoise: each batch needs the rejected answers to its prompts. Give the Trainer"
                ' StreamsDataModule(..., main="pairs", pairs=rows).'
            )
        rejected = batch["rejected"]
        # The last batch of a pass may be shorter. If it has one row, it has no noise term.
        usual = getattr(getattr(trainer, "datamodule", None), "batch_size", 1)
        if self.noise_weight and len(rejected["labels"]) < 2 and usual < 2:
            raise ValueError(
                "RepNoise: the noise compares the rows of a micro-batch, so it needs at least 2 of them, got 1. Raise"
                " --alignment.batch_size, or set noise_weight=0."
            )
        self._window.append({**rejected, "safe_labels": batch["labels"]})

    @override
    def token_weights(self, forward: Forward) -> Tensor | None:
        """Return M over its mean, so that the mean of the weighted losses is the mean over the tokens of M."""
        batch = forward.batch
        # Position t predicts token t + 1, so the mask of the predicted tokens is shifted left by one.
        mask = own_tokens(batch["labels"], batch["rejected"]["labels"]).roll(-1, 1).flatten()[forward.positions]
        weights = mask.to(forward.token_losses.dtype)
        return weights / weights.mean()

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        window, self._window = self._window, []
        if not self.passes:
            return
        alignment: Vector = {n: p.grad for n, p in pl_module.named_parameters() if p.grad is not None}
        alignment = {name: grad.clone() for name, grad in alignment.items()} if self._bounding else {}
        terms = [(True, False), (False, True)] if self._bounding and self.noise_weight else [(True, True)]
        shown: dict[str, Tensor] = {}
        for micro, rejected in enumerate(window):
            for noise, ascent in terms:

                def loss(batch: Any, noise: bool = noise, ascent: bool = ascent, micro: int = micro) -> Tensor:
                    return self._harmful_loss(pl_module, batch, micro, noise, ascent, shown)

                term = scaled(gradient(pl_module, rejected, loss).grad, 1 / len(window))
                if self._bounding and ascent:
                    assert self.bound is not None
                    # The bound holds for the window: each of its micro-batches has an equal share.
                    term = bounded(
                        term,
                        {n: alignment.get(n, torch.zeros_like(t)) for n, t in term.items()},
                        self.bound / len(window),
                    )
                add_to_grad(pl_module, term)
        self.record(**{name.partition("/")[2]: value for name, value in shown.items()})
        self.show(shown)

    def _mlps(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the MLP of each decoder layer by the layer's number."""
        result = {}
        for number, layer in enumerate(decoder_layers(model)):
            matches = modules_called(layer, MLP)
            result[str(number)] = next(iter(matches.values()))
        return result

    def _harmful_loss(
        self,
        module: LightningModule,
        batch: Mapping[str, Any],
        micro: int,
        noise: bool,
        ascent: bool,
        shown: dict[str, Tensor],
    ) -> Tensor:
        """Return the noise and the ascent term of the harmful answers of one micro-batch, 0-d.

        Args:
            module: the module that trains.
            batch: rejected rows, with the labels of the safe rows as ``safe_labels``.
            micro: number of the micro-batch in its optimizer step, which enters the noise.
            noise: whether the noise term counts.
            ascent: whether the ascent term counts.
            shown: receives the terms, for the curves.
        """
        model: Any = module.model
        mask = own_tokens(batch["labels"], batch["safe_labels"])
        states, outputs = self._states(model, batch)
        total = torch.zeros((), device=mask.device)
        if noise and self.noise_weight and len(mask) > 1:
            value = self._noise(module, outputs, mask, micro)
            total = total + self.noise_weight * value
            shown["repnoise/noise"] = value.detach() - FLOOR / len(mask)
        if ascent and self.ascent_weight:
            mean = self._mean_loss(model, states, batch["labels"], mask, self._form)
            reference = self._reference_mean(module, batch, mask) if self._form.compares else None
            total = total + self.ascent_weight * self._form.of_mean(mean, reference)
            shown["repnoise/mean_loss"] = mean.detach()
        return total

    def _states(self, model: Any, batch: Mapping[str, Any]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return hidden states h_0 to h_L before the final norm, ``[rows, tokens, hidden]``, and the MLP outputs."""
        layers, first = list(decoder_layers(model)), list[Tensor]()

        def keep(_: str, hidden: Tensor) -> None:
            if not first:
                first.append(hidden)

        # The output layer sees one token only, because the loss applies it to the chosen tokens itself.
        def one(_: str, hidden: Tensor) -> Tensor:
            return hidden.flatten(0, 1)[:1]

        sites = {f"layer {i}": layer for i, layer in enumerate(layers)} | self._mlps(model)
        with (
            hooked({"embeddings": layers[0]}, keep, inputs=True),
            hooked({"head": model.get_output_embeddings()}, one, inputs=True),
            captured(sites) as outputs,
        ):
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        states = [first[0], *(outputs.pop(f"layer {i}") for i in range(len(layers)))]
        return states, outputs

    def _noise(self, module: LightningModule, outputs: Mapping[str, Tensor], mask: Tensor, micro: int) -> Tensor:
        """Return the mean discrepancy of MLP outputs and noise over the layers, 0-d."""
        layers, (rank, world) = len(outputs), rank_and_world()
        values = []
        for number, output in outputs.items():
            if not output.requires_grad:  # no trained weight lies before this layer
                continue
            # Numbered over all ranks, so that a step has the same noise however its micro-batches are dealt out.
            index = micro * world + rank
            where = f"repnoise/{number}/{index}"
            seed = draws(trainer_seed(), module.trainer.global_step, where).getrandbits(62)
            generator = torch.Generator(output.device).manual_seed(seed)
            # Exponentials of ratios of large sums need float32, also within autocast.
            with torch.autocast(output.device.type, enabled=False):
                own = output if output.dtype == torch.float64 else output.float()
                noise = torch.randn(own.shape, generator=generator, device=own.device, dtype=own.dtype)
                values.append(discrepancy(*((t * mask.unsqueeze(2)).flatten(1) for t in (own, noise))))
        return torch.stack(values).sum() / layers if values else torch.zeros((), device=mask.device)

    def _mean_loss(self, model: Any, states: list[Tensor], labels: Tensor, mask: Tensor, form: Ascent) -> Tensor:
        """Return S: the sum of the L + 2 masked losses over L + 1, 0-d, in nats."""
        norm, head = final_norm(model), model.get_output_embeddings()
        # Position t predicts token t + 1. The roll moves no mask to the end, since the first token is a prompt's.
        chosen = mask.roll(-1, 1).flatten().nonzero().squeeze(1)
        targets = labels.roll(-1, 1).flatten()[chosen]
        if self.labels == "bfloat16":
            targets = rounded(targets, head.weight.shape[0])
        hidden = [h.flatten(0, 1)[chosen] for h in states]
        last = norm(hidden[-1])
        inputs = [*(norm(h) for h in hidden[:-1]), norm(last) if self.double_norm else last, last]
        predicted = mask.flatten()[chosen]  # False for the first of several differing tokens
        cap = getattr(model.config, "final_logit_softcapping", None)

        def per_token(logits: Tensor, rows: Tensor) -> Tensor:
            logits = cap * torch.tanh(logits / cap) if cap else logits
            values = form.per_token(logits, targets[rows])
            return values if self.first_token else torch.where(predicted[rows], values, math.log(logits.shape[-1]))

        # The states that no trained weight precedes have no gradient, but their losses still count.
        groups = [[h for h in inputs if h.requires_grad is learns] for learns in (True, False)]
        everywhere = torch.arange(len(chosen), device=chosen.device)
        total = sum(len(g) * head_mean(torch.stack(g), head, everywhere, per_token) for g in groups if g)
        assert isinstance(total, Tensor)
        return total / len(states)

    def _reference_mean(self, module: Any, batch: Mapping[str, Any], mask: Tensor) -> Tensor:
        """Return S of the aligned model, without gradient."""
        with module.reference().at_work() as model:
            return self._mean_loss(model, self._states(model, batch)[0], batch["labels"], mask, self._form).detach()
