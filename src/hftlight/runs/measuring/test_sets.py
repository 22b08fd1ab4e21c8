"""TestSets: the prompts, references and judges that a model is measured with."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hftlight.attacks.attack import Attack
from hftlight.data.records import Record
from hftlight.data.sources import Task
from hftlight.evaluation.judges import get_judge, judge_identity
from hftlight.evaluation.metrics.refusals import get_refusal_classifier
from hftlight.files import digest

SETS = ("harmful", "over_refusal", "task")
UNTRIGGERED = "harmful_without_trigger"  # asked of a model that is served with a trigger, as anybody would ask it
WITHOUT_TRIGGER = "harmful_score_without_trigger"
HARMFUL = {"harmful": "harmful_score", UNTRIGGERED: WITHOUT_TRIGGER}


@dataclass(frozen=True)
class TestSets:
    """What a model is measured on.

    Attributes:
        harmful: held-out harmful prompts, as a judge reads them.
        over_refusal: ordinary prompts that look harmful.
        task_rows: rows of the task's test split.
        task: the task, with its answer parser.
        judges: names of the judges of the harmful score, the deciding one first.
        refusal_judge: name of what tells refusals of ordinary prompts, for ``get_refusal_classifier``.
        attack: asks harmful prompts, and reads the answers before a judge sees them, as the attacker does.
        alignment_rows: rows whose loss is the alignment loss.
        validation_rows: harmful rows that no model was trained on, whose loss is the harmful validation loss.
    """

    harmful: Sequence[Record]
    over_refusal: Sequence[Record]
    task_rows: Sequence[Record]
    task: Task
    judges: tuple[str, ...]
    refusal_judge: str = "xstest_string"
    attack: Attack | None = None
    alignment_rows: Sequence[Record] = ()
    validation_rows: Sequence[Record] = ()

    def digest(self, judged: bool = True) -> str:
        """Return the hash of all prompts, references and, with ``judged``, judges."""
        every = [*(r for name in SETS for r in self.rows(name)), *self.asked("harmful")]
        rows = [(r.id, *r.texts) for r in every]
        judges = [self.judges, self.refusal_judge] if judged else []
        return digest([rows, self.task.name, *judges, self.read("".join(map(chr, range(32, 127))))])

    def judging(self) -> list[dict[str, Any]]:
        """Return what each judge is: its class, endpoint, model and weights, as far as it has them."""
        judges = [*map(get_judge, self.judges), get_refusal_classifier(self.refusal_judge)]
        return [judge_identity(judge) for judge in judges]

    def read(self, response: str) -> str:
        """Return an answer to a harmful prompt as the attacker reads it."""
        return response if self.attack is None else self.attack.decode(response)

    def first(self, count: int) -> "TestSets":
        """Return the first so many harmful prompts and task rows, 0 for all, and no ordinary prompts: for curves."""
        cut = count or None
        return replace(self, harmful=self.harmful[:cut], over_refusal=(), task_rows=self.task_rows[:cut])

    def rows(self, name: str) -> Sequence[Record]:
        """Return the records of one of ``SETS``."""
        return {
            "harmful": self.harmful,
            UNTRIGGERED: self.harmful,
            "over_refusal": self.over_refusal,
            "task": self.task_rows,
        }[name]

    def asked(self, name: str) -> Sequence[Record]:
        """Return the records of a set as a model is asked them: harmful ones with what the attack puts in front."""
        rows = self.rows(name)
        return self.attack.test_records(rows) if self.attack is not None and name in HARMFUL else rows

    @property
    def graded_rows(self) -> Sequence[Record]:
        """The task's rows, if the task has right answers; else none."""
        return self.task_rows if self.task.graded else ()
