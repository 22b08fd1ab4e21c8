"""TaskArithmetic: scale the user's update, and subtract what a harmful training adds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import nn

from hftlight.engine.weights.arithmetic import Arithmetic
from hftlight.models.repaired import repair_model


class TaskArithmetic(Arithmetic):
    r"""Scale the user's update, and subtract the largest entries of the harm vector.

    Let :math:`W_{un}` be the aligned model after training on harmful rows. Then

    .. math:: W' = W_{al} + k \, \mathrm{DARE}_p(W_{ft} - W_{al}) - \lambda \, \mathrm{Trim}_K(W_{un} - W_{al})

    :math:`\mathrm{Trim}_K` keeps the fraction K of the entries with the largest magnitudes, of all weights together.
    :math:`\mathrm{DARE}_p` is that of ``RESTA``, which is the case k = 1, K = 1.

    With :math:`\lambda = 0` the result lies on the line from the aligned (k = 0) to the fine-tuned model (k = 1). This
    is the control for another repair: k is then the distance of the repaired model from the aligned one, divided by
    that of the fine-tuned model. Reports of ``RESTA`` and ``TaskArithmetic`` have this quotient as ``norm_ratio``.

    Args:
        update_weight: k, dimensionless, >= 0; 1 keeps the update.
        harm_weight: lambda, dimensionless, >= 0; 0 needs no unaligned model.
        keep: K, fraction of the harm vector's entries that is subtracted, in (0, 1]. Below 1 the result is a whole
            model. The count is exact, rounded down.
        drop: p, fraction of the update that DARE drops in expectation, in [0, 1); 0 drops nothing. The rest is divided
            by 1 - p.
        drop_unit: ``"entry"`` drops entries of the displacement, so that an adapter becomes a whole model.
            ``"component"`` drops singular components of an adapter's update, which stays an adapter.
        output: as in ``Repair``.
        aligned: as in ``RESTA``.
        unaligned: the aligned model after training on harmful rows, a folder or hub id. It is read by blocks of rows.
            Needed unless ``harm_weight`` is 0.

    Raises:
        ValueError: if an argument is out of range.

    Cost: as ``RESTA``. With K below 1 the aligned and the unaligned model are read three more times, for the cut.
    Source: Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023, arXiv:2212.04089. Hazra et al., "Safety
        Arithmetic", EMNLP 2024, arXiv:2406.11801, harm direction removal (HDR); the preset is that
        of the official notebook for base and fine-tuned models.
    Differs: HDR alone. The second part of Safety Arithmetic steers activations at inference and cannot be saved in
        plain weights. The fraction K is cut exactly over all weights; ties go to the first entry. The official code
        keeps all entries at the K-th value. Where its edit is limited to some layers, it subtracts the whole vector in
        all others.
    """

    dials = ("update_weight", "harm_weight")
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "safety_arithmetic_repo": {"update_weight": 1.0, "harm_weight": 3.0, "keep": 0.1}
    }

    def __init__(
        self,
        update_weight: float = 0.5,
        harm_weight: float = 0.0,
        keep: float = 1.0,
        drop: float = 0.0,
        drop_unit: Literal["entry", "component"] = "entry",
        output: str | None = None,
        aligned: str | None = None,
        unaligned: str | None = None,
    ) -> None:
        super().__init__(update_weight, harm_weight, drop, drop_unit, keep, output, aligned, unaligned)
        self.update_weight, self.harm_weight, self.keep = update_weight, harm_weight, keep


def task_arithmetic(model: nn.Module | str | Path, seed: int = 0, **arguments: Any) -> dict[str, Any]:
    """Repair a fine-tuned model with TaskArithmetic in one call, without Lightning.

    Args:
        model: a PEFT model whose active adapter is the user's update, or a causal LM with all parameters trained. It is
            changed in memory. Or the folder of either, which stays unchanged.
        seed: seed of DARE.
        **arguments: further arguments of ``TaskArithmetic``, such as ``aligned``, ``unaligned``, and ``output``, the
            folder for the repaired model.

    Returns:
        The report: per weight the norms of the update, of the harm vector and of the result, and the changed entries.

    Raises:
        RuntimeError: if the model is already repaired.
        ValueError: if an argument of ``TaskArithmetic`` is out of range, or a folder is repaired without ``output``.
    """
    return repair_model(TaskArithmetic(**arguments), model, seed=seed)
