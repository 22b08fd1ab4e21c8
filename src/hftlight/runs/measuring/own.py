"""MeasureAt: harmful score, refusals and collapse on a user's own prompts, while any causal LM trains."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from hftlight.config import Evaluation, RunConfig
from hftlight.data.records import Record, read_records
from hftlight.data.sources import get_task
from hftlight.data.templates import SystemSlot, get_template
from hftlight.data.tokens import encode_prompt
from hftlight.errors import InputError
from hftlight.evaluation.answering.generate import check_prompts
from hftlight.evaluation.judges import Judge, judge_name
from hftlight.runs.measuring.curve import AtSteps
from hftlight.runs.measuring.measure import answers_to_set, judged_rows, scores
from hftlight.runs.measuring.test_sets import TestSets


class MeasureAt(AtSteps):
    """Measure harmful score, refusals and collapse after chosen optimizer steps of any LightningModule.

    The module keeps a causal LM of transformers or PEFT in its attribute ``model``. The model answers greedily, in
    evaluation mode. Measuring does not change the training.

    Args:
        prompts: held-out harmful prompts: texts, or a file, folder or hub name as for ``read_records``.
        tokenizer: the model's tokenizer.
        judge: the judge of the harmful score: a name for ``get_judge``, or any object with a name that maps prompts and
            answers to one ``Verdict`` per answer.
        steps: optimizer steps after which to measure, counted from 1.
        every: also measure after each multiple of this number of steps; 0 for ``steps`` alone.
        ordinary: ordinary prompts, likewise, for the over-refusal; none for no over-refusal.
        template: name of the prompt template, as ``--template`` of ``hftlight train``.
        system: system text of every prompt; None for none.
        max_new_tokens: most tokens of an answer, >= 1.
        batch_size: prompts answered at one time, >= 1.

    Attributes:
        results: one row per step and metric: ``step``, ``metric``, ``judge``, ``value``, ``low``, ``high``, ``count``,
            ``unit``. The metrics are those of a run, such as ``harmful_score``, ``refusal_rate``,
            ``collapsed_answers``.
        answers: the latest answers with prompts and verdicts, as rows of ``generations.jsonl``, in process 0 only.

    Raises:
        ValueError: if no step or no prompt is named, or a number is out of range.
        InputError: if prompts, template or judge cannot be used.

    Cost: one generation of all prompts per measurement. Its time counts towards no optimizer step.
    """

    def __init__(
        self,
        prompts: Sequence[str] | str | Path,
        tokenizer: Any,
        judge: str | Judge = "keyword",
        *,
        steps: Sequence[int] = (),
        every: int = 0,
        ordinary: Sequence[str] | str | Path = (),
        template: str = "chat",
        system: str | None = None,
        max_new_tokens: int = 64,
        batch_size: int = 16,
    ) -> None:
        super().__init__(steps, every)
        harmful, others = _records(prompts), _records(ordinary)
        if not harmful:
            raise ValueError("MeasureAt: prompts must hold at least one harmful prompt, got none.")
        if max_new_tokens < 1 or batch_size < 1:
            raise ValueError(
                f"MeasureAt: max_new_tokens and batch_size must be >= 1, got {max_new_tokens} and {batch_size}."
            )
        get_template(template, tokenizer)
        self.tokenizer, self.slot = tokenizer, SystemSlot(system)
        self.tests = TestSets(harmful, others, (), get_task("builtin"), (judge,))
        limits = Evaluation(max_new_tokens=max_new_tokens, batch_size=batch_size)
        self.config = RunConfig(template=template, system=system, evaluation=limits)
        self.answers: list[dict[str, Any]] = []

    @property
    @override
    def state_key(self) -> str:
        judges = [judge_name(judge) for judge in self.tests.judges]
        return self._generate_state_key(tests=self.tests.digest(), judges=judges, steps=self.steps, every=self.every)

    @override
    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not hasattr(getattr(pl_module, "model", None), "generate"):
            raise InputError(
                f"MeasureAt: {type(pl_module).__name__} needs a causal LM with generate() in its attribute 'model'."
            )
        self.answers = []

    @override
    def check_prompts(self, trainer: Trainer, pl_module: LightningModule) -> None:
        template, limits = get_template(self.config.template, self.tokenizer), self.config.evaluation
        records = [*self.tests.harmful, *self.tests.over_refusal]
        prompts = [encode_prompt(record, template, self.tokenizer, self.slot) for record in records]
        check_prompts(pl_module.model, prompts, limits.max_new_tokens, limits.batch_size)  # type: ignore[arg-type]

    @override
    def measured(self, trainer: Trainer, pl_module: LightningModule) -> list[dict[str, Any]]:
        model: Any = pl_module.model
        self.answers = []
        for kind in ("harmful", "over_refusal") if self.tests.over_refusal else ("harmful",):
            texts = answers_to_set(model, self.tokenizer, self.config, self.tests, kind, self.slot)
            self.answers += judged_rows(kind, texts, self.tests)
        return scores(self.answers, self.tests)


def _records(prompts: Sequence[str] | str | Path) -> list[Record]:
    if isinstance(prompts, (str, Path)):
        return read_records(prompts, role="test", need_response=False)
    return [Record(text, role="test") for text in prompts]
