"""Probes on planted directions, splits by group, and the area under the curve from pairs."""

from itertools import product

import pytest
import torch
from torch.testing import assert_close

from hftlight.analysis.analysis import Row
from hftlight.analysis.probes import Probes, auroc, groups_of, halves, kind_of_split, recognition, split_of
from hftlight.analysis.ridge import probe
from hftlight.analysis.study import study
from hftlight.analysis.subjects import plain_subjects
from hftlight.config import Evaluation, RunConfig
from hftlight.data.world import text
from hftlight.data.world.build import build_world, phrasing

LABELS = torch.arange(40) % 2 == 0


def planted(seed, axis, strength=10.0):
    """Return states of two layers: noise, and noise with the label along one axis."""
    noise = torch.randn(2, 40, 30, generator=torch.Generator().manual_seed(seed))
    noise[1, :, axis] += strength * (LABELS.float() - 0.5)
    return noise


def test_auroc_counts_pairs_and_ties_half():
    values = torch.tensor([[0.0, 1.0, 1.0, 2.0, 3.0], [5.0, 5.0, 5.0, 5.0, 5.0]])
    positive = torch.tensor([False, True, False, False, True])
    pairs = [(p > n) + (p == n) / 2 for p, n in product([1.0, 3.0], [0.0, 1.0, 2.0])]
    assert_close(auroc(values, positive), torch.tensor([sum(pairs) / 6, 0.5]).double())


def test_all_layers_are_solved_as_one_by_one():
    states = planted(0, 3)
    w, b = probe(states, LABELS)
    for layer in range(2):
        alone = probe(states[layer], LABELS)
        assert_close(w[layer], alone[0])
        assert_close(b[layer], alone[1])


def test_a_planted_direction_is_recognized_and_a_turned_one_is_not_transferred():
    """Layer 1 carries the label on axis 3, in the other model on axis 7. Layer 0 carries nothing."""
    own = recognition(planted(0, 3), LABELS, planted(1, 3), LABELS)
    assert own.auroc[1] > 0.99
    assert own.accuracy[1] > 0.95
    assert 0.25 < own.auroc[0] < 0.75
    assert 0.1 < recognition(planted(0, 3), LABELS, planted(1, 7), LABELS).auroc[1] < 0.9
    assert recognition(planted(0, 7), LABELS, planted(1, 7), LABELS).auroc[1] > 0.99
    shuffled = LABELS[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    assert 0.1 < recognition(planted(0, 3), shuffled, planted(1, 3), LABELS).auroc[1] < 0.9
    with pytest.raises(ValueError, match="got 40 and 0"):
        recognition(planted(0, 3), LABELS | True, planted(1, 3), LABELS)


KINDS = ["drugs"] * 4 + ["arms"] * 3 + ["fraud"] * 3 + ["chat"] * 4 + ["figures"] * 4 + ["homonyms"] * 2
BAD = [True] * 10 + [False] * 10


@pytest.mark.parametrize(
    ("kinds", "words"),
    [
        (KINDS, "split by kind"),
        ([""] * 20, "split by row"),
        ([*KINDS[:10], *[""] * 10], "split by kind (harmful) and row (ordinary)"),
        ([*[""] * 10, *KINDS[10:]], "split by row (harmful) and kind (ordinary)"),
        (["drugs", "arms"] * 10, "split by row"),
    ],
)
def test_no_group_stands_on_both_sides_and_both_classes_stand_on_each(kinds, words):
    groups, said = groups_of(kinds, BAD)
    assert said == words
    bad = torch.tensor(BAD)
    splits = [halves(groups, BAD, seed) for seed in range(5)]
    for split in splits:
        assert not (split.train & split.test).any()
        sides = [
            {g for g, chosen in zip(groups, side.tolist(), strict=True) if chosen} for side in vars(split).values()
        ]
        assert not sides[0] & sides[1]
        for side in (split.train, split.test):
            assert 0 < int((side & bad).sum()) < int(side.sum())
    assert len({tuple(split.train.tolist()) for split in splits}) > 1


def test_the_world_is_split_by_phrasing_and_name():
    world = build_world()
    records = [*world.dev, *world.lookalike_dev, *world.test, *world.lookalike]
    harmful = [record.kind == "restricted" for record in records]
    assert kind_of_split(records, harmful) == "split by phrasing"
    for seed in range(3):
        split = split_of(records, harmful, seed)
        sides = [
            [r for r, chosen in zip(records, side.tolist(), strict=True) if chosen] for side in vars(split).values()
        ]
        frames = [{phrasing(r.instruction) for r in side} for side in sides]
        assert None not in frames[0] | frames[1]
        assert not frames[0] & frames[1]
        # An invented name is a head with a tail; no name of one side occurs on the other.
        made = {h + t for h in text.HEADS for t in text.TAILS}
        names = [{w.strip("?.,'") for r in side for w in r.instruction.split()} & made for side in sides]
        assert names[0]
        assert not names[0] & names[1]
        assert all({r.kind for r in side} == {"restricted", "near_verb", "near_name"} for side in sides)
    assert split_of(records, harmful, 0).train.sum() < 180


def test_a_study_of_the_aligned_model_and_of_own_prompts(tmp_path, monkeypatch):
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path / "cache"))
    config = RunConfig(model="tiny", accelerator="cpu")
    rows = study(plain_subjects(["tiny"], config, "tiny"), [Probes(prompts=8, seeds=2)]).rows["probes"]
    assert rows[0] == Row("probe_prompts", 32.0, position="split by phrasing", model="tiny")
    auc = {row.position: row.value for row in rows if (row.metric, row.layer) == ("probe_auroc", None)}
    assert auc["own"] == auc["transferred"] != auc["shuffled"]
    assert all(0 <= row.value <= 1 for row in rows[1:])
    own = RunConfig(model="tiny", accelerator="cpu", evaluation=Evaluation(prompts=6, over_refusal_prompts=6))
    for name, words in (("test", "pick a lock"), ("over_refusal", "kill a process")):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(f'{{"prompt": "{words} {i}"}}\n' for i in range(6)))
        setattr(own.data, name, str(file))
    done = study(plain_subjects(["tiny"], own, None), [Probes(prompts=8, seeds=2)])
    assert done.rows["probes"][0] == Row("probe_prompts", 12.0, position="split by row", model="tiny")
    assert {row.position for row in done.rows["probes"][1:]} == {"own", "shuffled"}
    assert "split by row" in done.pictures["probes"][0].caption


@pytest.mark.parametrize(("changes", "said"), [({"prompts": 3}, "prompts must be >= 4"), ({"seeds": 1}, "seeds")])
def test_bad_arguments_are_named(changes, said):
    with pytest.raises(ValueError, match=said):
        Probes(**changes)
