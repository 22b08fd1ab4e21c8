"""SOMF: learn by DPO which parts of the user's update are safe to keep."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from hftlight.engine.preference import dpo_loss
from hftlight.engine.step.activations import branched
from hftlight.engine.step.defense import Loader
from hftlight.engine.step.order import rank_and_world
from hftlight.engine.step.simulation import InnerAdamW, draws
from hftlight.engine.step.vectors import local, whole
from hftlight.engine.weights.aligned import at_aligned
from hftlight.engine.weights.lora import LoraUpdate, grows, has_adapter, lora_updates, put_factors, sharded
from hftlight.engine.weights.lowrank import LowRank, combined
from hftlight.engine.weights.repair import Repair, check_layout, linear_weights
from hftlight.engine.weights.scores import undisturbed
from hftlight.engine.weights.shards import share
from hftlight.engine.weights.stored import Adapted, Difference, Weights, displacement, plain_name, stored
from hftlight.engine.weights.subject import Subject
from hftlight.model_files import model_hash
from hftlight.models.module import SafetyModule
from hftlight.models.preference import answer_log_probs
from hftlight.models.repaired import repair_model

FLOOR = 0.05  # the mean of a mask by which the kept part is divided is at least this
BLOCK = 1024  # rows written at one time


def relaxed(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    r"""Return a relaxed Bernoulli sample :math:`\sigma((\phi + \log u - \log(1 - u)) / T)`.

    As T goes to 0, the sample is 1 with probability :math:`\sigma(\phi)`, else 0.

    Args:
        logits: :math:`\phi`, any shape.
        uniform: u, in (0, 1), likewise.
        temperature: T, > 0.
    """
    return torch.sigmoid((logits + uniform.log() - (-uniform).log1p()) / temperature)


def gate(mask: Tensor) -> Tensor:
    """Return ``mask / max(mean(mask), 0.05)``, which multiplies the parts of one weight's update.

    Args:
        mask: in [0, 1], any shape.
    """
    return mask / mask.mean().clamp_min(FLOOR)


@dataclass(frozen=True)
class _Part:
    """One linear layer whose update is masked.

    Attributes:
        layer: the layer, with its adapter.
        own: the update that the model in memory has, ``[out, in]``.
        vector: the weighted sum of all updates, which the mask selects from.
        unit: what has one logit.
    """

    layer: nn.Module
    own: LowRank | Tensor
    vector: LowRank | Tensor
    unit: str

    def logits(self) -> Tensor:
        """Return zeros: one per component ``[rank]``, row ``[out]`` or weight ``[out, in]``."""
        matrix = self.vector.b if isinstance(self.vector, LowRank) else self.vector
        shape = {
            "component": matrix.shape[1:],
            "row": matrix.shape[:1],
            "weight": self.vector.shape,
        }[self.unit]
        return torch.zeros(shape, dtype=torch.promote_types(matrix.dtype, torch.float32), device=matrix.device)

    def masked(self, gates: Tensor) -> LowRank | Tensor:
        """Return the sum of the updates with its parts multiplied by gates."""
        v = self.vector
        if isinstance(v, LowRank) and self.unit != "weight":
            return LowRank(v.b * (gates if self.unit == "component" else gates[:, None]), v.a, v.scale)
        dense = v.rows() if isinstance(v, LowRank) else v
        return dense * (gates if self.unit == "weight" else gates[:, None])

    def correction(self, x: Tensor, gates: Tensor) -> Tensor:
        """Return what turns the layer's present output into that of the masked update."""
        return _times(x, self.masked(gates)) - _times(x, self.own)


def _times(x: Tensor, matrix: LowRank | Tensor) -> Tensor:
    """Return ``x matrix^T``."""
    if isinstance(matrix, LowRank):
        return matrix.scale * ((x @ matrix.a.T.to(x.dtype)) @ matrix.b.T.to(x.dtype))
    return x @ matrix.T.to(x.dtype)


class SOMF(Repair):
    r"""Keep the parts of the user's update that a mask, learned from preferences, selects.

    Let :math:`\tau_t = W_t - W_{al}` be the updates of the user's model and of ``others``. In each weight

    .. math:: W' = W_{al} + \sum_t \lambda_t \frac{m \circ \tau_t}{\overline{m}}, \qquad
              m = \sigma\big((\phi + \log u - \log(1 - u)) / T\big)

    with the mean :math:`\overline{m}` of the weight's mask and fresh uniform noise u at every step. Only the logits
    :math:`\phi` are trained, from 0, by DPO on safe (:math:`y_w`) and rejected (:math:`y_l`) answers, against the
    aligned model. The repaired model has the binary mask :math:`m = [\phi > \text{threshold}]`, with the same division.

    Args:
        granularity: what has one logit. ``"component"``: a singular component of the update, so that the result stays
            an adapter. ``"row"``: an output row, which keeps an adapter as well. ``"weight"``: each weight, as in the
            paper. Under an adapter the result is then a whole model.
        steps: optimizer steps on the logits, one batch of pairs each, >= 1. The pairs are repeated as needed.
        lr: learning rate of AdamW on the logits, > 0.
        beta: strength of the preferences, per nat, > 0.
        temperature: T, > 0.
        weights: lambda of the user's update, then of each of ``others``, each finite.
        others: folders or hub ids of further models that were fine-tuned from the same aligned model.
        export: ``"map"`` keeps what has a logit above the threshold. ``"sampled"`` keeps it with probability
            :math:`\sigma(\phi)`, as the released code does.
        threshold: logit above which ``"map"`` keeps a part.
        units: ``"learned"``, or ``"random"`` for a control: as many random parts of each weight.
        streams: loader of the stream ``"pairs"``. It is needed only if the data module does not offer that stream.
        output: as in ``Repair``.
        aligned: as in ``Repair``.

    Raises:
        ValueError: if an argument is out of range, or ``weights`` and ``others`` do not fit each other.

    Cost: one forward and one backward pass over a batch of pairs per step, and one forward pass of the aligned model
        over all pairs. Logits take two moments each: thousands for components and rows, but three times the weights in
        float32 for ``"weight"``. With all parameters trained, the update of all linear layers is in memory.
    Source: Yi et al., "A Safety Realignment Framework via Subspace-Oriented Model Fusion for Large Language Models",
        arXiv:2405.09055; official code xinykou/safety_realignment.
    Differs: the default has one logit per component of the product B A. The official code has one per entry of A and
        of B, and one per weight with all parameters trained. Components are singular, so that they do not depend on the
        factors. The mean is at least 0.05, so that an empty mask gives the aligned model. The exported mask is that of
        the most probable values; the official code exports a random draw (``export="sampled"``). lambda acts on a
        single update too; the official code ignores it there. beta is no published value. A step takes one batch; the
        official code accumulates four batches of four pairs. With all parameters trained, only linear layers are
        masked and take part of ``others``. Other parameters keep their fine-tuned values. The random control is an
        addition.
    """

    streams, needs = ("pairs",), ("aligned",)
    dials = ("export", "threshold", "units")
    repair_order = 8
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "repo": {"granularity": "weight", "steps": 500, "lr": 1e-3, "temperature": 0.5, "export": "sampled"},
    }

    def __init__(
        self,
        granularity: Literal["component", "row", "weight"] = "component",
        steps: int = 500,
        lr: float = 1e-3,
        beta: float = 0.1,
        temperature: float = 0.5,
        weights: Sequence[float] = (1.0,),
        others: Sequence[str] = (),
        export: Literal["map", "sampled"] = "map",
        threshold: float = 0.0,
        units: Literal["learned", "random"] = "learned",
        streams: Mapping[str, Loader] | None = None,
        output: str | None = None,
        aligned: str | None = None,
    ) -> None:
        for name, value, allowed in (
            ("granularity", granularity, ("component", "row", "weight")),
            ("export", export, ("map", "sampled")),
            ("units", units, ("learned", "random")),
        ):
            if value not in allowed:
                raise ValueError(f"SOMF: {name} must be one of {list(allowed)}, got {value!r}.")
        if not (steps >= 1 and float(steps).is_integer()):
            raise ValueError(f"SOMF: steps counts optimizer steps and must be a whole number >= 1, got {steps}.")
        for name, number in (("lr", lr), ("beta", beta), ("temperature", temperature)):
            if not 0 < number < math.inf:
                raise ValueError(f"SOMF: {name} must be > 0 and finite, got {number}.")
        if math.isnan(threshold):
            raise ValueError(f"SOMF: threshold is a logit, got {threshold}.")
        if isinstance(others, str):
            raise ValueError(f"SOMF: others must list folders, got {others!r}.")
        if len(weights) != 1 + len(others) or not all(map(math.isfinite, weights)):
            raise ValueError(
                f"SOMF: weights must have one finite number for the user's update and one for each of others"
                f" ({1 + len(others)} in all), got {list(weights)}."
            )
        super().__init__(streams, output, aligned)
        self.granularity, self.steps, self.lr, self.beta = granularity, steps, lr, beta
        self.temperature, self.weights, self.others = temperature, tuple(weights), tuple(others)
        self.export, self.threshold, self.units = export, threshold, units
        self.trains = steps

    @override
    def identity(self) -> dict[str, Any]:
        return {"others": [model_hash(model) for model in self.others]} if self.others else {}

    @override
    def check_model(self, model: nn.Module) -> None:
        """Refuse a model whose updates have no components, or whose weights round an update away."""
        check_layout(model, "SOMF")
        if not has_adapter(model):
            self._check_unit(adapter=False)
        elif self.granularity == "weight":
            for name, update in lora_updates(model).items():
                if update.weight.dtype not in (torch.float32, torch.float64):
                    raise TypeError(
                        f"SOMF: granularity 'weight' adds the masked update to {name}, which is stored in"
                        f" {update.weight.dtype}. In this type most of a small update would round away. Load the model"
                        " in float32, or use granularity='component'."
                    )

    def _check_unit(self, adapter: bool) -> None:
        if self.granularity == "component" and not adapter:
            raise TypeError("SOMF: granularity 'component' needs the update in a LoRA adapter; use granularity='row'.")

    @override
    def scored(self, subject: Subject) -> dict[str, Tensor]:
        """Return the trained logits by weight, and ``preference_loss``, the loss of each step in nats."""
        parts = self._parts(subject)
        module = SafetyModule(subject.model)
        batches = [self._checked(batch) for batch in subject.batches("pairs")]
        if not batches:
            raise ValueError("SOMF: the stream 'pairs' has no batch; give rows with a preferred and a rejected answer.")
        device = next(subject.model.parameters()).device

        def log_probs(batch: Any) -> Tensor:
            with subject.context():
                return answer_log_probs(module.run(module.model, batch))

        with undisturbed(subject.model, device), _frozen(subject.model):
            # FSDP2 frees the aligned weights that the pass gathered before the fine-tuned ones are restored.
            with at_aligned(subject, "SOMF"), undisturbed(subject.model, device):
                fixed = [log_probs(batch) for batch in batches]
            logits = {name: nn.Parameter(part.logits()) for name, part in parts.items()}
            optimizer, losses = InnerAdamW(logits, self.lr, weight_decay=0.0), []
            for step in range(self.steps):
                turn, place = divmod(step, len(batches))
                order = list(range(len(batches)))
                draws(subject.seed, turn, "somf").shuffle(order)
                batch, reference = batches[order[place]], fixed[order[place]]
                gates: dict[str, Tensor] = {}

                def masked(name: str, x: Tensor, gates: dict[str, Tensor] = gates) -> Tensor:
                    return parts[name].correction(x, gates[name])

                with torch.enable_grad(), branched({name: part.layer for name, part in parts.items()}, masked):
                    for name, phi in logits.items():
                        gates[name] = gate(relaxed(phi, _uniform(phi, subject.seed, step, name), self.temperature))
                    own = log_probs(batch)
                    loss = dpo_loss(own[0::2], own[1::2], reference[0::2], reference[1::2], self.beta).mean()
                    gradient = dict(zip(logits, torch.autograd.grad(loss, list(logits.values())), strict=True))
                losses.append(_over_ranks(loss.detach(), gradient, subject.split))
                optimizer.step(gradient)
                subject.on_step(step + 1)
        return {**{name: phi.detach() for name, phi in logits.items()}, "preference_loss": torch.stack(losses)}

    @override
    def edit(self, subject: Subject) -> None:
        parts = self._parts(subject)
        adapter = has_adapter(subject.model) and not subject.dense
        table: dict[str, dict[str, float]] = {}
        masked: dict[str, LowRank | Tensor] = {}
        for name, part in parts.items():
            mask = self._mask(subject.scores[name], subject.seed, name)
            # With everything kept at weight 1 the update is unchanged; its own factors are then left as they are.
            same = bool(mask.all()) and self.weights == (1.0,)
            masked[name] = part.own if same else part.masked(gate(mask.to(part.logits())))
            table[name] = {
                "units": mask.numel(),
                "kept": int(mask.sum()),
                "kept_fraction": float(mask.double().mean()),
                "factor": 1 / max(float(mask.double().mean()), FLOOR),
                "update_norm": _norm(part.own),
                "repaired_norm": _norm(masked[name]),
                "changed_entries": 0 if same or not _norm(part.vector) else math.prod(part.vector.shape),
            }
        changed = sum(row["changed_entries"] for row in table.values())
        updates = lora_updates(subject.model) if adapter else {}
        thin = {name: m for name, m in masked.items() if isinstance(m, LowRank)}
        # An adapter that FSDP2 has sharded cannot grow.
        if changed and adapter and len(thin) == len(masked) and not (sharded(updates) and grows(updates, thin)):
            put_factors(subject.model, thin)
        elif changed:
            self._write(subject, masked, updates)
        losses = subject.scores["preference_loss"].double()
        kept, units = (sum(row[key] for row in table.values()) for key in ("kept", "units"))
        subject.report |= {
            "matrices": table,
            "kept_fraction": kept / units,
            "threshold": self.threshold,
            "preference_loss_first": float(losses[0]),
            "preference_loss_last": float(losses[-1]),
            "changed_entries": changed,
        }
        if not changed:
            subject.report["unchanged_because"] = (
                "every part was kept, or the update is zero; raise steps or threshold."
            )

    def _mask(self, logits: Tensor, seed: int, name: str) -> Tensor:
        """Return the binary mask of one weight, of the shape of its logits."""
        if self.export == "sampled":
            mask = _uniform(logits, seed, -1, name) < logits.sigmoid()
        else:
            mask = logits > self.threshold
        if self.units == "random":
            order = torch.randperm(mask.numel(), generator=_generator(seed, -2, name)).to(mask.device)
            mask = (order < mask.sum()).view_as(mask)
        return mask

    def _parts(self, subject: Subject) -> dict[str, _Part]:
        """Return the layers whose updates are masked, by the plain name of their weight.

        Raises:
            RuntimeError: if the aligned model is not known.
            TypeError: if an update has no components.
            ValueError: if one of ``others`` does not fit the model.
        """
        model, start = subject.model, subject.start
        adapter = has_adapter(model) and not subject.dense
        self.check_model(model)
        self._check_unit(adapter)
        if start is None or (subject.dense and subject.aligned is None):
            raise RuntimeError("SOMF: it needs the aligned model, which is not under an adapter; give aligned=....")
        others = [stored(model) for model in self.others]
        parts: dict[str, _Part] = {}
        if adapter:
            updates = lora_updates(model)
            _check_targets(others, start, list(updates))
            for name, update in updates.items():
                own = update.factors()
                terms = [(self.weights[0], own)]
                for factor, matrix in self._terms(others, start, name):
                    if isinstance(matrix, LowRank):
                        terms.append((factor, LowRank(matrix.b.to(own.b), matrix.a.to(own.a), matrix.scale)))
                parts[name] = _Part(update.layer, own, self._thin_vector(terms), self.granularity)
            return parts
        layers = {f"{plain_name(n)}.weight": m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        for name, weight in linear_weights(model).items():
            w = whole(weight.detach())
            dtype = torch.promote_types(w.dtype, torch.float32)
            if start.shape(name) != tuple(w.shape):
                raise ValueError(
                    f"SOMF: {name} has shape {list(w.shape)}, and {start.shape(name)} in the aligned model. Give the"
                    " model that the fine-tuning started from."
                )
            dense = w.to(dtype) - start.rows(name).to(w.device, dtype)
            vector = self.weights[0] * dense if self.weights != (1.0,) else dense
            for factor, matrix in self._terms(others, start, name):
                vector = vector + factor * matrix.rows().to(dense)
            parts[name] = _Part(layers[name], dense, vector, self.granularity)
        return parts

    def _thin_vector(self, terms: Sequence[tuple[float, LowRank]]) -> LowRank | Tensor:
        """Return the weighted sum of updates, in singular components if these are masked."""
        if self.granularity == "component":
            triples = [(factor, matrix.svd()) for factor, matrix in terms]
            return combined([(factor, LowRank(u * s, vh)) for factor, (u, s, vh) in triples])
        return combined(terms)

    def _terms(
        self, others: Sequence[Weights], start: Weights, name: str
    ) -> Iterator[tuple[float, LowRank | Difference]]:
        """Yield the weight and the update of each of ``others`` in one layer."""
        for factor, other in zip(self.weights[1:], others, strict=True):
            if (update := _update(other, start, name)) is not None:
                yield factor, update

    def _write(
        self, subject: Subject, masked: Mapping[str, LowRank | Tensor], updates: Mapping[str, LoraUpdate]
    ) -> None:
        """Write the aligned weights plus the masked updates by blocks of rows."""
        weights = {n: u.weight for n, u in updates.items()} if updates else linear_weights(subject.model)
        for name, matrix in masked.items():
            mine, place, start = local(weights[name].detach()), share(weights[name]), subject.start
            assert start is not None
            for at in range(place.start, place.stop, BLOCK):
                stop = min(at + BLOCK, place.stop)
                part = mine[at - place.start : stop - place.start]
                aligned = part if updates else start.rows(name, at, stop).to(part.device)
                rows = matrix.rows(at, stop) if isinstance(matrix, LowRank) else matrix[at:stop]
                part.copy_(aligned.to(rows.dtype) + rows)
        for update in updates.values():
            local(update.b.detach()).zero_()
        subject.dense = subject.dense or bool(updates)

    def _checked(self, batch: Any) -> Any:
        """Return a batch of pairs.

        Raises:
            ValueError: if the batch has no pairs.
        """
        if "pairs" not in batch:
            raise ValueError(
                "SOMF: the stream 'pairs' must give pairs: rows 0, 2, ... with the preferred and rows 1, 3, ... with"
                " the rejected answers, and their number under 'pairs', as hftlight.data.tokens.collate returns them."
            )
        return batch


def _update(other: Weights, start: Weights, name: str) -> LowRank | Difference | None:
    """Return the displacement of one of ``others`` from the aligned model.

    Raises:
        ValueError: if one of the two models lacks the weight, or the shapes differ.
    """
    try:
        return displacement(other, start, name)
    except ValueError as error:
        raise ValueError(
            f"SOMF: {name} must have one shape in the aligned model and in others, got {start.shape(name)} and"
            f" {other.shape(name)}. Give models that were fine-tuned from the aligned one and are not quantized."
        ) from error


def _check_targets(others: Sequence[Weights], start: Weights, names: Iterable[str]) -> None:
    """Refuse others that moved a layer which the user's adapter does not have.

    Raises:
        ValueError: naming the layer.
    """
    for other in others:
        if not isinstance(other, Adapted) or any(isinstance(_update(other, start, n), Difference) for n in names):
            raise ValueError(
                "SOMF: under an adapter, others must be adapters on the aligned model or on the model under it; give"
                " aligned=... as a folder, too."
            )
        beyond = [n for n in other.updates if n not in names and _update(other, start, n) is not None]
        if beyond:
            raise ValueError(
                f"SOMF: others moved {beyond[0]}, which the user's adapter does not have. Use adapters on the same"
                " layers."
            )


def _norm(matrix: LowRank | Tensor) -> float:
    square = matrix.squared_norm() if isinstance(matrix, LowRank) else matrix.square().sum()
    return float(square.clamp_min(0).sqrt())


def _generator(seed: int, step: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(draws(seed, step, name).getrandbits(48))


def _uniform(like: Tensor, seed: int, step: int, name: str) -> Tensor:
    """Return uniform noise in (0, 1) that depends on seed, step and name alone."""
    noise = torch.rand(like.shape, generator=_generator(seed, step, name), dtype=torch.float64).to(like)
    tiny = torch.finfo(noise.dtype).eps
    return noise.clamp(tiny, 1 - tiny)


def _over_ranks(loss: Tensor, gradient: dict[str, Tensor], split: bool) -> Tensor:
    """Return the mean of the loss over ranks, and average the gradient in place, if ranks hold different batches."""
    world = rank_and_world()[1]
    if split and world > 1:
        for tensor in (loss, *gradient.values()):
            dist.all_reduce(tensor)
            tensor /= world
    return loss


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Run the block without gradients for the model's parameters, then restore their flags."""
    flags = {p: p.requires_grad for p in model.parameters()}
    try:
        model.requires_grad_(False)
        yield
    finally:
        for p, flag in flags.items():
            p.requires_grad_(flag)


def somf(model: nn.Module | str | Path, batches: Iterable[Any], seed: int = 0, **arguments: Any) -> dict[str, Any]:
    """Repair a fine-tuned model with SOMF in one call, without Lightning.

    Args:
        model: a PEFT model whose active adapter is the user's update, or a causal LM with all parameters trained. It is
            changed in memory. Or the folder of either, which stays unchanged.
        batches: pairs as ``hftlight.data.tokens.collate`` returns them: dictionaries with ``input_ids``,
            ``attention_mask`` and ``labels``, int64 ``[2 * pairs, tokens]``, and ``pairs``. Rows 0, 2, ... have the
            preferred answers.
        seed: seed of the masks and of the order of the batches.
        **arguments: further arguments of ``SOMF``, such as ``output``, the folder for the repaired model.

    Returns:
        The report: per weight how many parts were kept, the factor of the kept ones, and the norms.

    Raises:
        RuntimeError: if the model is already repaired.
        ValueError: if an argument of ``SOMF`` is out of range, or a folder is repaired without ``output``.
    """
    return repair_model(SOMF(**arguments), model, batches, seed)
