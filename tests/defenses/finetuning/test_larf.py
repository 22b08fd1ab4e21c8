"""LARF's scores against loops, its pairing of anchors, and its selection against a pass of one row at a time."""

import random

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from hftlight.data.records import Record, prompt_key
from hftlight.data.templates import get_template
from hftlight.data.tokens import encode
from hftlight.defenses import LARF
from hftlight.defenses.finetuning.larf import paired, paired_scores
from hftlight.errors import InputError
from tests.helpers.contract import model_of, records
from tests.helpers.tokenizers import CHATML, byte_tokenizer

DOUBLE = {"dtype": torch.float64}


def draw(rows, hidden=6, seed=0):
    return torch.randn(rows, hidden, generator=torch.Generator().manual_seed(seed), **DOUBLE)


def cosine(a, b):
    return float(F.cosine_similarity(a, b, dim=0))


@pytest.mark.parametrize("top", [1, 3, 9, 100])
def test_scores_match_a_loop_over_pairs(top):
    states, unsafe, safe = draw(5), draw(9, seed=1), draw(9, seed=2)
    expected = []
    for z in states:
        values = sorted((cosine(z, u) - cosine(z, a) for u, a in zip(unsafe, safe, strict=True)), reverse=True)
        expected.append(sum(values[:top]) / len(values[:top]))
    assert_close(paired_scores(states, unsafe, safe, top), torch.tensor(expected, **DOUBLE))


def test_the_pairing_counts_only_if_there_are_more_pairs_than_are_averaged():
    states, unsafe, safe = draw(5), draw(9, seed=1), draw(9, seed=2)
    for top, same in ((9, True), (4, False)):
        one, two = (paired_scores(states, unsafe, some, top) for some in (safe, safe.flip(0)))
        assert torch.allclose(one, two) is same


def test_rows_of_one_prompt_are_paired_and_the_order_of_the_rows_has_no_effect():
    unsafe = [Record(f"ask {i}", f"yes {i}") for i in range(8)]
    safe = [Record(f"Ask {i}!", f"no {i}") for i in (1, 3, 5)] + [Record(f"other {i}", "no") for i in range(9)]
    left, right, shared = paired(unsafe, safe, 6)
    assert (len(left), len(right), shared) == (6, 6, 3)
    assert [prompt_key(r) for r in left[:3]] == [prompt_key(r) for r in right[:3]]
    assert {r.instruction for r in left[:3]} == {"ask 1", "ask 3", "ask 5"}
    assert len({r.id for r in left}) == len({r.id for r in right}) == 6
    shuffle = random.Random(0)
    for _ in range(5):
        shuffle.shuffle(unsafe)
        shuffle.shuffle(safe)
        assert paired(unsafe, safe, 6) == (left, right, shared)
    assert paired(unsafe, safe, 2)[2] == 2
    assert paired(unsafe, [], 5) == ([], [], 0)


def test_a_safe_row_has_one_partner():
    unsafe = [Record("ask", f"yes {i}") for i in range(3)]
    left, right, shared = paired(unsafe, [Record("ask", "no"), Record("other", "no")], 9)
    assert (len(left), shared) == (2, 1)
    assert {r.instruction for r in right} == {"ask", "other"}


def tiny():
    tokenizer = byte_tokenizer(chat_template=CHATML)
    return model_of("full"), tokenizer, get_template("chat", tokenizer)


@pytest.mark.parametrize("source", ["streams", "pairs"])
def test_the_selection_equals_a_pass_of_one_row_at_a_time(source):
    model, tokenizer, template = tiny()
    rows = records()
    defense = LARF(remove=4, source=source, safe="alignment", top=5, layer=1)

    def state(prompt, answer):
        e = encode(Record(prompt, answer), template, tokenizer, 999)
        ids = torch.tensor([e.input_ids[:-1]])
        return model(input_ids=ids, output_hidden_states=True).hidden_states[1][0, -1].detach()

    if source == "pairs":
        anchors = [((r.instruction, r.rejected), (r.instruction, r.response)) for r in rows["pairs"]]
    else:
        left, right, _ = paired(rows["harmful"], rows["alignment"], 100)
        anchors = [((u.instruction, u.response), (a.instruction, a.response)) for u, a in zip(left, right, strict=True)]
    unsafe, safe = (torch.stack([state(*pair[k]) for pair in anchors]) for k in (0, 1))
    scores = []
    for r in rows["task"]:
        z = state(r.instruction, r.response)
        values = sorted((cosine(z, u) - cosine(z, a) for u, a in zip(unsafe, safe, strict=True)), reverse=True)
        scores.append(sum(values[:5]) / 5)
    found = defense.select(model, tokenizer, template, rows, batch_size=3)
    assert [row["score"] for row in found] == pytest.approx(scores, abs=1e-9)
    dropped = sorted(range(16), key=lambda i: -scores[i])[:4]
    assert {i for i, row in enumerate(found) if not row["kept"]} == set(dropped)
    assert defense.manifest()["shared_prompts"] == (16 if source == "pairs" else 0)
    assert (defense.manifest()["pairs"], defense.manifest()["layer"]) == (16, 1)
    assert len(defense.rewrite(rows, 0)["task"]) == 12


def test_the_fraction_is_of_the_upload_and_the_layer_of_the_depth():
    assert LARF(0.25)._count(16) == 4
    assert LARF(1)._count(16) == 1
    assert [LARF().layers(count) for count in (32, 28, 2)] == [[10], [9], [1]]


def test_removing_all_rows_is_refused():
    with pytest.raises(InputError, match=r"LARF: all 16 rows of the upload would be dropped"):
        LARF(1000, safe="alignment").selecting(records())


def test_no_anchors_are_refused():
    with pytest.raises(InputError, match=r"LARF: there are no anchors; .*'harmful' has 16 rows and 'refusals' has 0"):
        LARF().selecting({**records(), "refusals": []})
