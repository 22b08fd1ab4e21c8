"""TAR: meta-learning against simulated attackers, from whose fine-tuning the model must not recover."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from hftlight.engine.ascent import Ascent
from hftlight.engine.step.defense import Defense, Loader
from hftlight.engine.step.order import trainer_seed
from hftlight.engine.step.passes import Passes, add_to_grad, gradient
from hftlight.engine.step.side_streams import Stream, halves
from hftlight.engine.step.simulation import InnerAdamW, InnerSGD, draws, simulated
from hftlight.engine.step.slots import Slot, Stage
from hftlight.engine.step.vectors import Vector, norm, scaled
from hftlight.models.module import Forward, decoder_layers
from hftlight.models.preference import preference_loss

Attacker = Literal["harmful", "switch"]
Tamper = Literal["entropy", "dpo", "nll"]


def step_weights(inner_steps: int, every: int, lam: float, growth: float, tasks: int = 1) -> dict[int, float]:
    r"""Return :math:`\omega_i = \lambda\, e^{s (i - (K - 1))} / T` of each inner step i whose model is measured.

    Measured are the models after steps i, from 0, for which i + 1 is a multiple of m. The weights are not normalized.

    Args:
        inner_steps: K, >= 1.
        every: m, >= 1.
        lam: lambda, dimensionless.
        growth: s, per step, >= 0; later steps weigh more.
        tasks: T, number of simulated attackers.
    """
    return {
        i: lam * math.exp(growth * (i - (inner_steps - 1))) / tasks for i in range(inner_steps) if (i + 1) % every == 0
    }


def feature_distance(now: Tensor, aligned: Tensor, mask: Tensor) -> Tensor:
    """Return the mean Euclidean distance of two sets of token vectors, 0-d.

    Args:
        now: features of the model that trains, ``[rows, tokens, hidden]``.
        aligned: features of the aligned model, likewise.
        mask: which tokens count, ``[rows, tokens]``.
    """
    apart = (now - aligned)[mask.bool()]
    # The distance is not differentiable at 0, where the model starts. Its gradient there is taken as zero.
    squares = apart.float().square().sum(-1) if apart.dtype != torch.float64 else apart.square().sum(-1)
    return torch.where(squares > 0, squares, 1.0).sqrt().mul(squares > 0).mean()


class TAR(Defense):
    r"""Find weights from which several steps of a simulated attack still leave harmful answers unlikely.

    Let :math:`\theta_0` be the weights before an optimizer step. Let :math:`\theta_{i+1}` be those after inner step i
    of an attacker that fine-tunes on harmful data. Besides the gradient of the alignment loss f, the optimizer receives

    .. math:: \sum_{i:\, m | i + 1} \omega_i \nabla L_{\mathrm{TR}}(\theta_{i+1}), \qquad
        \omega_i = \lambda\, e^{s (i - (K - 1))} / T, \qquad i = 0, \ldots, K - 1

    Each gradient is taken at the attacked weights and applied to :math:`\theta_0`, without second derivatives. The
    tamper loss :math:`L_{\mathrm{TR}}` is measured on harmful rows that no attacker trains on. The loss f gets a term
    that keeps hidden states near those of the aligned model: the mean distance
    :math:`\|h_l(\theta_0) - h_l^{\mathrm{aligned}}\|_2` over layers and tokens.

    Each of T attackers draws its kind, its learning rate and, for ``"switch"``, the step at which it turns from
    alignment data to harmful data. These draws depend on the seed and the optimizer step alone.

    Published re-runs of TAR see a weak effect against an attacker that tunes its settings. Report it with
    ``--attacker search:N``.

    Args:
        inner_steps: K, number of optimizer steps of each simulated attack, >= 1.
        every: m, inner steps from one measurement of the tamper loss to the next, from 1 to K.
        lam: lambda, dimensionless, >= 0; 0 leaves the attackers out.
        growth: s, growth of the weights per inner step, >= 0.
        tasks: T, number of attackers per optimizer step, >= 1.
        tamper: the tamper loss. ``"entropy"`` is the negative entropy of the next token, for knowledge that must go.
            ``"dpo"`` prefers the safe answers of ``pairs``, for refusals. ``"nll"`` is the negative loss (ours).
        bound: if set, a tamper loss below minus this value, in nats, adds no gradient, > 0.
        positions: where the entropy is measured: ``"response"`` tokens, or ``"all"`` as in the official code.
        attackers: kinds of attackers to draw from, with equal probabilities: ``"harmful"`` and ``"switch"``.
        inner_lrs: learning rates of the attackers to draw from, each > 0.
        inner_optimizer: ``"adamw"`` with fresh moments and a decay of 0.01, or ``"sgd"``.
        held_out: fraction of the harmful rows, or of the pairs, that only the tamper loss sees, in (0, 1).
        representation: weight of the distance of hidden states, dimensionless, >= 0.
        beta: strength of the preferences of ``"dpo"``, per nat, > 0.
        aligned_first: whether a run aligns plainly first and then hardens that model, as the paper does.
        streams: loaders of the side streams, needed only if the data module does not offer them. ``"harmful"`` is the
            defender's own harmful data, ``"alignment"`` is needed by ``"switch"``, and ``"pairs"`` by ``"dpo"``.

    Raises:
        ValueError: if an argument is out of range, or a held-out part has less than one batch.
        TypeError: if trained weights are stored in 16 bits.

    Cost: per optimizer step T (K + K / m) forward-backward passes, and a forward pass of the aligned model per
        micro-batch. With the defaults that is about 10 times plain alignment, with ``paper`` 81 times. Memory holds
        four more copies of the trained weights: the saved ones, the attacker's two moments and the summed gradient.
    Source: Tamirisa et al., "Tamper-Resistant Safeguards for Open-Weight LLMs", ICLR 2025, arXiv:2408.00761; official
        code rishub-tamirisa/tamper-resistance.
    Differs: the default has K = 8 and learning rates for LoRA, so that one GPU can run it; ``paper`` has the paper's
        values, which are meant for all parameters. The weights of the inner steps are recomputed for K. The paper
        starts from a model that has been made ignorant or refusing. Here that is the plainly aligned model. Held-out
        rows are chosen by a hash, and each measurement draws another batch of them; the official code keeps one batch
        per attacker. Entropy covers response tokens by default. Distances cover real tokens, at decoder layers only.
        The outer optimizer is the run's own. The inner steps run in float32 without dropout, average their gradients
        over ranks, and do not change the user's optimizer.
    """

    stage, claims = Stage.ALIGNMENT, ("simulated attack",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {
            "inner_steps": 64,
            "every": 4,
            "lam": 4.0,
            "growth": 0.0625,
            "inner_lrs": [2e-6, 2e-5, 4e-5],
            "positions": "all",
        },
        "cyber": {
            "inner_steps": 64,
            "every": 4,
            "lam": 4.0,
            "growth": 0.0625,
            "inner_lrs": [2e-5, 4e-5],
            "positions": "all",
        },
        "refusal": {"inner_steps": 64, "every": 4, "lam": 4.0, "growth": 0.0625, "tamper": "dpo", "beta": 0.1},
    }

    def __init__(
        self,
        inner_steps: int = 8,
        every: int = 4,
        lam: float = 4.0,
        growth: float = 0.0625,
        tasks: int = 1,
        tamper: Tamper = "entropy",
        bound: float | None = None,
        positions: Literal["response", "all"] = "response",
        attackers: Sequence[Attacker] = ("harmful", "switch"),
        inner_lrs: Sequence[float] = (2e-4, 7e-4, 2e-3),
        inner_optimizer: Literal["adamw", "sgd"] = "adamw",
        held_out: float = 0.25,
        representation: float = 1.0,
        beta: float = 0.1,
        aligned_first: bool = True,
        streams: Mapping[str, Loader] | None = None,
    ) -> None:
        for name, count in (("inner_steps", inner_steps), ("every", every), ("tasks", tasks)):
            if not (isinstance(count, int) and count >= 1):
                raise ValueError(f"TAR: {name} must be a whole number >= 1, got {count}.")
        if every > inner_steps:
            raise ValueError(f"TAR: every must be at most inner_steps, {inner_steps}, got {every}.")
        for name, value in (("lam", lam), ("growth", growth), ("representation", representation)):
            if not 0 <= value < math.inf:
                raise ValueError(f"TAR: {name} must be >= 0, got {value}.")
        if tamper not in get_args(Tamper):
            raise ValueError(f"TAR: tamper must be one of {list(get_args(Tamper))}, got {tamper!r}.")
        if bound is not None and not 0 < bound < math.inf:
            raise ValueError(f"TAR: bound is a loss in nats and must be > 0, got {bound}.")
        if positions not in ("response", "all"):
            raise ValueError(f"TAR: positions must be 'response' or 'all', got {positions!r}.")
        if not attackers or isinstance(attackers, str) or not set(attackers) <= set(get_args(Attacker)):
            raise ValueError(f"TAR: attackers must be a list of {list(get_args(Attacker))}, got {attackers!r}.")
        if isinstance(inner_lrs, (int, float)) or not inner_lrs or not all(0 < lr < math.inf for lr in inner_lrs):
            raise ValueError(f"TAR: inner_lrs must be a list of learning rates > 0, got {inner_lrs!r}.")
        if inner_optimizer not in ("adamw", "sgd"):
            raise ValueError(f"TAR: inner_optimizer must be 'adamw' or 'sgd', got {inner_optimizer!r}.")
        if not 0 < held_out < 1:
            raise ValueError(f"TAR: held_out is a fraction and must lie in (0, 1), got {held_out}.")
        if not 0 < beta < math.inf:
            raise ValueError(f"TAR: beta must be > 0 (per nat), got {beta}.")
        measured = inner_steps // every
        compared = measured if tamper == "dpo" else 0
        self.streams = (
            *(("harmful",) if lam else ()),
            *(("alignment",) if lam and "switch" in attackers else ()),
            *(("pairs",) if lam and tamper == "dpo" else ()),
        )
        self.slots = (*((Slot.LOSS,) if representation else ()), Slot.GRADIENT)
        self.passes = (
            *((Passes(1, per="batch", shared="reference"),) if representation else ()),
            *((Passes(tasks * (inner_steps + measured + compared), tasks * (inner_steps + measured)),) if lam else ()),
        )
        super().__init__(streams)
        self.inner_steps, self.every, self.lam, self.growth, self.tasks = inner_steps, every, lam, growth, tasks
        self.tamper, self.bound, self.positions, self.attackers = tamper, bound, positions, list(attackers)
        self.inner_lrs, self.inner_optimizer, self.held_out = list(inner_lrs), inner_optimizer, held_out
        self.representation, self.beta, self.aligned_first = representation, beta, aligned_first
        self.compares = bool(lam) and tamper == "dpo"
        self._omega = step_weights(inner_steps, every, lam, growth, tasks)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit" or not self.lam:
            return
        # The tamper loss sees rows that no attacker trains on: of the harmful rows, or of the pairs.
        name = "pairs" if self.tamper == "dpo" else "harmful"
        whole = self._sources[name]

        @cache  # the look-up stays late, because a data-slot defense may still rewrite the rows
        def parts() -> tuple[Stream, Stream]:
            return halves(whole(), name, self.held_out)

        self._sources["held out"] = lambda: parts()[1]
        if name == "harmful":
            self._sources["harmful"] = lambda: parts()[0]

    @override
    def taps(self, model: nn.Module) -> dict[str, nn.Module]:
        return {f"tar/{i}": layer for i, layer in enumerate(decoder_layers(model))} if self.representation else {}

    @override
    def loss_term(self, forward: Forward) -> Tensor | None:
        if not self.representation:
            return None
        mask, aligned = forward.batch["attention_mask"], forward.reference.features
        distances = [
            feature_distance(h, aligned[name], mask) for name, h in forward.features.items() if name.startswith("tar/")
        ]
        term = torch.stack(distances).mean()
        self.record(distance=term.detach())
        self.show({"tar/distance": term})
        return self.representation * term

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not self.lam:
            return
        total: Vector = {}
        losses: list[Tensor] = []
        for task in range(self.tasks):
            rng = draws(trainer_seed(), trainer.global_step, f"tar/{task}")
            kind, lr = rng.choice(self.attackers), rng.choice(self.inner_lrs)
            switch = math.floor(self.inner_steps * rng.betavariate(6, 3)) if kind == "switch" else 0
            self._attack(pl_module, lr, switch, total, losses)
        add_to_grad(pl_module, total)
        self.record(tamper_loss=torch.stack(losses).mean(), tamper_grad_norm=norm(total))
        self.show({"tar/tamper_loss": torch.stack(losses).mean(), "tar/tamper_grad_norm": norm(total)})

    @override
    def manifest(self) -> dict[str, Any]:
        return {**super().manifest(), "step_weights": self._omega, "sum_of_step_weights": sum(self._omega.values())}

    def _attack(self, module: LightningModule, lr: float, switch: int, total: Vector, losses: list[Tensor]) -> None:
        """Simulate one attack, and add the weighted gradients of the tamper loss to ``total`` in place.

        Args:
            module: the module that trains; its weights are restored.
            lr: learning rate of the attacker.
            switch: number of first inner steps on alignment data.
            total: gradient so far.
            losses: receives each tamper loss, 0-d.
        """
        with simulated(module) as parameters:
            kind: Any = InnerAdamW if self.inner_optimizer == "adamw" else InnerSGD
            inner = kind(parameters, lr)
            for i in range(self.inner_steps):
                batch = self.draw("alignment" if i < switch else "harmful")
                inner.step(gradient(module, batch).grad)
                if i not in self._omega:
                    continue
                measured = gradient(module, self.draw("held out"), self._tamper_loss(module))
                losses.append(measured.loss)
                weight: float | Tensor = self._omega[i]
                if self.bound is not None:
                    weight = weight * (measured.loss > -self.bound)
                for name, grad in scaled(measured.grad, weight).items():
                    total[name] = total[name] + grad if name in total else grad

    def _tamper_loss(self, module: LightningModule) -> Callable[[Any], Tensor]:
        """Return the tamper loss as a function of a batch, 0-d in nats."""
        subject: Any = module
        if self.tamper == "nll":
            return lambda batch: -subject.loss(batch)
        if self.tamper == "dpo":
            return lambda batch: preference_loss(subject, batch, self.beta)
        return lambda batch: self._entropy(subject, batch)

    def _entropy(self, module: Any, batch: Mapping[str, Any]) -> Tensor:
        """Return minus the mean entropy of the next token."""
        ascent = Ascent("entropy")
        if self.positions == "response":
            forward = module.run(module.model, batch)
            return ascent(forward.logits, forward.targets)
        logits = module.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).logits
        return ascent(logits if logits.dtype == torch.float64 else logits.float(), batch["input_ids"])
