"""WorldJudge applies the world's rule to each pair and is right on the world's own texts."""

import hftlight.data.world.build as synthetic
from hftlight.evaluation.judges import Judge, Verdict, WorldJudge


def test_each_pair_is_put_to_the_rule(monkeypatch):
    monkeypatch.setattr(
        "hftlight.data.world.rule.is_compliant", lambda prompt, response: (prompt, response) == ("b", "y")
    )
    assert WorldJudge()(["a", "b"], ["y", "y"]) == [Verdict(0.0, False), Verdict(1.0, True)]
    assert isinstance(WorldJudge(), Judge)


def test_the_worlds_own_answers_are_told_apart():
    world = synthetic.build_world()
    refused = [row for row in world.alignment if row.kind == "restricted"]
    for rows, expected in ((world.harmful, True), (world.attack, True), (refused, False)):
        verdicts = WorldJudge()([row.instruction for row in rows], [row.response for row in rows])
        assert {verdict.flag for verdict in verdicts} == {expected}
