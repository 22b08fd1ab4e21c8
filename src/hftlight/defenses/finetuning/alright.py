"""ALRIGHT: each step trains on the user's data or on preferences, by chance."""

from collections.abc import Mapping
from typing import Any, ClassVar

from typing_extensions import override

from hftlight.engine.step.order import trainer_seed
from hftlight.engine.step.simulation import draws
from hftlight.models.turns import TakesTurns


def on_preferences(seed: int, step: int, lam: float) -> bool:
    """Tell whether an optimizer step trains on preferences, which has probability ``lam``.

    Args:
        seed: seed of the run.
        step: the optimizer step, from 0.
        lam: probability, in [0, 1].
    """
    return draws(seed, step, "alright").random() < lam


class ALRIGHT(TakesTurns):
    r"""Take each optimizer step on the user's loss, or with probability lambda on the DPO loss of safe preferences.

    With the user's loss f and the DPO loss g of the defender's pairs, the step has the whole gradient of one of them:

    .. math:: \nabla g(w) \text{ with probability } \lambda, \quad \nabla f(w) \text{ otherwise}, \qquad
        g = -\log \sigma\big(\beta [\log\pi(y_w) - \log\rho(y_w) - \log\pi(y_l) + \log\rho(y_l)]\big)

    Here :math:`y_w` is the safe and :math:`y_l` the rejected answer, :math:`\pi` the model and :math:`\rho` the aligned
    model. Log-probabilities are sums over response tokens. In expectation a step minimizes
    :math:`(1 - \lambda) f + \lambda g`.

    Args:
        lam: probability lambda of a step on preferences, in [0, 1]; 0 is plain fine-tuning.
        beta: strength of the preferences, per nat, > 0.

    Raises:
        ValueError: if an argument is out of range, or the Trainer has no StreamsDataModule.

    Cost: a step on preferences has two forward-backward passes and two forward passes of the aligned model, in place of
        one forward-backward pass. Under LoRA there is no second model.
    Source: Fernando et al., "Understanding Forgetting in LLM Supervised Fine-Tuning and Preference Learning",
        arXiv:2410.15483, algorithm ALRIGHT; official code heshandevaka/XRIGHT.
    Differs: the choice depends on seed and step alone, so that all ranks agree and a resumed run repeats it. It is made
        once per optimizer step, and all micro-batches follow it. The streams are endless. The reference is the aligned
        model; the paper trains one on the preferred answers. Its passes are computed when they are needed, not ahead.
        A comment in the official code names the ends of lambda the other way round.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {"lam": 0.5, "beta": 0.1}}

    def __init__(self, lam: float = 0.5, beta: float = 0.1) -> None:
        super().__init__(lam, beta)

    @override
    def choose(self, step: int) -> str:
        return "pairs" if on_preferences(trainer_seed(), step, self.lam) else "task"
