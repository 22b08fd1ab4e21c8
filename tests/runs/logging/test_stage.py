"""The names of scores, which are the same in every logger."""

from hftlight.runs.logging.rows import named, score_names


def test_a_further_judge_and_a_group_stand_behind_the_metric():
    rows = [
        {"metric": "harmful_score", "judge": "one"},
        {"metric": "harmful_score", "judge": "two"},
        {"metric": "harmful_score_by_category", "judge": "one", "group": "fraud"},
        {"metric": "harmful_score_by_category", "judge": "one", "group": "theft"},
        {"metric": "harmful_score_by_category", "judge": "two", "group": "theft"},
    ]
    assert score_names(rows) == [
        "eval/harmful_score",
        "eval/harmful_score/two",
        "eval/harmful_score_by_category/fraud",
        "eval/harmful_score_by_category/theft",
        "eval/harmful_score_by_category/theft/two",
    ]
    scores = [{**row, "kind": "score", "value": float(place)} for place, row in enumerate(rows)]
    assert named(scores) == {"eval/harmful_score": 0.0, "eval/harmful_score/two": 1.0}  # groups are not logged
