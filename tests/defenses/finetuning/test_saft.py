"""SAFT's scores on Gaussian states with known answers, and its selection against a pass of one row at a time."""

import json
import math
import random
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from hftlight.data.records import Record
from hftlight.data.templates import get_template
from hftlight.data.tokens import encode
from hftlight.defenses import SAFT
from hftlight.defenses.finetuning.saft import auroc, best_threshold, leading_directions, spectral_scores
from hftlight.errors import InputError
from tests.helpers.contract import model_of, records
from tests.helpers.tokenizers import CHATML, byte_tokenizer

DOUBLE = {"dtype": torch.float64}


def gaussian(rows, hidden, seed=0):
    return torch.randn(rows, hidden, generator=torch.Generator().manual_seed(seed), **DOUBLE)


def normal(x):
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def scored(states, k=1, centered=True):
    return spectral_scores(states, leading_directions(states, k, centered))


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.8])
def test_auroc_of_two_clusters_is_the_closed_form(share):
    """Scores are squares of N(-p d, 1) and N((1 - p) d, 1). Their difference and sum are independent normals.

    So P(|h| > |b|) = F(d/s) F((1 - 2p) d/s) + F(-d/s) F(-(1 - 2p) d/s) with s the root of 2. Above p = 1/2 harmful
    rows score low.
    """
    count, distance = 20_000, 3.0
    states = gaussian(count, 12)
    harmful = torch.arange(count) < share * count
    states[harmful, 4] += distance
    scores = scored(states)
    a, b = distance / math.sqrt(2), (1 - 2 * share) * distance / math.sqrt(2)
    expected = normal(a) * normal(b) + normal(-a) * normal(-b)
    assert auroc(scores[harmful], scores[~harmful]) == pytest.approx(expected, abs=0.015)


@pytest.mark.parametrize("spike", [2.0, 0.2])
def test_a_spike_is_found_above_the_threshold_only(spike):
    """With g = hidden / rows, the squared overlap is (1 - g/l^2) / (1 + g/l) for a spike l above the root of g."""
    rows, hidden = 1600, 400
    states = gaussian(rows, hidden)
    states[:, 0] *= math.sqrt(1 + spike)
    overlap = float(leading_directions(states).vectors[0, 0] ** 2)
    g = hidden / rows
    expected = (1 - g / spike**2) / (1 + g / spike) if spike > math.sqrt(g) else 0.0
    assert overlap == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize(("k", "centered"), [(1, True), (3, True), (2, False)])
def test_scores_equal_those_of_a_singular_value_decomposition(k, centered):
    states = gaussian(1500, 7) * torch.arange(1, 8) + 2  # more rows than one block
    z = states - states.mean(0) if centered else states
    _, sigmas, vectors = torch.linalg.svd(z, full_matrices=False)
    expected = [
        sum(sigmas[j] * (row @ vectors[j]) ** 2 for j in range(k)) / sum(sigmas[j] for j in range(k)) for row in z
    ]
    assert_close(scored(states, k, centered), torch.stack(expected), rtol=1e-9, atol=0)


def test_uncentered_scores_along_one_direction_sum_to_the_largest_eigenvalue():
    states = gaussian(50, 6) + 1
    assert_close(scored(states, centered=False).sum(), torch.linalg.svdvals(states)[0] ** 2)


def test_a_rotation_changes_nothing_and_a_permutation_permutes():
    states = gaussian(60, 8) * torch.arange(1, 9)
    rotation = torch.linalg.qr(gaussian(8, 8, seed=1))[0]
    order = torch.randperm(60, generator=torch.Generator().manual_seed(2))
    for k in (1, 3):
        assert_close(scored(states @ rotation + 5, k), scored(states, k))
        assert_close(scored(states[order], k), scored(states, k)[order])


@pytest.mark.parametrize("k", [1, 2])
def test_planted_rows_have_the_highest_scores(k):
    states = gaussian(100, 16)
    states[40:50, 3] += 8
    assert set(scored(states, k).topk(10).indices.tolist()) == set(range(40, 50))


def test_equal_states_score_zero():
    assert_close(scored(torch.ones(5, 3)), torch.zeros(5, **DOUBLE))


def test_auroc_and_threshold_match_a_count_over_pairs():
    draw = random.Random(0)
    for _ in range(20):
        high = torch.tensor([float(draw.randrange(6)) for _ in range(5)])
        low = torch.tensor([float(draw.randrange(6)) for _ in range(7)])
        wins = [(h > s) + 0.5 * (h == s) for h in high.tolist() for s in low.tolist()]
        assert auroc(high, low) == pytest.approx(sum(wins) / len(wins))

        def balanced(t, high=high, low=low):
            return float((high > t).double().mean() + (low <= t).double().mean())

        chosen, values = best_threshold(high, low), sorted({*high.tolist(), *low.tolist()})
        best = max(map(balanced, values))
        assert chosen == max(t for t in values if balanced(t) > best - 1e-9)


def clusters(share, distance=6.0):
    """Return states of an upload of 100 rows, of which the first are harmful, and of 40 trusted rows."""
    states, safe = gaussian(100, 5), gaussian(40, 5, seed=3)
    states[: round(100 * share), 0] += distance
    return {"task": states[None], "safe": safe[None]}


@pytest.mark.parametrize(("share", "rate", "sign"), [(0.2, 0.2, 1), (0.8, 0.5, -1)])
def test_trusted_rows_decide_which_side_is_dropped(share, rate, sign):
    verdict = SAFT(rate=rate).judged(clusters(share), [1])
    assert (verdict.sign, verdict.count) == (sign, round(100 * rate))
    assert verdict.facts["trusted_dropped"] < 0.1
    dropped = (sign * verdict.scores).topk(verdict.count).indices
    assert (dropped < 100 * share).double().mean() >= 0.9


@pytest.mark.parametrize("share", [0.2, 0.7])
def test_labelled_rows_choose_layer_side_and_threshold(share):
    """The second of three layers separates the rows. Its threshold drops nearly all harmful rows and few others."""
    informative = clusters(share, distance=10)
    harmful = gaussian(30, 5, seed=4)
    harmful[:, 0] += 10
    noise = {"task": gaussian(100, 5, 5), "safe": gaussian(40, 5, 6), "harmful": gaussian(30, 5, 7)}
    informative = {"task": informative["task"][0], "safe": informative["safe"][0], "harmful": harmful}
    states = {name: torch.stack([noise[name], informative[name], noise[name]]) for name in noise}
    verdict = SAFT(calibrate=True).judged(states, [4, 5, 6])
    assert verdict.facts["layer"] == 5
    assert verdict.facts["auroc"] > 0.9
    assert verdict.sign == (1 if share < 0.5 else -1)
    assert verdict.count is None
    beyond = verdict.sign * verdict.scores > verdict.sign * verdict.threshold
    assert beyond[: round(100 * share)].double().mean() > 0.9
    assert beyond[round(100 * share) :].double().mean() < 0.1


def test_layers_are_the_middle_one_or_the_middle_third():
    assert SAFT(rate=0.1).layers(32) == [16]
    assert SAFT(rate=0.1).layers(1) == [1]
    assert SAFT(calibrate=True).layers(32) == list(range(11, 22))
    assert SAFT(calibrate=True).layers(2) == [1]
    assert SAFT(calibrate=True).layers(1) == [1]


def tiny():
    tokenizer = byte_tokenizer(chat_template=CHATML)
    return model_of("full"), tokenizer, get_template("chat", tokenizer)


@pytest.mark.parametrize("pooling", ["last", "end", "mean"])
def test_the_selection_equals_a_pass_of_one_row_at_a_time(pooling):
    model, tokenizer, template = tiny()
    model.train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    rows, counts = records(24), []
    defense = SAFT(rate=0.25, pooling=pooling)
    found = defense.select(model, tokenizer, template, rows, batch_size=5, progress=counts.append)
    states = {}
    for name in ("task", "alignment"):
        for row in rows[name]:
            e = encode(row, template, tokenizer, 999)
            hidden = model(input_ids=torch.tensor([e.input_ids]), output_hidden_states=True).hidden_states[1][0]
            response = hidden[e.prompt_length : -1]
            states.setdefault(name, []).append(
                {"last": response[-1], "end": hidden[-1], "mean": response.mean(0)}[pooling].detach()
            )
    task, trusted = torch.stack(states["task"]), torch.stack(states["alignment"])
    vector = torch.linalg.svd(task - task.mean(0)).Vh[0]
    scores = ((task - task.mean(0)) @ vector) ** 2
    assert [row["score"] for row in found] == pytest.approx(scores.tolist(), rel=1e-6)
    ordered, safe = scores.sort().values, ((trusted - task.mean(0)) @ vector) ** 2
    high, low = float((safe >= ordered[-6]).double().mean()), float((safe <= ordered[5]).double().mean())
    side = scores if high <= low else -scores
    assert {i for i, row in enumerate(found) if not row["kept"]} == set(side.topk(6).indices.tolist())
    assert defense.manifest()["kept"] == 18
    assert defense.manifest()["layer"] == 1
    assert defense.manifest()["trusted_dropped"] == min(high, low)
    assert defense.manifest()["threshold"] == pytest.approx(float(ordered[-6] if high <= low else ordered[5]))
    assert counts[-1] == defense.selecting(rows) == 48
    assert model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_neither_the_roles_nor_the_order_of_the_rows_have_an_effect():
    model, tokenizer, template = tiny()
    rows = records(24)
    other = [replace(row, role="task", id=row.id) for row in reversed(rows["task"])]
    first = SAFT(rate=0.25).select(model, tokenizer, template, rows)
    second = SAFT(rate=0.25).select(model, tokenizer, template, {**rows, "task": other})
    one, two = ({row["id"]: (row["kept"], row["score"]) for row in some} for some in (first, second))
    assert {name: kept for name, (kept, _) in one.items()} == {name: kept for name, (kept, _) in two.items()}
    assert [one[name][1] for name in one] == pytest.approx([two[name][1] for name in one])


def test_a_file_of_labelled_rows_sets_the_threshold(tmp_path):
    model, tokenizer, template = tiny()
    rows, path = records(24), tmp_path / "labelled.jsonl"
    rows["task"] = [*rows["alignment"][:16], *rows["harmful"][:6]]  # so that the labelled rows resemble the upload
    labelled = [(r, True) for r in rows["alignment"]] + [(r, False) for r in rows["harmful"]]
    lines = [{"prompt": r.instruction, "response": r.response, "is_safe": safe} for r, safe in labelled]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    by_file = SAFT(validation=str(path)).select(model, tokenizer, template, {"task": rows["task"]})
    by_stream = SAFT(calibrate=True).select(model, tokenizer, template, rows)
    assert [row["kept"] for row in by_file] == [row["kept"] for row in by_stream]
    assert by_file[0]["auroc"] == by_stream[0]["auroc"]
    path.write_text(json.dumps({**lines[0], "is_safe": "maybe"}) + "\n")
    with pytest.raises(InputError, match=r"SAFT: line 1 of .* needs the texts prompt and response, and is_safe"):
        SAFT(validation=str(path)).selecting(rows)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:30]))
    with pytest.raises(InputError, match=r"at least 20 safe and 20 harmful .* 6 harmful"):
        SAFT(validation=str(path)).selecting(rows)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "rate is missing.*--saft.rate"),
        ({"rate": 0.4}, "above 0.3 needs at least 20 trusted rows, .*'alignment' has 16"),
        ({"rate": 0.98}, "all 16 rows of the upload would be dropped"),
        ({"calibrate": True}, "streams have 16 safe and 16 harmful"),
    ],
)
def test_a_filter_that_cannot_work_is_refused_before_any_model_is_read(arguments, words):
    with pytest.raises(InputError, match=words):
        SAFT(**arguments).selecting(records(16))


def test_with_few_trusted_rows_a_small_rate_drops_the_high_side():
    model, tokenizer, template = tiny()
    found = SAFT(rate=0.25).select(model, tokenizer, template, records(16))
    assert {row["dropped_side"] for row in found} == {"high"}
    lowest = min(row["score"] for row in found if not row["kept"])
    assert all(row["score"] <= lowest for row in found if row["kept"])


def test_a_layer_beyond_the_model_is_refused():
    model, tokenizer, template = tiny()
    with pytest.raises(InputError, match=r"SAFT: layer must lie in \[1, 2\], got 3"):
        SAFT(rate=0.1, layer=3, trusted="none").select(model, tokenizer, template, {"task": [Record("a", "b")] * 9})
