"""CTRL's beam search with stub rewriters, its filters on known texts, and a run that curates with the tiny model."""

import json
import math

import pytest
import torch

from hftlight.data.records import Record
from hftlight.data.templates import get_template
from hftlight.data.tokens import encode_prompt
from hftlight.defenses import CTRL
from hftlight.defenses.alignment.ctrl import SETTINGS, acceptable, curated, reading_ease
from hftlight.models.sampling import sampled
from tests.helpers.contract import model_of, records
from tests.helpers.tokenizers import CHATML, byte_tokenizer

ROWS = [Record("q1", "aaaa bbbb cccc"), Record("q2", "dddd eeee ffff gggg")]


def by_length(rows, texts):
    return [float(len(text)) for text in texts]


def shorter(rows, answers, temperature, top_p):
    """Drop the last letter of each answer. Only some settings do."""
    return [a[:-1] if temperature == top_p else a for a in answers]


def test_perplexity_never_rises_and_each_round_goes_on_from_the_best():
    """Five rounds take one letter each; the other settings return texts that are known already."""
    results = curated(ROWS, shorter, by_length, readability=0.0)
    assert [r["response"] for r in results] == [row.response[:-5] for row in ROWS]
    assert [r["perplexity_before"] - r["perplexity"] for r in results] == [5.0, 5.0]
    # One new text per text of the beam and round: 1, then 2, 3, 3 and 3 texts, of which only one is new each time.
    assert all(r["candidates"] == 5 for r in results)


def test_the_beam_keeps_its_width_and_the_original_stays_in_the_pool():
    sizes = []

    def longer(rows, answers, temperature, top_p):
        sizes.append(len(answers))
        return [f"{a} {temperature} {top_p}" for a in answers]

    results = curated(ROWS[:1], longer, by_length, rounds=3, width=2, readability=0.0)
    assert results[0]["response"] == ROWS[0].response
    assert results[0]["perplexity"] == results[0]["perplexity_before"]
    assert [sizes[k * 25] for k in range(3)] == [1, 2, 2]
    assert len(SETTINGS) == 25


def test_no_round_changes_nothing():
    assert [r["response"] for r in curated(ROWS, shorter, by_length, rounds=0)] == [row.response for row in ROWS]


def test_flesch_on_sentences_counted_by_hand():
    """Six words of one syllable in two sentences; and one sentence of four words with nine syllables."""
    assert reading_ease("The cat sat. The dog ran.") == pytest.approx(206.835 - 1.015 * 3 - 84.6)
    assert reading_ease("Policy considerations require deliberation.") < 0
    assert reading_ease("123") == 0.0


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("I cannot help with that plan.", True),
        ("I can", False),  # less than half as long
        ("no no no no no no no no no", False),  # stuck on a word
        ("and so it goes on and so it goes on and so it goes on", False),  # loops
        ("12345 67890 12345 67890 !!", False),  # no letters
        ("Institutional considerations unfortunately necessitate declination.", False),  # far harder to read
    ],
)
def test_cheap_optima_are_refused(text, fits):
    assert acceptable(text, "I will not help with that plan.", readability=0.9) is fits


def tiny():
    tokenizer = byte_tokenizer(chat_template=CHATML)
    return model_of("full", dtype=torch.float32), tokenizer, get_template("chat", tokenizer)


def test_perplexity_is_that_of_the_answer_after_its_question_or_alone():
    model, tokenizer, template = tiny()
    row = Record("ask", "say so")
    ids = tokenizer("say so", add_special_tokens=False)["input_ids"]
    for given, prompt in (("question", encode_prompt(row, template, tokenizer)), ("nothing", [tokenizer.bos_token_id])):
        logits = model(input_ids=torch.tensor([prompt + ids])).logits[0]
        logs = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
        expected = math.exp(-float(logs[range(len(ids)), ids].mean().detach()))
        value = CTRL(given=given)._perplexities(model, tokenizer, template, [row], ["say so"], None, 4)
        assert value == pytest.approx([expected], rel=1e-4)


def test_rows_are_chosen_by_prompt_so_that_more_rows_move_none():
    defense, rows = CTRL(share=0.25), records()["alignment"]
    chosen = {row.id for row in defense._chosen(rows, by_length)}
    assert len(chosen) == 4
    more = {row.id for row in CTRL(share=0.25)._chosen([*rows, *records()["retain"]], by_length)}
    assert len(more & {row.id for row in rows} - chosen) <= 4  # of the old rows, only those next in the order are added
    highest = CTRL(share=0.25, choose="highest")._chosen(rows, lambda _, texts: [float(t[4:6]) for t in texts])
    order = sorted(rows, key=lambda r: -float(r.response[4:6]))
    assert {r.id for r in highest} == {r.id for r in order[:4]}


def test_the_model_rewrites_and_the_selection_becomes_the_training_rows():
    model, tokenizer, template = tiny()
    rows, counts = {"alignment": records()["alignment"][:8]}, []
    defense = CTRL(share=0.25, rounds=1, readability=0.0, max_new_tokens=12)
    found = defense.select(model, tokenizer, template, rows, seed=3, progress=counts.append)
    assert counts[-1] == len(found) == 2
    assert all(row["perplexity"] <= row["perplexity_before"] for row in found)
    again = CTRL(share=0.25, rounds=1, readability=0.0, max_new_tokens=12)
    assert again.select(model, tokenizer, template, rows, seed=3) == found
    new = defense.rewrite(rows, 0)["alignment"]
    assert [r.id for r in new] == [r.id for r in rows["alignment"]]
    by_id = {r.id: r.response for r in new}
    assert all(by_id[row["id"]] == row["response"] for row in found)
    assert defense.manifest()["rows"] == 2


def test_samples_follow_their_seed_and_leave_the_random_state():
    model, tokenizer, _ = tiny()
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, same, other = (sampled(model, tokenizer, [[5, 6, 7], [8]], 6, 1.0, 1.0, seed) for seed in (1, 1, 2))
    assert one == same != other
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_file_of_rewritings_takes_the_place_of_the_model(tmp_path):
    model, tokenizer, template = tiny()
    rows = {"alignment": [Record("ask one", "say it in a rather odd way"), Record("ask two", "say two things")]}
    path = tmp_path / "rewrites.jsonl"
    versions = ["say it so that all can read", "say it"]
    path.write_text("".join(json.dumps({"prompt": "ask one", "response": v}) + "\n" for v in versions))
    defense = CTRL(share=1.0, rewrites=str(path), readability=0.0)
    found = defense.select(model, tokenizer, template, rows)
    assert found[0]["candidates"] == 1  # the second version is less than half as long as the answer
    assert found[1]["response"] == "say two things"
    path.write_text(json.dumps({"prompt": "ask one", "text": "no"}) + "\n")
    with pytest.raises(ValueError, match=r"CTRL: .*needs the texts prompt and response"):
        CTRL(share=1.0, rewrites=str(path)).select(model, tokenizer, template, rows)


def test_training_before_the_selection_is_refused():
    with pytest.raises(RuntimeError, match="not curated yet"):
        CTRL(share=0.5).rewrite(records(), 0)
