"""Analysis: the tone of the first token, refusing or not, and the layer at which it appears."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from hftlight.analysis.analysis import Analysis, Part, Picture, Row
from hftlight.analysis.drawing import layer_figure
from hftlight.analysis.states import last_states, lens, mean_row
from hftlight.analysis.view import View

PANELS = {"harmful": "harmful prompts", "ordinary": "ordinary prompts"}


def refusal_log_odds(logits: Tensor, refusing: Sequence[int]) -> Tensor:
    r"""Return the log-odds that the next token opens a refusal, in nats, float64 ``[...]``.

    With R the refusing tokens and z the logits,

    .. math:: \log \frac{P(R)}{1 - P(R)} = \log \sum_{t \in R} e^{z_t} - \log \sum_{t \notin R} e^{z_t}

    Args:
        logits: ``[..., vocabulary]``.
        refusing: ids of the tokens that open a refusal, at least one and not all.
    """
    z = logits.double()
    inside = torch.zeros(z.shape[-1], dtype=torch.bool, device=z.device)
    inside[list(refusing)] = True
    return torch.logsumexp(z[..., inside], -1) - torch.logsumexp(z[..., ~inside], -1)


@dataclass(frozen=True)
class Tone(Analysis):
    r"""Log-odds that an answer opens with a refusal, at the first token and layer by layer.

    Rows: ``refusal_log_odds`` of the model (layer None) and under the logit lens (layer 0 on), in nats, for harmful and
    ordinary prompts (``position``). The intervals are 95 % over prompts. ``first_refusing_layer`` is the first layer
    from which on the mean over harmful prompts stays above 0; there is no such row if there is no such layer.

    A refusing token opens more of the aligned model's refusals than of its other answers to the same prompts.

    Args:
        prompts: harmful and ordinary prompts, >= 2.

    Cost: one forward pass per prompt, and the aligned model's short answers to the prompts once.
    Source: Arditi et al., "Refusal in Language Models Is Mediated by a Single Direction", NeurIPS 2024,
    arXiv:2406.11717, refusal score; Leong et al., "No Two Devils Alike", 2024, arXiv:2405.16229, refusal tone.
    Differs: the refusing tokens come from the aligned model's answers instead of a list per family of models.
    """

    prompts: int = 40

    def __post_init__(self) -> None:
        if self.prompts < 2:
            raise ValueError(f"Tone: prompts must be >= 2, got {self.prompts}.")

    @override
    def measure(self, part: Part, view: View) -> list[Row]:
        refusing = view.openings(self.prompts)
        rows = []
        for kind, name in (("harmful", "harmful"), ("over_refusal", "ordinary")):
            states = last_states(view.model, view.prompts(kind, self.prompts))  # type: ignore[arg-type]
            odds = torch.stack([refusal_log_odds(lens(view.model, layer), refusing) for layer in states]).cpu()
            rows += [mean_row("refusal_log_odds", values, layer, name) for layer, values in enumerate(odds)]
            rows.append(mean_row("refusal_log_odds", odds[-1], None, name))
            if name == "harmful" and (first := first_layer(odds.mean(1).tolist())) is not None:
                rows.append(Row("first_refusing_layer", float(first)))
        return rows

    @override
    def pictures(self, rows: Sequence[Row]) -> Iterator[Picture]:
        yield Picture(
            "tone",
            "Refusal tone",
            "Log-odds that the next token opens a refusal, under the logit lens after each decoder layer: left for"
            " harmful prompts, right for ordinary ones. Above 0 a refusing token is the likelier one. Bands: 95 %"
            " intervals over prompts.",
            layer_figure(rows, "refusal_log_odds", PANELS, "refusal log-odds, nats", at=0.0),
        )


def first_layer(odds: Sequence[float]) -> int | None:
    """Return the first layer from which on all log-odds are above 0, or None if the last one is not."""
    below = [layer for layer, value in enumerate(odds) if not value > 0]
    after = max(below, default=-1) + 1
    return after if after < len(odds) else None
