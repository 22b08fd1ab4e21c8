"""T-Vaccine: Vaccine on the layers with the largest harmful gradients, with the other layers' attention frozen."""

import random
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from hftlight.defenses.alignment.vaccine import Vaccine, joint_norm
from hftlight.engine.step.activations import ATTENTION, enclosing_layer, recomputed, site_gradients
from hftlight.engine.step.defense import Defense, Loader
from hftlight.engine.step.order import rank_and_world
from hftlight.engine.step.passes import Passes

PUBLISHED_LAYERS, PUBLISHED_DEPTH = 8, 32

Selection = Literal["sampled", "topk", "uniform"]


def layer_probabilities(scores: Sequence[float]) -> list[float]:
    r"""Return the probabilities :math:`p_l = s_l / \sum_j s_j`, or equal ones if all scores are zero.

    Args:
        scores: s_l >= 0, the norm of the harmful loss's gradient at layer l.
    """
    total = sum(scores)
    return [s / total if total > 0 else 1 / len(scores) for s in scores]


def drawn_layers(
    scores: Sequence[float], count: int, seed: int, step: int, selection: Selection = "sampled"
) -> list[int]:
    """Return the chosen layers in rising order, as a pure function of the arguments.

    Layers are drawn one after the other, without replacement, with probabilities proportional to the scores. That
    equals taking the smallest of independent exponential variables whose rates are the scores. The variables come from
    Python's generator, seeded with the text ``"{seed}/layers/{step}"``.

    Args:
        scores: one per layer, >= 0; layers of score zero come last, in random order.
        count: number of layers to choose, at most the number of scores.
        seed: the run's seed.
        step: optimizer step of the draw, from 0.
        selection: ``"sampled"`` for the draw above, ``"topk"`` for the largest scores (a tie goes to the lower layer),
            ``"uniform"`` for equal probabilities.
    """
    if selection == "topk":
        order = sorted(range(len(scores)), key=lambda layer: -scores[layer])
        return sorted(order[:count])
    generator = random.Random(f"{seed}/layers/{step}")
    draws = [generator.expovariate(1.0) for _ in scores]
    rates = layer_probabilities(scores) if selection == "sampled" else [1.0] * len(scores)
    # draw / rate is exponential with that rate. Layers of rate zero tie at infinity, and their draws order them.
    times = [draw / rate if rate > 0 else float("inf") for draw, rate in zip(draws, rates, strict=True)]
    return sorted(sorted(range(len(scores)), key=lambda layer: (times[layer], draws[layer]))[:count])


class TVaccine(Vaccine):
    r"""Keep the alignment loss low under the worst shift of a few layers' attention outputs, chosen by harmful data.

    Let h be the loss on harmful data (mean nats per response token) and z_l the output of layer l's attention. The
    scores :math:`s_l = \|\partial h / \partial z_l\|_2` are measured every K optimizer steps. Every J steps a set A of
    S layers is drawn without replacement, with probabilities :math:`s_l / \sum_j s_j`. Each micro-batch then trains
    under Vaccine's shifts restricted to A,

    .. math:: e_l = \rho \, g_l / \|(g_j)_{j \in A}\|_2 \text{ for } l \in A, \qquad e_l = 0 \text{ otherwise.}

    The trainable weights in the attention of all other layers get no gradient, so that neither momentum nor weight
    decay moves them. The other layers run under activation checkpointing, which saves memory. If Booster is in the same
    list, its norm covers only the weights that are not frozen in that step.

    Args:
        rho: joint L2 length of the shifts in activation space, >= 0; 0 only freezes.
        layers: S, number of perturbed layers, from 1 to all of them. With all layers the method is Vaccine. None means
            the paper's 8 of 32, scaled to the model's depth.
        probe_every: K, optimizer steps from one harmful probe to the next, >= 1.
        resample_every: J, optimizer steps from one draw of layers to the next, >= 1.
        probe_batch: rows of the harmful batch that a probe takes on each process, >= 1; None for the whole batch. One
            row, as in the official code, makes noisy scores. Prefer 8 rows and some smoothing.
        smoothing: m in [0, 1). The scores become m times the earlier scores plus (1 - m) times the new ones.
        selection: ``"sampled"``; ``"topk"`` for the S largest scores; ``"uniform"``, which needs no scores and no
            harmful data.
        freeze_scope: ``"attention"``, or ``"layer"`` to freeze the other layers completely.
        dropout: ``"replay"`` for the same masks in the probe and in the perturbed pass, or ``"independent"``.
        sites: the modules to perturb, by their own name or class name.
        streams: loader of the stream ``"harmful"`` (harmful prompts with harmful answers, the defender's own). It is
            needed only if the data module does not offer that stream.

    Raises:
        ValueError: if an argument is out of range, ``layers`` exceeds the model's, or no module matches ``sites``.
        RuntimeError: if the training step does not run every site exactly once, as ``loss(batch)`` does.

    Cost: Vaccine's two forward-backward passes, and the forward pass of all layers outside A once more in each. Every K
    steps it adds a forward-backward pass without weight gradients on a harmful batch. Memory holds the activations of S
    layers instead of all, and S shifts ``[batch, tokens, hidden]``.
    Source: Liu et al., "Targeted Vaccine: Safety Alignment for Large Language Models against Harmful Fine-Tuning via
    Layer-wise Perturbation", arXiv:2410.09760; official code Lslland/T-Vaccine.
    Differs: rho is an argument of the official scripts, not a constant; their README calls them with 3. The paper draws
    layers at every step, the official code every 20 steps (``resample_every``). The official code repeats probe and
    draw in each micro-batch of a step; here both happen once per optimizer step. The official code draws from an
    unseeded generator that differs between processes. Here the draw is a pure function of seed and step, the same on
    all processes. The official code uses patched copies of model files with reentrant checkpointing, under which the
    MLP adapters below A get no gradient. Here any model works, and every weight outside the frozen set trains.
    Smoothing and freezing whole layers are additions. See Vaccine for the rest.
    """

    streams: tuple[str, ...] = ("harmful",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"rho": 3.0, "layers": 8, "probe_every": 200, "resample_every": 1},
        "repo": {"layers": 8, "probe_every": 200, "resample_every": 20, "dropout": "independent"},
    }
    log_as: ClassVar[str] = "t_vaccine"

    def __init__(
        self,
        rho: float = 3.0,
        layers: int | None = None,
        probe_every: int = 200,
        resample_every: int = 20,
        probe_batch: int | None = 1,
        smoothing: float = 0.0,
        selection: Selection = "sampled",
        freeze_scope: Literal["attention", "layer"] = "attention",
        dropout: Literal["replay", "independent"] = "replay",
        sites: Sequence[str] = ATTENTION,
        streams: Mapping[str, Loader] | None = None,
    ) -> None:
        counts = {
            "layers": layers,
            "probe_every": probe_every,
            "resample_every": resample_every,
            "probe_batch": probe_batch,
        }
        for name, value in counts.items():
            if value is None and name in ("layers", "probe_batch"):
                continue
            if value is None or not value >= 1 or value % 1:
                raise ValueError(f"TVaccine: {name} must be a whole number >= 1, got {value}.")
        if not 0 <= smoothing < 1:
            raise ValueError(f"TVaccine: smoothing is a factor and must lie in [0, 1), got {smoothing}.")
        if selection not in ("sampled", "topk", "uniform"):
            raise ValueError(f"TVaccine: selection must be 'sampled', 'topk' or 'uniform', got {selection!r}.")
        if freeze_scope not in ("attention", "layer"):
            raise ValueError(f"TVaccine: freeze_scope must be 'attention' or 'layer', got {freeze_scope!r}.")
        super().__init__(rho, dropout=dropout, sites=sites)
        self.streams = () if selection == "uniform" else ("harmful",)
        Defense.__init__(self, streams)  # again, since Vaccine's __init__ passes no streams
        self.layers, self.probe_every, self.resample_every = layers, probe_every, resample_every
        self.probe_batch, self.smoothing = probe_batch, smoothing
        self.selection, self.freeze_scope = selection, freeze_scope
        if self.streams:
            self.passes = (*self.passes, Passes(1 / probe_every, 1 / probe_every))
        self._sites_of: list[list[str]] = []
        self._layers: list[nn.Module] = []
        self._scores: list[float] | None = None
        self._active: list[int] = []
        self._step = -1
        self._frozen: list[nn.Parameter] = []

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "scores": self._scores, "active": self._active}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._scores, self._active = state_dict["scores"], state_dict["active"]

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._scores, self._active, self._step = None, [], -1

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        # _sites_of and _layers are parallel lists: entry i has the sites, and the module, of the i-th decoder layer.
        of_layer: dict[str, list[str]] = {}
        for name in self._modules:
            of_layer.setdefault(enclosing_layer(pl_module, name), []).append(name)
        self._sites_of = list(of_layer.values())
        self._layers = [pl_module.get_submodule(name) for name in of_layer]
        if (self.layers or 1) > len(self._layers):
            raise ValueError(
                f"TVaccine: layers must be at most {len(self._layers)}, the model's number of layers with sites, got"
                f" {self.layers}."
            )

    @property
    def count(self) -> int:
        """S, the number of perturbed layers of the current model."""
        return self.layers or max(1, round(len(self._layers) * PUBLISHED_LAYERS / PUBLISHED_DEPTH))

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._begin()
        if trainer.global_step != self._step:  # the first micro-batch of an optimizer step
            self._step = trainer.global_step
            self._choose(trainer, pl_module)
        resting = [layer for i, layer in enumerate(self._layers) if i not in self._active]
        self._on.enter_context(recomputed(resting))
        if self.rho > 0:
            self._perturb(
                pl_module, batch, {site: self._modules[site] for i in self._active for site in self._sites_of[i]}
            )
        elif resting:
            self.record()

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        # This runs before the gradient slot, so that no other defense adds to the gradient of a frozen weight. The
        # weights require a gradient until here, since DDP waits for every gradient that it registered at the start.
        # A weight that an active layer shares with a resting one keeps its gradient.
        active_weights = {p for i in self._active for p in self._weights(i)}
        for i in range(len(self._layers)):
            for p in () if i in self._active else self._weights(i):
                if p.requires_grad and p not in active_weights:
                    p.requires_grad_(False)
                    p.grad = None  # not zero: an optimizer with momentum or weight decay moves a zero-gradient weight
                    self._frozen.append(p)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._thaw()

    def _choose(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the scores and draw the layers if either is due at this optimizer step."""
        if self.count == len(self._layers):
            self._active = list(range(self.count))
            return
        if self.streams and (self._scores is None or self._step % self.probe_every == 0):
            self._measure(pl_module)
        if not self._active or self._step % self.resample_every == 0:
            seed = getattr(getattr(trainer, "datamodule", None), "seed", 0)
            scores = self._scores or [1.0] * len(self._layers)
            self._active = drawn_layers(scores, self.count, seed, self._step, self.selection)
        for layer in self._active:
            self.trace[f"steps_on_layer_{layer}"] = self.trace.get(f"steps_on_layer_{layer}", 0) + 1

    def _measure(self, pl_module: LightningModule) -> None:
        """Measure the scores of all layers on a harmful batch, or keep the earlier ones if the loss scale overflows."""
        rows = first_rows(self.draw("harmful"), self.probe_batch)
        with recomputed(self._layers):
            probe_pass = site_gradients(pl_module, rows, self._modules, fresh_masks=self.dropout == "independent")
        # Each layer's score is the joint norm over its sites. Squares add up over ranks; the root follows the sum.
        of_layer = [[probe_pass.grads[site] for site in sites if site in probe_pass.grads] for sites in self._sites_of]
        squares = torch.stack([joint_norm(g).square() if g else torch.zeros_like(probe_pass.scale) for g in of_layer])
        if rank_and_world()[1] > 1:
            dist.all_reduce(squares)
        scores = (squares.sqrt() / rank_and_world()[1] / probe_pass.scale).tolist()
        overflow = not all(s < float("inf") for s in scores)
        self.trace["probes"] = self.trace.get("probes", 0) + 1
        self.trace["probe_overflows"] = self.trace.get("probe_overflows", 0) + overflow
        before = self._scores
        if overflow:
            self._scores = before or [0.0] * len(scores)
            return
        m = 0.0 if before is None else self.smoothing
        self._scores = [m * old + (1 - m) * new for old, new in zip(before or scores, scores, strict=True)]
        pl_module.log_dict({f"{self.log_as}/p_{i}": p for i, p in enumerate(layer_probabilities(self._scores))})

    def _weights(self, layer: int) -> list[nn.Parameter]:
        """Return the weights of a layer that are frozen while it is not perturbed."""
        whole = self.freeze_scope == "layer"
        owners = [self._layers[layer]] if whole else [self._modules[site] for site in self._sites_of[layer]]
        return [p for owner in owners for p in owner.parameters()]

    def _thaw(self) -> None:
        for p in self._frozen:
            p.requires_grad_(True)
        self._frozen = []

    @override
    def _release(self, pl_module: LightningModule) -> None:
        self._thaw()
        self._sites_of, self._layers = [], []
        super()._release(pl_module)


def first_rows(batch: Any, count: int | None) -> Any:
    """Return the first ``count`` rows of each tensor and list in a batch, or the whole batch if ``count`` is None.

    Raises:
        TypeError: if ``count`` is not None and the batch is no mapping.
    """
    if count is None:
        return batch
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"TVaccine: probe_batch needs a batch that is a mapping, got {type(batch).__name__}; use probe_batch=None."
        )
    rows = {
        name for name, value in batch.items() if isinstance(value, list) or (isinstance(value, Tensor) and value.dim())
    }
    return {name: value[:count] if name in rows else value for name, value in batch.items()}
