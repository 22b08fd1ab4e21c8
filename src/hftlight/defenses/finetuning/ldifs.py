"""LDIFS: stay close to the aligned model's features on the user's data."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from hftlight.data.records import UPLOADED
from hftlight.engine import Defense, Passes, Slot, Stage
from hftlight.models.module import Forward, decoder_layers

THRESHOLD = 0.1  # nats; the Booster port omits a layer's penalty unless it is below this


def feature_distance(features: Tensor, reference: Tensor, mask: Tensor, axis: str = "features") -> Tensor:
    r"""Return the mean over counted tokens and dimensions of :math:`(h/\|h\| - h_0/\|h_0\|)^2`.

    Args:
        features: h, ``[batch, tokens, hidden]``.
        reference: h_0 of the aligned model, likewise.
        mask: 1 on tokens that count, 0 on padding, ``[batch, tokens]``. Without a 1 the mean is 0.
        axis: the axis of the norm. ``"features"`` normalizes each token's vector; ``"tokens"`` normalizes each
            dimension over the tokens of a row.

    Returns:
        A 0-d tensor, in float32 or a wider type.
    """
    dim = 2 if axis == "features" else 1
    left, right = (F.normalize(h, dim=dim) for h in _counted(features, reference, mask))
    return (left - right).square().sum() / (mask.sum().clamp(min=1) * features.shape[-1])


def summed_distance(features: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """Return the sum over counted tokens and dimensions of ``(h - h_0)^2``.

    The arguments are those of ``feature_distance``.
    """
    left, right = _counted(features, reference, mask)
    return (left - right).square().sum()


def _counted(features: Tensor, reference: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in float32 or wider, with zeros where the mask is 0, since padding may hold any value."""
    dtype, out = torch.promote_types(features.dtype, torch.float32), ~mask.bool().unsqueeze(-1)
    return features.to(dtype).masked_fill(out, 0.0), reference.to(dtype).masked_fill(out, 0.0)


def quarters(depth: int) -> list[int]:
    """Return the layers that end each quarter of a model of ``depth`` layers, counted from 0."""
    return sorted({-(-depth * part // 4) - 1 for part in (1, 2, 3, 4)})


class LDIFS(Defense):
    r"""Penalize how far hidden features move from the aligned model's, on the user's own inputs.

    Let f be the user's loss. Let :math:`h_{l,t}` be the features of real token t at a chosen layer l, and :math:`h^0`
    those of the aligned model. The tokens of a micro-batch include prompts, and exclude rows that a defense added. With
    :math:`n(h) = h / \|h\|_2`, training minimizes

    .. math:: f(w) + \lambda\, \mathrm{mean}_{l}\, \mathrm{mean}_{t, d} \big(n(h_{l,t}) - n(h^0_{l,t})\big)^2_d

    Args:
        lam: penalty weight lambda (the paper's alpha), dimensionless, >= 0; 0 is plain fine-tuning.
        layers: decoder layers whose outputs count, from 0; None for the last one of each quarter of the model.
        axis: ``"features"`` normalizes each token's vector. ``"tokens"`` normalizes each dimension over the tokens of a
            row, as the official vision code does on its data layout.
        variant: ``"ldifs"`` as above, or ``"booster"`` for the port in the Booster repository. The port's penalty is
            half of lambda times the summed squared distance of every layer's MLP output. It includes padding,
            normalizes nothing, and omits a layer whose penalty is not below 0.1. It ignores ``layers`` and ``axis``.

    Raises:
        ValueError: if ``lam`` is negative, a layer is not in the model, or a mode is unknown.
        TypeError: if the variant is ``"booster"`` and the decoder layers have no ``mlp``.

    Cost: one forward pass of the aligned model per micro-batch, shared with other defenses that need it. Memory holds
    its features at the chosen layers. The user's features come from the training pass itself. Under LoRA there is no
    second model.
    Source: Mukhoti et al., "Fine-tuning can cripple your foundation model", TMLR 2024, arXiv:2308.13320; lambda 10 in
    the official arguments. The port: Huang et al., "Booster", ICLR 2025, arXiv:2409.01586, its repository.
    Differs: the paper's is a vision method with taps after the embeddings and after blocks 3, 6, 9 and 12. Here it uses
    decoder layers without the embeddings, which adapters do not move. Features are normalized per token and masked. The
    official code, written for images with channels first, normalizes each feature over the tokens. There are two
    forward passes in all, not three. The port drops a layer's penalty if it is large, so that the defense is off where
    features drift most. The port is therefore a separate variant here, and never the default. The port also clips to 5
    in every micro-batch, which is left to the Trainer. It cuts rows to 256 tokens, which is left to the data module.
    Its reference runs in training mode.
    """

    stage, slots = Stage.FINETUNING, (Slot.LOSS,)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "repo": {"lam": 10.0},
        "booster": {"lam": 1e-4, "variant": "booster"},
    }

    def __init__(
        self,
        lam: float = 10.0,
        layers: Sequence[int] | None = None,
        axis: Literal["features", "tokens"] = "features",
        variant: Literal["ldifs", "booster"] = "ldifs",
    ) -> None:
        if not lam >= 0:
            raise ValueError(f"LDIFS: lam must be >= 0 (0 turns it off), got {lam}.")
        if layers is not None and (not layers or not all(isinstance(n, int) and n >= 0 for n in layers)):
            raise ValueError(f"LDIFS: layers must be a list of layer numbers >= 0, got {layers}.")
        if axis not in ("features", "tokens"):
            raise ValueError(f"LDIFS: axis must be 'features' or 'tokens', got {axis!r}.")
        if variant not in ("ldifs", "booster"):
            raise ValueError(f"LDIFS: variant must be 'ldifs' or 'booster', got {variant!r}.")
        super().__init__()
        self.lam, self.layers, self.axis, self.variant = lam, None if layers is None else list(layers), axis, variant
        self.passes = (Passes(1, per="batch", shared="reference"),) if lam > 0 else ()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.taps(pl_module.model)  # type: ignore[arg-type]

    @override
    def taps(self, model: nn.Module) -> dict[str, nn.Module]:
        if self.lam == 0:
            return {}
        layers = decoder_layers(model)
        if self.variant == "booster":
            if not all(isinstance(getattr(layer, "mlp", None), nn.Module) for layer in layers):
                raise TypeError(
                    "LDIFS: variant 'booster' reads the output of every decoder layer's mlp, which"
                    f" {type(layers[0]).__name__} does not have; use variant='ldifs'."
                )
            return {f"ldifs/{i}": layer.mlp for i, layer in enumerate(layers)}  # type: ignore[misc]
        chosen = quarters(len(layers)) if self.layers is None else self.layers
        if max(chosen) >= len(layers):
            raise ValueError(f"LDIFS: the model has the layers 0 to {len(layers) - 1}, got {chosen}.")
        return {f"ldifs/{i}": layers[i] for i in chosen}

    @override
    def loss_term(self, forward: Forward) -> Tensor | None:
        if self.lam == 0:
            return None
        # pairs holds the features of the model that trains and of the aligned model, tap by tap.
        pairs = [
            (h, forward.reference.features[name]) for name, h in forward.features.items() if name.startswith("ldifs/")
        ]
        mask, left_out = self._mask(forward.batch), {}
        if self.variant == "booster":
            sums = torch.stack([self.lam / 2 * summed_distance(h, h0, mask) for h, h0 in pairs])
            small = sums < THRESHOLD
            term, left_out = torch.where(small, sums, 0.0).sum(), {"layers_left_out": (~small).sum()}
        else:
            term = self.lam * torch.stack([feature_distance(h, h0, mask, self.axis) for h, h0 in pairs]).mean()
        self.record(penalty=term.detach(), **left_out)
        self.show({"ldifs/penalty": term})
        return term

    def _mask(self, batch: Mapping[str, Any]) -> Tensor:
        """Return a mask of the tokens that count, ``[batch, tokens]``.

        These are the real tokens of the user's rows. In the Booster port padding counts too.
        """
        mask: Tensor = batch["attention_mask"]
        mask = torch.ones_like(mask) if self.variant == "booster" else mask
        own = [role in UPLOADED for role in batch.get("role", ())]
        return mask if all(own) else mask * torch.tensor(own, device=mask.device).unsqueeze(1)
