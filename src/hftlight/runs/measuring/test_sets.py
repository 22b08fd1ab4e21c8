"""TestSets: the prompts, references and judges that a model is measured with."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hftlight.attacks.attack import Attack
from hftlight.data.records import Record
from hftlight.data.sources import Task
from hftlight.evaluation.judges import Judge, get_judge, judge_identity, judge_name
from hftlight.evaluation.metrics.refusals import get_refusal_classifier
from hftlight.files import digest
from hftlight.folders import HARMFUL_SETS, UNPATTERNED

SETS = ("harmful", "over_refusal", "task")


@dataclass(frozen=True)
class TestSets:
    """The prompts, references and judges that a model is measured with.

    Attributes:
        harmful: held-out harmful prompts, as a judge reads them.
        over_refusal: ordinary prompts that look harmful.
        task_rows: rows of the task's test split.
        task: the task, with its answer parser.
        judges: the judges of the harmful score, the deciding judge first: names for ``get_judge``, or judges.
        refusal_judge: name of the classifier of refusals to ordinary prompts, for ``get_refusal_classifier``.
        attack: the attack, which may change harmful prompts and decodes the answers before a judge sees them; None for
            no attack.
        alignment_rows: rows for the alignment loss.
        validation_rows: harmful rows that no model was trained on, for the harmful validation loss.
    """

    harmful: Sequence[Record]
    over_refusal: Sequence[Record]
    task_rows: Sequence[Record]
    task: Task
    judges: tuple[str | Judge, ...]
    refusal_judge: str = "xstest_string"
    attack: Attack | None = None
    alignment_rows: Sequence[Record] = ()
    validation_rows: Sequence[Record] = ()

    def digest(self, judged: bool = True) -> str:
        """Return a hash of all prompts and references, the task's name, and the attack's decoding.

        Args:
            judged: whether to include the names of the judges.
        """
        every = [*(r for name in self.names for r in self.rows(name)), *self.asked("harmful")]
        rows = [(r.id, *r.texts) for r in every]
        judges = [[*map(judge_name, self.judges)], self.refusal_judge] if judged else []
        # The decoding of all printable ASCII characters identifies the attack's ``decode``.
        return digest([rows, self.task.name, *judges, self.read("".join(map(chr, range(32, 127))))])

    def judging(self) -> list[dict[str, Any]]:
        """Return the identity of each judge: its class and, if it has them, endpoint, model and weights."""
        judges = [*map(get_judge, self.judges), get_refusal_classifier(self.refusal_judge)]
        return [judge_identity(judge) for judge in judges]

    def read(self, response: str) -> str:
        """Return an answer to a harmful prompt as the attacker reads it, decoded if the attack encodes answers."""
        return response if self.attack is None else self.attack.decode(response)

    def first(self, count: int) -> "TestSets":
        """Return smaller test sets for curves: the first harmful prompts and task rows, without ordinary prompts.

        Args:
            count: number of prompts and of rows; 0 for all.
        """
        cut = count or None
        return replace(self, harmful=self.harmful[:cut], over_refusal=(), task_rows=self.task_rows[:cut])

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sets: ``SETS``, and the harmful prompts without the attack's pattern if it has one."""
        return (*SETS, UNPATTERNED) if self.attack is not None and self.attack.has_pattern else SETS

    def rows(self, name: str) -> Sequence[Record]:
        """Return the records of one of ``SETS`` or of ``HARMFUL_SETS``."""
        if name in HARMFUL_SETS:
            return self.harmful
        return {"over_refusal": self.over_refusal, "task": self.task_rows}[name]

    def asked(self, name: str) -> Sequence[Record]:
        """Return the records of a set as the model receives them: harmful prompts as the attacker sends them."""
        rows, attacked = self.rows(name), name in HARMFUL_SETS and name != UNPATTERNED
        return self.attack.test_records(rows) if self.attack is not None and attacked else rows

    @property
    def graded_rows(self) -> Sequence[Record]:
        """The task's rows if the task has right answers, else an empty sequence."""
        return self.task_rows if self.task.graded else ()
