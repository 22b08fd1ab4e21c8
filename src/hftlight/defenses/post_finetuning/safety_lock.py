"""SafetyLock: after fine-tuning, write the safety directions of attention heads into biases."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from hftlight.engine.step.activations import ATTENTION, hooked, modules_called
from hftlight.engine.step.defense import Loader
from hftlight.engine.step.order import rank_and_world
from hftlight.engine.step.vectors import local
from hftlight.engine.weights.aligned import at_aligned, merge
from hftlight.engine.weights.biases import check_biases, open_biases
from hftlight.engine.weights.lora import has_adapter, lora_updates
from hftlight.engine.weights.masks import whole_rows
from hftlight.engine.weights.repair import Repair
from hftlight.engine.weights.scores import IGNORED, Batch, calibration, undisturbed, without_end
from hftlight.engine.weights.shards import share
from hftlight.engine.weights.stored import plain_name
from hftlight.engine.weights.subject import Subject
from hftlight.models.module import SafetyModule, decoder_layers
from hftlight.models.repaired import repair_model

OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj")  # the layer of an attention that reads the heads
SHRINKAGE = 0.1  # share of the probe's covariance that a multiple of the identity replaces


def head_directions(safe: Tensor, unsafe: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return :math:`\theta = (\bar x_{safe} - \bar x_{unsafe}) / \|\cdot\|_2` and :math:`\sigma` of each head.

    :math:`\sigma` is the standard deviation of :math:`\theta^T x` over all x, safe and unsafe. If the means are equal,
    :math:`\theta` is zero.

    Args:
        safe: head outputs x at tokens of safe answers, ``[tokens, heads, head_dim]``.
        unsafe: likewise for unsafe answers.

    Returns:
        :math:`\theta`, ``[heads, head_dim]``, and :math:`\sigma`, ``[heads]``, in the unit of x.
    """
    gap = safe.mean(dim=0) - unsafe.mean(dim=0)
    theta = gap / gap.norm(dim=1, keepdim=True).clamp_min(torch.finfo(gap.dtype).tiny)
    along = torch.einsum("thd,hd->th", torch.cat([safe, unsafe]), theta)
    return theta, along.std(dim=0, correction=0)


def linear_probes(safe: Tensor, unsafe: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return w and c of the linear discriminant :math:`w^T x - c` of each head, positive for safe answers.

    .. math:: w = S^{-1} (\mu_s - \mu_u), \qquad c = w^T (\mu_s + \mu_u) / 2

    with the class means :math:`\mu`. S is the covariance within the classes. A tenth of it is replaced by the multiple
    of the identity that has the same trace.

    Args:
        safe: as for ``head_directions``.
        unsafe: likewise.

    Returns:
        w, ``[heads, head_dim]``, and c, ``[heads]``.
    """
    means = safe.mean(dim=0), unsafe.mean(dim=0)
    centred = torch.cat([safe - means[0], unsafe - means[1]])
    covariance = torch.einsum("thd,the->hde", centred, centred) / len(centred)
    mean_variance = covariance.diagonal(dim1=1, dim2=2).mean(dim=1).clamp_min(torch.finfo(covariance.dtype).tiny)
    identity = torch.eye(covariance.shape[1], dtype=covariance.dtype, device=covariance.device)
    covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * mean_variance[:, None, None] * identity
    w = torch.linalg.solve(covariance, means[0] - means[1])
    return w, (w * (means[0] + means[1])).sum(dim=1) / 2


def probe_quality(w: Tensor, c: Tensor, safe: Tensor, unsafe: Tensor) -> tuple[Tensor, Tensor]:
    """Return the accuracy of each head's probe, and how far apart its values of the two classes lie.

    Args:
        w: from ``linear_probes``.
        c: likewise.
        safe: as for ``head_directions``, from other prompts than those of the probe.
        unsafe: likewise.

    Returns:
        The mean of the accuracies on the two classes, in [0, 1], and the gap of the class means in standard deviations
        within the classes, each ``[heads]``.
    """
    of_safe, of_unsafe = (torch.einsum("thd,hd->th", x, w) - c for x in (safe, unsafe))
    accuracy = ((of_safe > 0).to(w).mean(dim=0) + (of_unsafe <= 0).to(w).mean(dim=0)) / 2
    variance = (of_safe.var(dim=0, correction=0) + of_unsafe.var(dim=0, correction=0)) / 2
    gap = of_safe.mean(dim=0) - of_unsafe.mean(dim=0)
    return accuracy, gap / variance.sqrt().clamp_min(torch.finfo(gap.dtype).tiny)


def ranked_heads(accuracy: Tensor, separation: Tensor) -> list[tuple[int, int]]:
    """Return all heads as pairs (layer, head), by falling accuracy.

    A tie goes to the head with the larger separation, then to the earlier head.

    Args:
        accuracy: ``[layers, heads]``.
        separation: likewise.
    """
    layers, heads = accuracy.shape
    places = [(layer, head) for layer in range(layers) for head in range(heads)]
    return sorted(places, key=lambda p: (-float(accuracy[p]), -float(separation[p])))


def last_response_tokens(labels: Tensor, count: int) -> Tensor:
    """Return the mask of the last ``count`` response tokens of each row, ``[rows, tokens]``.

    Args:
        labels: ``[rows, tokens]``, -100 outside the response.
        count: number of tokens, >= 1; a shorter response has all its tokens in the mask.
    """
    response = labels != IGNORED
    behind = response.flip(1).cumsum(dim=1).flip(1)  # response tokens from here to the end
    return response & (behind <= count)


def prompt_digests(batch: Batch) -> list[str]:
    """Return the SHA-256 of each row's prompt tokens, which stand before its first response token."""
    rows = zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), batch["labels"].tolist(), strict=True)
    digests = []
    for ids, mask, labels in rows:
        start = next((k for k, label in enumerate(labels) if label != IGNORED), len(ids))
        prompt = [i for i, real in zip(ids[:start], mask[:start], strict=True) if real]
        digests.append(hashlib.sha256(repr(prompt).encode()).hexdigest())
    return digests


def validation_prompts(digests: Iterable[str], fraction: float) -> set[str]:
    """Return the digests of the prompts that probes are validated on, the smallest ones.

    Args:
        digests: one per row; equal prompts have equal digests and stay together.
        fraction: fraction of the different prompts, in (0, 1). At least one prompt is on each side.

    Raises:
        ValueError: if there are fewer than two different prompts.
    """
    different = sorted(set(digests))
    if len(different) < 2:
        raise ValueError(
            f"SafetyLock: probes are trained and validated on different prompts, but the stream 'pairs' has"
            f" {len(different)}. Give pairs of at least two prompts."
        )
    return set(different[: min(max(1, round(fraction * len(different))), len(different) - 1)])


class SafetyLock(Repair):
    r"""Write the directions along which attention heads tell safe from unsafe answers into biases.

    Let x be the output of one attention head, before the output projection :math:`W_o`, at the last tokens of an
    answer. It is measured at the aligned model, on safe and unsafe answers to the same prompts. For the ``heads`` heads
    whose linear probe tells the two kinds apart best on prompts that it was not trained on,

    .. math:: \theta = \frac{\bar x_{safe} - \bar x_{unsafe}}{\|\bar x_{safe} - \bar x_{unsafe}\|_2}, \qquad
              b_o \leftarrow b_o + W_o^{(head)} \, a \sigma \theta

    with the strength a, the standard deviation :math:`\sigma` of :math:`\theta^T x`, the columns
    :math:`W_o^{(head)}` of the fine-tuned model that read the head, and the bias :math:`b_o` of the output projection.
    The head's output is thus shifted by a constant toward safe answers, at every token.

    The result is a whole model, with the adapter added to the weights. A family such as Llama has these biases if
    ``attention_bias`` is set in its configuration, so the setting is switched on, and the biases of queries, keys and
    values are zero. Plain transformers then loads the model. A family that cannot have a bias there is refused.

    The shift is a linear edit that anybody with the weights can undo. A negative strength would unlock the model, and
    is refused.

    Args:
        heads: K, number of heads to shift, >= 1, at most all heads of the model. With grouped queries, these are query
            heads.
        strength: a, in standard deviations of the head's output along its direction, >= 0; 0 turns it off.
        tokens: number of the last tokens of each answer at which heads are measured, >= 1.
        samples: largest number of pairs that are measured, over all ranks, >= 2, chosen from the whole stream.
        validation: fraction of the prompts on which probes are validated, in (0, 1). The others train the probes.
        streams: loader of the stream ``"pairs"`` (prompts with a safe and an unsafe answer, the defender's own). It is
            needed only if the data module does not offer that stream. It is read once.
        output: as in ``Repair``.
        aligned: as in ``Repair``.

    Raises:
        ValueError: if an argument is out of range, or the model has fewer heads than ``heads``.
        TypeError: if the model's family cannot have a bias at the output projection.
        RuntimeError: if the aligned weights are not known.

    Cost: two forward passes per pair, once, and no backward pass. The head outputs lie in memory: with 100 pairs, 5
        tokens and 32 layers of width 4096 they take 0.5 GB in float32. The probes solve one system of size head_dim per
        head. The model gets one bias per output projection.
    Source: Zhu et al., "Locking Down the Finetuned LLMs Safety", arXiv:2410.10343. The choice of heads, the shift and
        the defaults are those of the official code.
    Differs: prompts are split, so that no prompt trains and validates a probe. The official code splits tokens, so that
        one answer is on both sides, and it adds the accuracy on its training tokens. The probe is a linear discriminant
        in closed form, not a logistic regression, and its accuracy weighs both kinds of answers alike. Ties go to the
        head whose values lie further apart. Directions and deviations use all pairs. The width of a head is that of the
        output projection's input divided by the number of query heads, not that of the hidden states. The end token of
        an answer is left out, since a served model never reads it, and padding is masked. The configuration is changed
        with the biases. The official code leaves the configuration as it is, so that a reload ignores the biases.
    """

    streams = ("pairs",)
    needs = ("aligned",)
    dials = ("heads", "strength")
    adds_parameters = True
    repair_order = 30  # last: the output projections must be final
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "repo": {"heads": 24, "strength": 6.0, "tokens": 5, "samples": 100, "validation": 0.4},
    }

    def __init__(
        self,
        heads: int = 24,
        strength: float = 6.0,
        tokens: int = 5,
        samples: int = 100,
        validation: float = 0.4,
        streams: Mapping[str, Loader] | None = None,
        output: str | None = None,
        aligned: str | None = None,
    ) -> None:
        for name, count, least, of in (
            ("heads", heads, 1, "attention heads"),
            ("tokens", tokens, 1, "tokens"),
            ("samples", samples, 2, "pairs"),
        ):
            if not (count >= least and float(count).is_integer()):
                raise ValueError(f"SafetyLock: {name} counts {of} and must be a whole number >= {least}, got {count}.")
        if not 0 <= strength < float("inf"):
            why = " A negative strength would shift heads toward unsafe answers." if strength < 0 else ""
            raise ValueError(f"SafetyLock: strength must be >= 0 and finite (0 turns it off), got {strength}.{why}")
        if not 0 < validation < 1:
            raise ValueError(f"SafetyLock: validation is a fraction of the prompts in (0, 1), got {validation}.")
        super().__init__(streams, output, aligned)
        self.heads, self.strength, self.tokens = heads, strength, tokens
        self.samples, self.validation = samples, validation

    @property
    @override
    def neutral(self) -> bool:
        return self.strength == 0

    @override
    def check_model(self, model: nn.Module) -> None:
        outputs = _outputs(model)
        total = len(outputs) * _heads(model)
        if self.heads > total:
            raise ValueError(
                f"SafetyLock: heads is {self.heads}, but the model has {total} attention heads. Lower heads."
            )
        check_biases(model, _without_bias(outputs), "SafetyLock")
        for name, update in (lora_updates(model) if has_adapter(model) else {}).items():
            if update.weight.dtype not in (torch.float32, torch.float64):
                raise TypeError(
                    f"SafetyLock: the result is a whole model, so the update is added to {name}, which is stored in"
                    f" {update.weight.dtype}. In this type most of a small update would round away. Load the model in"
                    " float32."
                )

    @override
    def scored(self, subject: Subject) -> dict[str, Tensor]:
        model = subject.model
        self.check_model(model)
        if subject.aligned is None and (subject.dense or not has_adapter(model)):
            raise RuntimeError(
                "SafetyLock: it needs the aligned model, which is no longer under the adapter; give aligned=..., or"
                " apply SafetyLock to the fine-tuned model, not to a repaired one."
            )
        outputs, heads = _outputs(model), _heads(model)
        pairs = calibration(map(_side_by_side, subject.batches("pairs")), self.samples, subject.split, spread=True)
        with at_aligned(subject, "SafetyLock"), undisturbed(model, next(model.parameters()).device):
            answers = [self._answers(subject, outputs, pairs, kind) for kind in ("", "rejected_")]
        prompts = [_everyone([digest for digest, _ in rows], subject.split) for _, rows in answers]
        if odd := sum(safe != unsafe for safe, unsafe in zip(*prompts, strict=True)):
            raise ValueError(
                f"SafetyLock: the two answers of a pair must have one prompt, but {odd} of {len(prompts[0])} pairs have"
                " two. Put the safe answer to each prompt before the unsafe one."
            )
        held_out = validation_prompts(prompts[0], self.validation)
        # By kind of answer: whether each token's prompt validates the probes.
        sides = []
        for digests, (_, rows) in zip(prompts, answers, strict=True):
            counts = torch.tensor(_everyone([count for _, count in rows], subject.split))
            sides.append(torch.tensor([d in held_out for d in digests]).repeat_interleave(counts))
        scores: dict[str, list[Tensor]] = {name: [] for name in ("accuracy", "separation", "theta", "sigma")}
        for name in outputs:
            # Heads are contiguous in the projection's input: [tokens, heads * head_dim].
            safe, unsafe = (
                torch.cat(_everyone(found.pop(name), subject.split)).double().unflatten(1, (heads, -1))
                for found, _ in answers
            )
            w, c = linear_probes(safe[~sides[0]], unsafe[~sides[1]])
            quality = probe_quality(w, c, safe[sides[0]], unsafe[sides[1]])
            for key, value in zip(scores, (*quality, *head_directions(safe, unsafe)), strict=True):
                scores[key].append(value)
        numbers = torch.tensor([len(set(prompts[0])) - len(held_out), len(held_out), *map(len, sides)])
        return {**{key: torch.stack(values) for key, values in scores.items()}, "numbers": numbers}

    @override
    def edit(self, subject: Subject) -> None:
        model, scores = subject.model, subject.scores
        self.check_model(model)
        outputs = _outputs(model)
        chosen = ranked_heads(scores["accuracy"], scores["separation"])[: self.heads]
        shifts = torch.zeros_like(scores["theta"])
        for place in chosen:
            shifts[place] = self.strength * scores["sigma"][place] * scores["theta"][place]
        if has_adapter(model) and not subject.dense:
            for update in lora_updates(model).values():
                merge(update)
            subject.dense = True
        missing = _without_bias(outputs)
        switch = open_biases(model, missing, "SafetyLock") if missing else None
        changed = sum(_add_bias(layer, shift) for layer, shift in zip(outputs.values(), shifts, strict=True))
        train, validation, safe, unsafe = scores["numbers"].tolist()
        names = list(outputs)
        subject.report |= {
            "heads": [
                {
                    "weight": names[layer],
                    "head": head,
                    "accuracy": float(scores["accuracy"][layer, head]),
                    "separation": float(scores["separation"][layer, head]),
                    "sigma": float(scores["sigma"][layer, head]),
                }
                for layer, head in chosen
            ],
            "mean_accuracy": float(scores["accuracy"].mean()),
            "training_prompts": train,
            "validation_prompts": validation,
            "safe_tokens": safe,
            "unsafe_tokens": unsafe,
            "switched_on": switch,
            "changed_entries": changed,
        }
        if not changed:
            subject.report["unchanged_because"] = "the chosen heads have the same output on safe and unsafe answers."

    def _answers(
        self, subject: Subject, outputs: Mapping[str, nn.Module], pairs: Sequence[tuple[Batch, int]], kind: str
    ) -> tuple[dict[str, list[Tensor]], list[tuple[str, int]]]:
        """Return the inputs of the output projections at the last tokens of one kind of answers.

        Args:
            subject: the model, at the weights that are measured.
            outputs: the output projections by name.
            pairs: from ``calibration``, side by side.
            kind: what the names of this kind begin with in a batch.

        Returns:
            Tensors ``[tokens, inputs]`` by name on the CPU, and the digest of each row's prompt with the row's number
            of tokens.
        """
        found: dict[str, list[Tensor]] = {name: [] for name in outputs}
        rows: list[tuple[str, int]] = []
        module, keep = SafetyModule(subject.model), torch.zeros(0, dtype=torch.bool)

        def add(name: str, x: Tensor) -> None:
            found[name].append(x[keep].to(torch.promote_types(x.dtype, torch.float32)).cpu())

        with torch.no_grad(), hooked(outputs, add, inputs=True):
            for both, counted in pairs:
                batch = {key: both[kind + key] for key in ("input_ids", "attention_mask", "labels")}
                keep = last_response_tokens(without_end(batch)["labels"], self.tokens)
                keep[counted:] = False
                counts = keep.sum(dim=1).tolist()
                rows += list(zip(prompt_digests(batch), counts, strict=True))[:counted]
                with subject.context():
                    module.loss(batch)
        return found, rows


def _side_by_side(batch: Batch) -> dict[str, Any]:
    """Return a batch of pairs with one row per pair: the safe answers, and the unsafe ones under ``rejected_...``.

    Raises:
        ValueError: if the batch does not hold pairs.
    """
    if not batch.get("pairs"):
        raise ValueError(
            "SafetyLock: a batch of the stream 'pairs' must hold two rows for each prompt, first the safe and then the"
            " unsafe answer, and their number under 'pairs', as StreamsDataModule(pairs=...) makes it."
        )
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor) and value.dim() > 0}
    return {k: v[0::2] for k, v in tensors.items()} | {f"rejected_{k}": v[1::2] for k, v in tensors.items()}


def _everyone(values: list[Any], split: bool) -> list[Any]:
    """Return the values of all ranks one after the other, if the ranks hold different batches."""
    if not split or rank_and_world()[1] == 1:
        return values
    lists: list[Any] = [None] * rank_and_world()[1]
    dist.all_gather_object(lists, values)
    return [value for theirs in lists for value in theirs]


def _linear(layer: nn.Module) -> Any:
    """Return the layer under an adapter, or the layer itself."""
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer  # type: ignore[operator]


def _heads(model: Any) -> int:
    return int(model.config.get_text_config().num_attention_heads)


def _outputs(model: nn.Module) -> dict[str, nn.Module]:
    """Return the output projection of each decoder layer's attention, by the plain name of its weight.

    Raises:
        TypeError: if there is none, or one is no linear layer, is quantized, or does not read whole heads.
    """
    names = {module: plain_name(name) for name, module in model.named_modules()}
    outputs: dict[str, nn.Module] = {}
    for layer in decoder_layers(model):
        try:
            blocks = modules_called(layer, ATTENTION).values()
        except ValueError:  # a layer without attention, as in hybrid models
            continue
        for block in blocks:
            parts = dict(block.named_children())
            outputs |= {f"{names[parts[n]]}.weight": parts[n] for n in OUTPUTS if n in parts}
    if not outputs:
        raise TypeError(f"SafetyLock: no attention of {type(model).__name__} has one of the layers {list(OUTPUTS)}.")
    heads, widths = _heads(model), set[int]()
    for name, output in outputs.items():
        linear = _linear(output)
        if not isinstance(linear, nn.Linear) or not linear.weight.is_floating_point():
            what = "quantized" if isinstance(linear, nn.Linear) else f"a {type(linear).__name__}"
            raise TypeError(f"SafetyLock: {name} is {what}; heads are read by linear layers that are not quantized.")
        widths.add(linear.in_features)
    if len(widths) > 1 or min(widths) % heads:
        raise TypeError(
            f"SafetyLock: the output projections must all read {heads} heads of one width, got inputs {sorted(widths)}."
        )
    return outputs


def _without_bias(outputs: Mapping[str, nn.Module]) -> list[str]:
    """Return the plain names of the biases that output projections lack."""
    return [f"{name.removesuffix('weight')}bias" for name, o in outputs.items() if _linear(o).bias is None]


def _add_bias(output: nn.Module, shift: Tensor) -> int:
    """Add ``W_o shift`` to the bias, and return the number of changed entries. The shift is ``[heads, head_dim]``."""
    linear = _linear(output)
    weight, rows = local(linear.weight.detach()), share(linear.bias)
    moved = weight.to(torch.promote_types(weight.dtype, torch.float32)) @ shift.flatten().to(weight.device).to(
        torch.promote_types(weight.dtype, torch.float32)
    )
    moved = whole_rows(moved[:, None], linear.weight)[rows.start : rows.stop, 0]
    bias = local(linear.bias.detach())
    new = (bias + moved).to(bias.dtype)
    changed = (new != bias).sum()
    bias.copy_(new)
    return int(rows.sum(changed)[0])


def safety_lock(model: nn.Module | str | Path, batches: Iterable[Any], **arguments: Any) -> dict[str, Any]:
    """Repair a fine-tuned model with SafetyLock in one call, without Lightning.

    Args:
        model: a PEFT model whose active adapter is the user's update, or a causal LM with all parameters trained; the
            latter needs ``aligned=...``. It is changed in memory. Or the folder of either, which stays unchanged.
        batches: pairs, the defender's own: dictionaries with ``input_ids``, ``attention_mask`` and ``labels``, int64
            ``[batch, tokens]``, and ``pairs``, the number of pairs. Rows 0, 2, 4, ... hold the safe answers, and each
            is followed by the unsafe answer to its prompt. They are read once.
        **arguments: further arguments of ``SafetyLock``, such as ``output``, the folder for the repaired model.

    Returns:
        The report: the chosen heads with accuracy, separation and deviation.

    Raises:
        RuntimeError: if the model is already repaired.
        ValueError: if an argument of ``SafetyLock`` is out of range, or a folder is repaired without ``output``.
    """
    return repair_model(SafetyLock(**arguments), model, batches)
