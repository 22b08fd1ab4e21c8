"""Vaccine: align so that a bounded shift of the attention outputs does not undo the alignment."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from hftlight.engine.step.activations import ATTENTION, hooked, modules_called, site_gradients
from hftlight.engine.step.defense import Defense
from hftlight.engine.step.order import rank_and_world
from hftlight.engine.step.passes import Passes
from hftlight.engine.step.slots import Slot, Stage


def worst_shifts(gradients: Mapping[str, Tensor], rho: float | Tensor, norm: Tensor | None = None) -> dict[str, Tensor]:
    r"""Return :math:`e_l = \rho g_l / \|(g_1, \dots, g_L)\|_2`, to first order the worst shifts of joint length rho.

    Args:
        gradients: g_l, the gradient of the loss at each site's output; any shapes.
        rho: joint L2 length of all shifts, >= 0.
        norm: the joint norm of the gradients, 0-d, at least float32; None computes it here.

    Returns:
        Shifts of the gradients' shapes and types. All are zero if the norm is zero or not finite.
    """
    norm = joint_norm(gradients.values()) if norm is None else norm
    usable = norm.isfinite() & (norm > 0)
    factor = torch.where(usable, rho / norm, 0.0)
    return {name: (torch.where(usable, g, 0).to(norm.dtype) * factor).to(g.dtype) for name, g in gradients.items()}


def token_norms(value: Tensor) -> Tensor:
    """Return the L2 norm over the last dimension, in float32 or a wider type."""
    return torch.linalg.vector_norm(value, dim=-1, dtype=torch.promote_types(value.dtype, torch.float32))


def joint_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Return one L2 norm over all entries of all tensors, 0-d, in float32 or a wider type."""
    return torch.linalg.vector_norm(torch.cat([token_norms(t).flatten() for t in tensors]))


class Vaccine(Defense):
    r"""Keep the alignment loss low under the worst small shift of the attention outputs.

    Let f be the alignment loss (mean nats per response token). Let z_l be the output of layer l's attention module,
    before the residual addition. Training minimizes :math:`\max_{\|e\| \le \rho} f(w; z_1 + e_1, \dots, z_L + e_L)`,
    with the maximum approximated to first order. For each micro-batch one probe pass computes the shifts

    .. math:: e_l = \rho \, g_l / \|(g_1, \dots, g_L)\|_2, \qquad g_l = \partial f / \partial z_l

    The training step then adds e_l, as a constant, to z_l. The norm is one norm over all sites, tokens and rows of all
    processes. So rho is a budget: in a longer or larger batch, each token's shift is smaller. Each micro-batch has its
    own shifts and the whole budget. Padding gets no shift, since no loss flows through it.

    Args:
        rho: joint L2 length of the shifts in activation space, >= 0; 0 is plain alignment.
        every_n_steps: perturb the optimizer steps 0, n, 2 n, ... only (the paper's accelerated variant), >= 1.
        budget: ``"total"`` for a joint length of rho. ``"per_token"`` multiplies rho by the square root of the number
            of real tokens in the batch. A larger batch then does not dilute the shifts. This budget needs an
            ``attention_mask`` in the batch.
        dropout: ``"replay"`` for the same masks in the probe and in the perturbed pass, or ``"independent"``.
        sites: the modules to perturb, by their own name or class name.

    Raises:
        ValueError: if an argument is out of range or no module matches ``sites``.
        RuntimeError: if the training step does not run every site exactly once, as ``loss(batch)`` does.

    Cost: one more forward pass per micro-batch, and a backward pass without weight gradients. The shifts need one
    tensor ``[batch, tokens, hidden]`` per layer.
    Source: Huang et al., "Vaccine: Perturbation-aware Alignment for Large Language Models against Harmful Fine-tuning",
    NeurIPS 2024, arXiv:2402.01109, Algorithm 1; official code git-disl/Vaccine.
    Differs: rho is an argument of the official scripts, not a constant; their README calls them with 2, and Booster's
    alignment script sets 5. The official code computes the norm in the activations' precision with an epsilon of 1e-7.
    Here the norm has at least float32 and no epsilon; a zero norm is counted and gives no shift. The official code
    draws other dropout masks in the second pass (here ``dropout="independent"``) and finds attention by class name. It
    clears gradients within the step, so that accumulation fails. A site before every trainable weight gets no shift.
    The accelerated variant is in the paper's appendix only. Several processes share one budget, so that they equal one
    process with the joint batch. Under a loss scaler, a micro-batch whose norm overflows is counted and not perturbed.
    """

    stage, slots = Stage.ALIGNMENT, (Slot.FORWARD,)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"rho": 2.0},
        "repo": {"dropout": "independent"},
        "booster": {"rho": 5.0, "dropout": "independent"},
    }
    log_as: ClassVar[str] = "vaccine"

    def __init__(
        self,
        rho: float = 2.0,
        every_n_steps: int = 1,
        budget: Literal["total", "per_token"] = "total",
        dropout: Literal["replay", "independent"] = "replay",
        sites: Sequence[str] = ATTENTION,
    ) -> None:
        who = type(self).__name__
        if not 0 <= rho < float("inf"):
            raise ValueError(f"{who}: rho is a length and must be >= 0 and finite (0 turns it off), got {rho}.")
        if not every_n_steps >= 1 or every_n_steps % 1:
            raise ValueError(f"{who}: every_n_steps must be a whole number of steps >= 1, got {every_n_steps}.")
        if budget not in ("total", "per_token"):
            raise ValueError(f"{who}: budget must be 'total' or 'per_token', got {budget!r}.")
        if dropout not in ("replay", "independent"):
            raise ValueError(f"{who}: dropout must be 'replay' or 'independent', got {dropout!r}.")
        if isinstance(sites, str) or not sites:
            raise ValueError(f"{who}: sites must be a list of module or class names, got {sites!r}.")
        super().__init__()
        self.rho, self.every_n_steps, self.budget, self.dropout = rho, every_n_steps, budget, dropout
        self.sites = list(sites)
        self.passes = (Passes(1 / every_n_steps, 1 / every_n_steps, per="batch"),) if rho > 0 else ()
        self._modules: dict[str, nn.Module] = {}
        self._shifts: dict[str, Tensor] = {}
        self._ran: set[str] = set()
        self._recomputing = False
        self._on = ExitStack()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        try:
            self._modules = modules_called(pl_module, self.sites)
        except ValueError as error:
            raise ValueError(f"{type(self).__name__}: sites matches no module: {error}") from error

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._begin()
        if self.rho > 0 and trainer.global_step % self.every_n_steps == 0:
            self._perturb(pl_module, batch, self._modules)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        # The forward pass is over: a site that has not run by now would have lost its shift without notice.
        missing = sorted(self._shifts.keys() - self._ran)
        if missing:
            raise RuntimeError(
                f"{type(self).__name__}: training_step did not run {missing[0]!r}, which loss(batch) runs, so this"
                " module could not be perturbed. Both must make the same forward pass through the same modules."
            )
        self._recomputing = True  # checkpointing runs sites again in the backward pass, with the same shift

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._off()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._off()
        if self._ran and "loss" in outputs:
            loss = outputs["loss"] * trainer.accumulate_grad_batches  # Lightning has divided it
            pl_module.log(f"{self.log_as}/perturbed_loss", loss)

    def _begin(self) -> None:
        self._off()
        self._ran = set()

    def _perturb(self, pl_module: LightningModule, batch: Any, sites: Mapping[str, nn.Module]) -> None:
        """Compute the shifts of a micro-batch and let the sites add them until ``_off``."""
        probe_pass = site_gradients(pl_module, batch, sites, fresh_masks=self.dropout == "independent")
        probe = _pool(probe_pass.outputs, probe_pass.grads, self._tokens(batch))
        rho = self.rho * probe.tokens.sqrt() if self.budget == "per_token" else self.rho
        self._shifts = worst_shifts(probe_pass.grads, rho, probe.norm)
        self._recomputing = False
        self._on.enter_context(hooked({name: sites[name] for name in self._shifts}, self._add_shift))

        # The gradients carry the loss scale and, over R ranks, a factor R; neither changes the shifts above.
        length = probe.norm / rank_and_world()[1] / probe_pass.scale
        usable = length.isfinite()
        ratio = rho / probe.norm * probe.relative / probe.shifted
        self.record(
            gradient_norm=torch.where(usable, length, 0.0),
            shift_per_activation=torch.where(usable & (probe.shifted > 0), ratio, 0.0),
            zero_gradients=(length == 0).float(),
            overflows=(~usable).float(),
        )
        self.trace["sites"] = float(len(self._shifts))
        pl_module.log_dict({f"{self.log_as}/clean_loss": probe_pass.loss, f"{self.log_as}/gradient_norm": length})

    def _tokens(self, batch: Any) -> Tensor | float:
        """Return the number of real tokens in the batch, or 0 if the budget does not depend on it."""
        if self.budget == "total":
            return 0.0
        if not isinstance(batch, Mapping) or "attention_mask" not in batch:
            raise TypeError(
                f"{type(self).__name__}: budget='per_token' counts the real tokens in batch['attention_mask'], which"
                " this batch lacks. Use budget='total'."
            )
        return batch["attention_mask"].sum()

    def _add_shift(self, name: str, value: Tensor) -> Tensor | None:
        """Return a site's output with its shift added, or None to leave the output unchanged."""
        if not torch.is_grad_enabled():  # another defense's pass over the same modules, such as the aligned model's
            return None
        shift, again = self._shifts[name], name in self._ran and not self._recomputing
        if again or shift.shape != value.shape:
            raise RuntimeError(
                f"{type(self).__name__}: training_step must run {name!r} once, with the shape that loss(batch) gives,"
                f" {list(shift.shape)}; it ran {'again' if again else 'once'} with {list(value.shape)}."
            )
        self._ran.add(name)
        return value + shift.to(value.dtype)

    def _off(self) -> None:
        self._on.close()
        self._shifts = {}

    @override
    def _release(self, pl_module: LightningModule) -> None:
        self._off()
        self._modules = {}
        super()._release(pl_module)


class _Probe(NamedTuple):
    """Results of the probe passes of all ranks together, all 0-d.

    Attributes:
        norm: square root of the sum of all ranks' squared gradient entries.
        relative: sum over sites and tokens of the gradient's norm divided by the activation's norm.
        shifted: number of pairs of a site and a token whose gradient is not zero.
        tokens: number of real tokens.
    """

    norm: Tensor
    relative: Tensor
    shifted: Tensor
    tokens: Tensor


def _pool(outputs: Mapping[str, Tensor], gradients: Mapping[str, Tensor], tokens: Tensor | float) -> _Probe:
    """Return the sums over sites, tokens and all ranks, by one collective.

    Suppose that each of R ranks has equally many response tokens. The joint batch's loss is then the mean of the ranks'
    losses. Its gradient at a rank's activations is 1/R of that rank's own gradient. The factor cancels in the shifts,
    so ``norm`` leaves it out.
    """
    lengths = [token_norms(g) for g in gradients.values()]
    relative = [n / token_norms(z) for n, z in zip(lengths, outputs.values(), strict=True)]
    # One tensor of four sums, so that one all_reduce pools the ranks; the order is that of _Probe's fields.
    sums = torch.stack(
        [
            torch.stack([n.square().sum() for n in lengths]).sum(),
            torch.stack([r.nan_to_num(posinf=0.0).sum() for r in relative]).sum(),
            torch.stack([(n > 0).sum() for n in lengths]).sum().to(lengths[0].dtype),
            torch.as_tensor(tokens, dtype=lengths[0].dtype, device=lengths[0].device),
        ]
    )
    if rank_and_world()[1] > 1:
        dist.all_reduce(sums)
    return _Probe(sums[0].sqrt(), sums[1], sums[2], sums[3])
