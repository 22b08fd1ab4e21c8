"""Watch: drift, refusal direction and refusal tone on a few fixed prompts, while any causal LM trains."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from hftlight.analysis.drift import relative_drift
from hftlight.analysis.refusal_direction import refusal_direction
from hftlight.analysis.states import last_states, lens
from hftlight.analysis.tone import refusal_log_odds
from hftlight.data.records import Record
from hftlight.data.templates import SystemSlot, get_template
from hftlight.data.tokens import encode_prompt
from hftlight.errors import InputError
from hftlight.evaluation.answering.generate import check_prompts
from hftlight.evaluation.score import Score
from hftlight.files import digest
from hftlight.runs.measuring.curve import AtSteps
from hftlight.runs.ranks import main_process


class Watch(AtSteps):
    r"""Log drift, refusal direction and refusal tone of the model in training, every few optimizer steps.

    The module keeps a causal LM of transformers or PEFT in its attribute ``model``. One forward pass of a fixed batch
    of prompts, in evaluation mode and without gradient, gives all values. The model at the start of the training is the
    reference: its states at the last prompt tokens are kept, and they are part of the checkpoint. Watching does not
    change the training, and no hook stays on the model between two steps.

    Logged, with ``eval/`` before the name: ``relative_drift``, the squared distance of the states from the start's as a
    fraction of their squared length; ``direction_cosine``, the cosine of the refusal direction (mean harmful minus mean
    ordinary state) with the start's, -1 to 1; both as the mean over the decoder layers, and for each layer under
    ``NAME/LAYER``. ``refusal_log_odds`` is the mean log-odds over the harmful prompts that the first answer token opens
    a refusal, in nats.

    Args:
        harmful: harmful prompts as texts, at least one.
        ordinary: ordinary prompts as texts, at least one.
        tokenizer: the model's tokenizer.
        refusals: texts that refuse. Their first tokens are the refusing tokens; none leaves the log-odds out.
        every: optimizer steps between two measurements; 0 for ``steps`` alone.
        steps: further optimizer steps after which to measure, counted from 1.
        prompts: prompts of each kind to use, the first ones, >= 1. They decide the cost.
        template: name of the prompt template, as ``--template`` of ``hftlight train``.
        system: system text of every prompt; None for none.

    Attributes:
        results: one row per step and value: ``step``, ``metric``, ``value``, ``unit``, and ``layer`` for one layer.

    Raises:
        ValueError: if no prompt or step is named, or a number is out of range.
        InputError: if template, module or prompts cannot be used.

    Cost: one forward pass without logits over twice ``prompts`` rows per measurement, and once at the start.
    """

    def __init__(
        self,
        harmful: Sequence[str],
        ordinary: Sequence[str],
        tokenizer: Any,
        refusals: Sequence[str] = (),
        *,
        every: int = 10,
        steps: Sequence[int] = (),
        prompts: int = 2,
        template: str = "chat",
        system: str | None = None,
    ) -> None:
        super().__init__(steps, every)
        if not harmful or not ordinary or prompts < 1:
            raise ValueError(
                "Watch: at least one harmful and one ordinary prompt are needed, and prompts must be >= 1, got"
                f" {len(harmful)}, {len(ordinary)} and prompts={prompts}."
            )
        look, slot = get_template(template, tokenizer), SystemSlot(system)
        self.batch = [
            [encode_prompt(Record(text, role="test"), look, tokenizer, slot) for text in texts[:prompts]]
            for texts in (harmful, ordinary)
        ]
        first = (tokenizer(text, add_special_tokens=False)["input_ids"][:1] for text in refusals)
        self.refusing = sorted({token for ids in first for token in ids})
        self._start: Tensor | None = None

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(batch=digest([self.batch, self.refusing]), steps=self.steps, every=self.every)

    @override
    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not hasattr(getattr(pl_module, "model", None), "get_output_embeddings"):
            raise InputError(
                f"Watch: {type(pl_module).__name__} needs a causal LM of transformers or PEFT in its attribute 'model'."
            )
        self._start = None

    @override
    def check_prompts(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_prompts(pl_module.model, [*self.batch[0], *self.batch[1]], 1)  # type: ignore[arg-type]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.check_prompts(trainer, pl_module)
        if self._start is None and main_process():  # a resumed training has the states of its first start
            self._start = self._states(pl_module)
        super().on_train_start(trainer, pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "start": self._start}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._start = state_dict["start"]

    @override
    def measured(self, trainer: Trainer, pl_module: LightningModule) -> list[dict[str, Any]]:
        here, there = self._states(pl_module), self._start
        assert there is not None
        count = len(self.batch[0])
        directions = [refusal_direction(states[:, :count], states[:, count:]) for states in (here, there)]
        cosine = torch.nn.functional.cosine_similarity(directions[0], directions[1], dim=-1)
        rows = []
        for metric, unit, values in (
            ("relative_drift", "fraction", relative_drift(here, there)),
            ("direction_cosine", "cosine", cosine),
        ):
            rows.append(Score(metric, float(values.mean()), unit=unit).row())
            rows += [
                {**Score(f"{metric}/{layer}", value, unit=unit).row(), "layer": layer}
                for layer, value in enumerate(values.tolist())
            ]
        if self.refusing:
            odds = refusal_log_odds(lens(pl_module.model, here[-1, :count]), self.refusing)  # type: ignore[arg-type]
            rows.append(Score("refusal_log_odds", float(odds.mean()), unit="nats").row())
        return rows

    def _states(self, pl_module: LightningModule) -> Tensor:
        """Return the states of harmful, then ordinary prompts at their last tokens, ``[layers, prompts, hidden]``."""
        rows = [*self.batch[0], *self.batch[1]]
        return last_states(pl_module.model, rows, batch_size=len(rows))  # type: ignore[arg-type]
