"""RESTA: after the user's fine-tuning, add the vector that leads from an unaligned to the aligned model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import nn

from hftlight.engine.weights.arithmetic import Arithmetic
from hftlight.models.repaired import repair_model


class RESTA(Arithmetic):
    r"""Add the safety vector, from a model without safety to the aligned model, to the fine-tuned weights.

    Let :math:`W_{un}` be the aligned model after training on harmful rows. Then

    .. math:: W' = W_{al} + \mathrm{DARE}_p(W_{ft} - W_{al}) + g \, (W_{al} - W_{un}), \qquad
              \mathrm{DARE}_p(\Delta) = m \circ \Delta / (1 - p)

    where each entry of m is 1 with probability 1 - p, else 0. Without DARE (p = 0), :math:`W_{ft} = W_{un}` and
    g = 1 give the aligned model exactly.

    If all vectors are thin and p is 0, the result is an adapter. Its rank is the sum of the ranks, and it has no cross
    terms. The vectors are thin if the aligned and the unaligned model are adapters on one model, or one is an adapter
    on the other. Otherwise the result is a whole model, and the vector is added to all weights.

    Args:
        strength: g, dimensionless, >= 0.
        drop: p, fraction of the update that DARE drops in expectation, in [0, 1); 0 drops nothing. The rest is divided
            by 1 - p.
        drop_unit: what is dropped. ``"entry"``, as in the paper, drops entries of the displacement. Under an adapter
            the result is then a whole model. ``"component"`` drops singular components of the adapter's update, which
            stays an adapter. The expectation is the same. With few components the result varies much more.
        output: as in ``Repair``.
        aligned: as in ``Repair``. Under an adapter it is worth giving if the unaligned model is an adapter on it: only
            then are the vectors known to be thin.
        unaligned: the aligned model after training on harmful rows, a folder or hub id. It is read by blocks of rows.
            Needed unless ``strength`` is 0.

    Raises:
        ValueError: if an argument is out of range.

    Cost: no data and no pass, but one more training, that of the unaligned model. With thin vectors no dense weight is
        read. Otherwise each weight is read once from each model by blocks of rows, and DARE draws one number per entry.
    Source: Bhardwaj et al., "Language Models are Homer Simpson! Safety Re-Alignment of Fine-tuned Language Models
        through Task Arithmetic", ACL 2024, arXiv:2402.11746. DARE is that of Yu et al., "Language Models are Super
        Mario", ICML 2024, arXiv:2311.03099.
    Differs: the official code was not available, so g and p are no published values; 0.5 is the default of a public
        re-implementation. That one adds multiples of the factors A and B under an adapter, which gives cross terms,
        takes the last adapter only, and casts to float16. The dropped entries depend on seed and place alone. Under
        FSDP2 the result is a whole model, since a sharded adapter cannot grow.
    """

    dials, harm_name = ("strength",), "strength"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"reimplementation": {"strength": 0.5}}

    def __init__(
        self,
        strength: float = 0.5,
        drop: float = 0.0,
        drop_unit: Literal["entry", "component"] = "entry",
        output: str | None = None,
        aligned: str | None = None,
        unaligned: str | None = None,
    ) -> None:
        super().__init__(1.0, strength, drop, drop_unit, 1.0, output, aligned, unaligned)
        self.strength = strength


def resta(model: nn.Module | str | Path, unaligned: str, seed: int = 0, **arguments: Any) -> dict[str, Any]:
    """Repair a fine-tuned model with RESTA in one call, without Lightning.

    Args:
        model: a PEFT model whose active adapter is the user's update, or a causal LM with all parameters trained. It is
            changed in memory. Or the folder of either, which stays unchanged.
        unaligned: the aligned model after training on harmful rows, a folder or hub id, or the adapter of this
            training. It is read by blocks of rows.
        seed: seed of DARE.
        **arguments: further arguments of ``RESTA``, such as ``aligned``, and ``output``, the folder for the repaired
            model.

    Returns:
        The report: per weight the norms of the update, of the safety vector and of the result, and the changed entries.

    Raises:
        RuntimeError: if the model is already repaired.
        ValueError: if an argument of ``RESTA`` is out of range, or a folder is repaired without ``output``.
    """
    return repair_model(RESTA(unaligned=unaligned, **arguments), model, seed=seed)
