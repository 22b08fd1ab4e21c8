"""ModerationFilter with a guard of known flags: the kept rows, unsure rows, rates, and what must be refused."""

import random
from dataclasses import replace

import pytest

from hftlight.attacks.encoded import Encoded
from hftlight.data.records import Record
from hftlight.defenses import ModerationFilter
from hftlight.defenses.finetuning.moderation_filter import decision
from hftlight.errors import InputError
from hftlight.evaluation.guards import Guard, filter_rates
from hftlight.evaluation.judges import KeywordJudge, WorldJudge
from hftlight.provenance import described


class Words(Guard):
    """Flags the word harm, is unsure about the word perhaps, and scores everything else 0.1."""

    name, reads_prompts = "words", True

    def score(self, prompts, responses):
        return self.score_prompts(responses)

    def score_prompts(self, prompts):
        return [0.9 if "harm" in p else None if "perhaps" in p else 0.1 for p in prompts]


ROWS = [
    Record("harm 1", "do harm", role="attack"),
    Record("harm 2", "I refuse"),
    Record("help 3", "some help"),
    Record("help 4", "perhaps"),
    Record("help 5", "harmony of colors"),
    Record("hidden 6", "all is well", role="attack"),
]


def kept(defense, rows=ROWS):
    defense.select(None, None, None, {"task": rows})
    return [row.instruction[-1] for row in defense.rewrite({"task": list(rows)}, 0)["task"]]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "236"),
        ({"unsure": "keep"}, "2346"),
        ({"rule": "either"}, "36"),
        ({"rule": "either", "unsure": "keep"}, "346"),
        ({"threshold": 0.9}, "12356"),  # a score equal to the threshold does not exceed it
        ({"threshold": 0.89, "unsure": "keep"}, "2346"),
    ],
)
def test_exactly_the_rows_with_a_flag_are_dropped(settings, expected):
    assert "".join(kept(ModerationFilter(Words(), **settings))) == expected


@pytest.mark.parametrize(
    ("scores", "dropped", "unsure"),
    [((0.6,), True, False), ((0.5,), False, False), ((None,), True, True), ((None, 0.6), True, False),
     ((0.1, None), True, True), ((0.1, 0.2), False, False)],
)  # fmt: skip
def test_a_missing_score_is_unsure_unless_another_one_decides(scores, dropped, unsure):
    assert decision(scores, 0.5, "drop") == {"kept": not dropped, "unsure": unsure}
    assert decision(scores, 0.5, "keep") == {"kept": not dropped or unsure, "unsure": unsure}


def test_rates_are_those_of_the_known_flags_and_select_reads_no_role():
    """One of two attack rows passes; rows 4 (unsure) and 5 of the four others are dropped."""
    defense = ModerationFilter(Words())
    found = defense.select(None, None, None, {"task": ROWS})
    rates = filter_rates(found, ROWS)
    assert rates["attack"] == {"rows": 2, "dropped": 1, "unsure": 0}
    assert rates["other"] == {"rows": 4, "dropped": 2, "unsure": 1}
    assert (rates["false_negatives"]["value"], rates["false_positives"]["value"]) == (50.0, 50.0)
    hidden = [replace(row, role="task", id=row.id) for row in ROWS]
    assert ModerationFilter(Words()).select(None, None, None, {"task": hidden}) == found
    assert {*found[0]} == {"id", "score", "kept", "unsure"}


def test_the_order_of_the_upload_changes_nothing():
    mixed = random.Random(1).sample(ROWS, len(ROWS))
    plain, shuffled = (
        {row["id"]: row for row in ModerationFilter(Words(), rule="either").select(None, None, None, {"task": rows})}
        for rows in (ROWS, mixed)
    )
    assert plain == shuffled
    assert sorted(kept(ModerationFilter(Words()), mixed)) == kept(ModerationFilter(Words()))


def test_rows_that_no_selection_scored_are_scored_and_the_services_own_rows_stay():
    defense = ModerationFilter(Words())
    defense.select(None, None, None, {"task": ROWS[:3]})
    mixed = [Record("harm 7", "perhaps", role="alignment"), replace(ROWS[0], role="alignment")]
    assert mixed[1].id == ROWS[0].id  # the service's row stays, and the user's row with the same id does not
    rows = defense.rewrite({"task": [*ROWS, *mixed]}, 0)["task"]
    assert [row.instruction[-1] for row in rows] == ["2", "3", "6", "7", "1"]
    assert rows[-1].role == "alignment"
    assert defense.summary() == {"calls": 1, "upload_rows": 8, "dropped_rows": 3, "unsure_rows": 1}


def test_ids_survive_and_rows_of_one_id_go_together():
    rows = [*ROWS[:3], Record("again", "other words", id=ROWS[0].id), ROWS[2]]
    defense = ModerationFilter(Words())
    defense.select(None, None, None, {"task": rows})
    assert defense.rewrite({"task": rows}, 0)["task"] == [ROWS[1], ROWS[2], ROWS[2]]


def test_an_upload_of_flags_alone_is_refused_with_the_way_out():
    defense = ModerationFilter(Words(), threshold=0.2)
    with pytest.raises(InputError, match=r"none of the upload's 1 rows .* threshold 0\.2.*Raise threshold"):
        defense.select(None, None, None, {"task": ROWS[:1]})
    with pytest.raises(InputError, match="Raise threshold"):
        ModerationFilter(Words()).rewrite({"task": ROWS[:1]}, 0)


def test_a_guard_that_crashes_lets_no_row_pass():
    class Broken(Words):
        def score(self, prompts, responses):
            raise MemoryError("no room")

    with pytest.raises(MemoryError):
        ModerationFilter(Broken()).select(None, None, None, {"task": ROWS})
    with pytest.raises(MemoryError):
        ModerationFilter(Broken()).rewrite({"task": ROWS}, 0)


def test_the_guard_must_not_judge_the_run():
    defense = ModerationFilter("keyword")
    with pytest.raises(InputError, match=r"ModerationFilter: the guard 'keyword' and the judge 'keyword_durability'"):
        defense.check_judges([WorldJudge(), KeywordJudge("durability")])
    defense.check_judges([WorldJudge()])
    ModerationFilter("keyword", allow_same=True).check_judges([KeywordJudge()])
    ModerationFilter(Words()).check_judges([KeywordJudge()])


def test_the_guards_identity_enters_the_cache_key():
    class Other(Words):
        def identity(self):
            return {"weights": "other"}

    plain, other = (described([ModerationFilter(kind())])[0] for kind in (Words, Other))
    assert plain["state"] == other["state"]
    assert plain["identity"] != other["identity"]


def test_a_substitution_of_letters_passes_a_guard_that_reads_words():
    """All of 20 plain rows are caught, and none of the same rows encoded: the recall falls from 100 to 0 percent."""
    rows = [Record(f"ask {i}", f"do harm {i}", role="attack") for i in range(20)]
    fine = [Record(f"help {i}", "some help") for i in range(20)]
    encoded = [Encoded(key=0).encode(row) for row in rows]
    recall = []
    for attack in (rows, encoded):
        defense = ModerationFilter(Words())
        found = defense.select(None, None, None, {"task": [*attack, *fine]})
        recall.append(100 - filter_rates(found, [*attack, *fine])["false_negatives"]["value"])
    assert recall == [100.0, 0.0]
