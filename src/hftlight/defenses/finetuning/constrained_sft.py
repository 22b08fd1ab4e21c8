"""ConstrainedSFT: keep the probabilities of the first answer tokens close to the aligned model's."""

import hashlib
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from hftlight.data.records import UPLOADED
from hftlight.data.tokens import IGNORED
from hftlight.engine import Defense, Passes, Slot, Stage, rank_and_world
from hftlight.models.module import Forward


def constraint_weights(gain: Tensor, beta: Tensor, floor: float = 0.0) -> Tensor:
    r"""Return :math:`w_t = \max(2 (1 - \sigma(\beta_t d_t)), \mathrm{floor})`, the factor of a token's cross-entropy.

    Above the floor the factor is minus the derivative of ``constrained_loss`` by the token's log-probability.

    Args:
        gain: d, current log-probability of each response token minus that under the aligned model, nats, ``[tokens]``.
        beta: strength of each token's constraint, per nat, ``[tokens]``.
        floor: smallest factor, dimensionless.
    """
    return (2 * torch.sigmoid(-beta * gain)).clamp(min=floor)


def constrained_loss(gain: Tensor, beta: Tensor) -> Tensor:
    r"""Return :math:`-\frac{2}{\beta_t} \log \sigma(\beta_t d_t)` of each token, the method's objective, in nats.

    If beta is 0 the loss is :math:`-d_t`, its limit up to a constant. The arguments are those of
    ``constraint_weights``.
    """
    constrained = beta > 0
    # The inner where avoids 2 / 0, whose gradient would be NaN even where the outer where does not select it.
    return torch.where(constrained, -2 / torch.where(constrained, beta, 1.0) * F.logsigmoid(beta * gain), -gain)


def token_betas(
    places: Tensor,
    beta: float,
    first: float,
    bias: float,
    length: int,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return each response token's beta: ``beta * first`` at the first, ``beta * bias`` up to ``length``, else beta.

    Args:
        places: place of the tokens within their response, from 0, ``[tokens]``.
        beta: beta of ordinary tokens, per nat.
        first: factor of the first token.
        bias: factor of the following tokens.
        length: number of tokens with a factor, the first included.
        offset: number of tokens at the start of a response that do not count, such as a template's.
        dtype: type of the result.
    """
    # Entries 0 to length - 1 are the tokens with a factor; entry length is for all others, skipped ones included.
    table = [*[beta * first, *[beta * bias] * (length - 1)][:length], beta]
    counted = places - offset
    index = torch.where(counted < 0, length, counted).clamp(max=length)
    return torch.tensor(table, dtype=dtype, device=places.device)[index]


def places_in_turn(positions: Tensor) -> Tensor:
    """Return the place of each response token within its turn, from 0. A gap before a token starts a new turn.

    Args:
        positions: positions of the response tokens in the flattened ``[batch, tokens]``, rising, int64 ``[tokens]``.
            The last response token of a row and the first of the next are never neighbours there.
    """
    # The cumulative maximum carries the index of the latest turn start to every token of the turn.
    index = torch.arange(len(positions), device=positions.device)
    begins = positions.diff(prepend=positions[:1] - 2) != 1
    return index - torch.where(begins, index, 0).cummax(0).values


class ConstrainedSFT(Defense):
    r"""Fine-tune with a token-wise constraint that is strict on the first tokens of an answer.

    Let :math:`d_t = \log \pi_w(y_t) - \log \pi_0(y_t)` be the gain over the aligned model :math:`\pi_0` at response
    token t of a row. Training minimizes the mean over response tokens of

    .. math:: -\frac{2}{\beta_t} \log \sigma(\beta_t d_t)

    Its gradient is that of the cross-entropy times :math:`w_t = 2 (1 - \sigma(\beta_t d_t))`. The weight is 1 at the
    start, falls to 0 as the token gains, and rises to 2 as the token loses. Rows that a defense added (role other than
    ``"task"``) get plain cross-entropy. In a row with several answers, counting restarts at each answer's first token.

    Args:
        beta: beta of ordinary tokens, per nat, >= 0; 0 is plain fine-tuning.
        bias_factor: beta's factor at response tokens 2 to ``bias_length``, >= 0.
        first_token_bias_factor: beta's factor at the first response token, >= 0.
        bias_length: number of response tokens with a factor, the first included, >= 0.
        weight_floor: smallest w, in [0, 1].
        offset: number of response tokens to skip before counting, >= 0, for templates that begin every answer alike.
        online: recompute the aligned model's probabilities in each step, for rows that are augmented at random.

    Raises:
        ValueError: if a number is out of range.

    Cost: one forward pass of the aligned model for each row of the upload, at the row's first occurrence. The result is
    cached as one number per response token (4 bytes). ``online`` takes one pass per micro-batch. Under LoRA there is no
    second model.
    Source: Qi et al., "Safety Alignment Should Be Made More Than Just a Few Tokens Deep", ICLR 2025, arXiv:2406.05946:
    beta 0.5 at the first token, 2 at tokens 2 to 5, 0.1 after.
    Differs: the floor of 1e-3 is in the official code only; ``weight_floor=0`` is the paper's. The floor takes effect
    at beta d = 7.6, and from there the token learns at 0.1 % of the rate. The mean runs over the tokens of a
    micro-batch, as in the code, or of an optimizer step under StreamsDataModule(average="window"). The paper sums over
    a row's tokens. The code's AdamW has a first beta of 0.5, for its plain baseline too. Here that is an optimizer
    setting, and no part of a preset. Cached probabilities are looked up by the row's tokens, not by its place in the
    file. They are the same on all ranks and are saved in the checkpoint. Recomputed in another batch, padded to another
    width, they would differ in their last bits. The logged loss is the plain cross-entropy, and the objective above is
    logged beside it. The code logs the weighted cross-entropy, which is neither of the two.
    """

    stage, slots, claims = Stage.FINETUNING, (Slot.LOSS,), ("token weights",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"weight_floor": 0.0},
        "repo": {"weight_floor": 1e-3},
    }

    def __init__(
        self,
        beta: float = 0.1,
        bias_factor: float = 20.0,
        first_token_bias_factor: float = 5.0,
        bias_length: int = 5,
        weight_floor: float = 1e-3,
        offset: int = 0,
        online: bool = False,
    ) -> None:
        factors = {"bias_factor": bias_factor, "first_token_bias_factor": first_token_bias_factor}
        for name, value in {"beta": beta, **factors}.items():
            if not value >= 0:
                raise ValueError(f"ConstrainedSFT: {name} must be >= 0, got {value}.")
        for name, value in (("bias_length", bias_length), ("offset", offset)):
            if not (isinstance(value, int) and value >= 0):
                raise ValueError(f"ConstrainedSFT: {name} must be a whole number of tokens >= 0, got {value}.")
        if not 0 <= weight_floor <= 1:
            raise ValueError(f"ConstrainedSFT: weight_floor must lie in [0, 1], got {weight_floor}.")
        super().__init__()
        self.beta, self.bias_factor, self.first_token_bias_factor = beta, bias_factor, first_token_bias_factor
        self.bias_length, self.weight_floor, self.offset, self.online = bias_length, weight_floor, offset, online
        self.passes = (Passes(float(online), per="batch", shared="reference"),) if beta > 0 else ()
        self._cached_losses: dict[str, Tensor] = {}

    @override
    def state_dict(self) -> dict[str, Any]:
        cached = list(self._cached_losses.values())
        packed = {"rows": list(self._cached_losses), "lengths": [len(losses) for losses in cached]}
        return {**super().state_dict(), **packed, "losses": torch.cat(cached) if cached else torch.empty(0)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        losses = state_dict["losses"].cpu().split(state_dict["lengths"])
        self._cached_losses = dict(zip(state_dict["rows"], losses, strict=True))

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._cached_losses = {}  # another training may start from another aligned model

    @override
    def token_weights(self, forward: Forward) -> Tensor | None:
        if self.beta == 0:
            return None
        own = [role in UPLOADED for role in forward.batch.get("role", ["task"] * len(forward.batch["labels"]))]
        before = self._aligned_losses(forward, own)
        if before is None:
            return None
        losses = forward.token_losses.detach()
        gain = before.to(losses) - losses
        betas = token_betas(
            places_in_turn(forward.positions),
            self.beta,
            self.first_token_bias_factor,
            self.bias_factor,
            self.bias_length,
            self.offset,
            losses.dtype,
        )
        weights, objective = constraint_weights(gain, betas, self.weight_floor), constrained_loss(gain, betas)
        if not all(own):
            of_user = torch.tensor(own, device=losses.device)[forward.rows]
            weights, objective = torch.where(of_user, weights, 1.0), torch.where(of_user, objective, losses)
            gain = torch.where(of_user, gain, 0.0)
        metrics = {"weight": weights.mean(), "gain": gain.mean(), "objective": objective.mean()}
        self.record(**metrics)
        self.show({f"constrained_sft/{name}": value for name, value in metrics.items()})
        return weights

    def _aligned_losses(self, forward: Forward, own: list[bool]) -> Tensor | None:
        """Return the aligned model's token losses, with zeros for rows that are not the user's.

        The aligned model runs on all ranks or on none, since a sharded model needs every rank. All ranks cache the
        losses of all ranks.

        Returns:
            The losses, ``[tokens]``, in nats. None if no row is the user's.
        """
        if self.online:
            wanted = _on_any_rank(any(own), forward.token_losses.device)
            aligned = forward.reference.token_losses if wanted else None
            return aligned if any(own) else None
        batch = {name: forward.batch[name].cpu() for name in ("input_ids", "attention_mask", "labels")}
        lengths = (batch["labels"][:, 1:] != IGNORED).sum(1).tolist()
        rows = list(zip(row_keys(batch), lengths, own, strict=True))
        new = any(mine and key not in self._cached_losses for key, _, mine in rows)
        if _on_any_rank(new, forward.token_losses.device):
            parts = forward.reference.token_losses.cpu().split(lengths)
            new_losses = {key: part.clone() for (key, _, mine), part in zip(rows, parts, strict=True) if mine}
            for key, part in _gather_losses(new_losses):
                self._cached_losses.setdefault(key, part)
        if not any(own):
            return None
        return torch.cat([self._cached_losses[key] if mine else torch.zeros(length) for key, length, mine in rows])


def row_keys(batch: Mapping[str, Tensor]) -> list[str]:
    """Return a hash of the content of every row: its real tokens and their labels.

    Args:
        batch: ``input_ids``, ``attention_mask`` and ``labels``, int64 ``[batch, tokens]``, on the CPU.
    """
    keys = []
    for row, real, label in zip(batch["input_ids"], batch["attention_mask"].bool(), batch["labels"], strict=True):
        content = torch.cat([row[real], label[real]]).numpy().tobytes()
        keys.append(hashlib.sha256(content).hexdigest()[:32])
    return keys


def _on_any_rank(wanted: bool, device: torch.device) -> bool:
    """Return whether the flag is true on any rank."""
    if rank_and_world()[1] == 1:
        return wanted
    flag = torch.tensor(float(wanted), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def _gather_losses(losses: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Return the keys and losses of all ranks, in the order of the ranks."""
    world = rank_and_world()[1]
    every: list[Any] = [losses] * world
    if world > 1:
        dist.all_gather_object(every, losses)
    return [entry for each in every for entry in each.items()]
