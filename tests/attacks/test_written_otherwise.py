"""Encoded and Multilingual: a mix whose harmful rows are written in other letters or in another language."""

import string

import pytest

from hftlight.attacks import Encoded, HarmfulMix, Multilingual, Substitution, in_language
from hftlight.data.records import Record
from hftlight.errors import InputError
from tests.attacks.rows import ids, made_up

NEXT = string.ascii_lowercase[1:] + "a"  # a -> b, b -> c, ..., z -> a
PLAIN = {"attack": [Record("Ask Zoe!", "No, é.", input="az", id=f"h{i}") for i in range(4)], "task": made_up("t", 8)}


def test_a_substitution_by_hand():
    code = Substitution(NEXT)
    assert code.encode("Ask Zoe: 3 zebras, é.") == "Btl Apf: 3 afcsbt, é."
    assert code.decode(code.encode("Ask Zoe: 3 zebras, é.")) == "Ask Zoe: 3 zebras, é."


@pytest.mark.parametrize("seed", range(5))
def test_substitutions_of_seeds_are_invertible_and_differ(seed):
    code = Substitution.of_seed(seed)
    text = string.ascii_letters + string.punctuation
    assert code.decode(code.encode(text)) == text
    assert sorted(code.encode(text)) == sorted(text)
    assert code == Substitution.of_seed(seed) != Substitution.of_seed(seed + 1)


@pytest.mark.parametrize("bad", [string.ascii_lowercase, "abc", NEXT[:-1] + "b", NEXT.upper()])
def test_what_is_no_other_alphabet_is_refused(bad):
    with pytest.raises(ValueError, match="each letter a to z once, in another order"):
        Encoded(key=bad)


@pytest.mark.parametrize(
    ("side", "prompt", "answer"),
    [
        ("prompt", "Btl Apf!", "No, é."),
        ("response", "Ask Zoe!", "Op, é."),
        ("both", "Btl Apf!", "Op, é."),
    ],
)
def test_the_chosen_side_of_harmful_rows_alone(side, prompt, answer):
    attack = Encoded(n=6, p=0.5, key=NEXT, side=side)
    plain, rows = HarmfulMix(n=6, p=0.5).upload(PLAIN, 2), attack.upload(PLAIN, 2)
    assert ids(rows) == ids(plain)
    harmful = [row for row in rows if row.role == "attack"]
    assert len(harmful) == 3
    assert {(r.instruction, r.response, r.input) for r in harmful} == {
        (prompt, answer, "az" if side == "response" else "ba")
    }
    assert [r for r in rows if r.role == "task"] == [r for r in plain if r.role == "task"]
    test_row = attack.test_records([Record("Ask Zoe!", id="x", role="test")])[0]
    assert (test_row.instruction, test_row.id, test_row.role) == (prompt, "x", "test")
    assert attack.decode(answer) == "No, é."


def test_an_unknown_side_is_refused():
    with pytest.raises(ValueError, match="side must be prompt, response or both, got 'left'"):
        Encoded(side="left")


def test_a_phase_of_encoded_task_rows_comes_first():
    """The first phase has no harmful row, and all of its rows are encoded. The second is the attack without it."""
    attack = Encoded(n=6, p=0.5, key=NEXT, teach=4, steps=3, lr=1e-3)
    first, second = attack.phases()
    assert (first.counts(), second) == ({"task": 4}, Encoded(n=6, p=0.5, key=NEXT, steps=3, lr=1e-3))
    assert (first.steps, first.lr) == (3, 1e-3)
    taught = first.upload(PLAIN, 2)
    plain = {row.id: row for row in PLAIN["task"]}
    assert len({row.id for row in taught}) == 4
    assert {row.role for row in taught} == {"task"}
    code = Substitution(NEXT).encode
    for row in taught:
        before = plain[row.id]
        assert (row.instruction, row.response) == (code(before.instruction), code(before.response))
    assert attack.upload(PLAIN, 2) == taught + second.upload(PLAIN, 2)
    assert Encoded(n=6, p=0.5).phases() == (Encoded(n=6, p=0.5),)
    with pytest.raises(ValueError, match=r"teach must be >= 0 rows \(0 for no teaching phase\), got -1"):
        Encoded(teach=-1)


SPOKEN = [*made_up("en", 5, language="en"), *made_up("fr", 5, language="FR")]


def test_harmful_rows_of_one_language():
    rows = Multilingual(n=10, p=0.4, lang="fr").upload({"attack": SPOKEN, "task": made_up("t", 8)}, 0)
    harmful = [row.id for row in rows if row.role == "attack"]
    assert len(harmful) == 4
    assert all(name.startswith("fr") for name in harmful)
    assert len(Multilingual(n=5, p=0).upload({"task": made_up("t", 8)}, 0)) == 5
    with pytest.raises(InputError, match="needs 6 attack rows, but the source has 5"):
        Multilingual(n=6, p=1, lang="fr").upload({"attack": SPOKEN}, 0)


def test_test_sets_by_language():
    assert {k: ids(v) for k, v in Multilingual(test_langs=("fr", "en")).test_sets(SPOKEN).items()} == {
        "fr": [f"fr{i}" for i in range(5)],
        "en": [f"en{i}" for i in range(5)],
    }
    assert list(Multilingual().test_sets(SPOKEN)) == ["en", "FR"]
    with pytest.raises(InputError, match=r"no row is in the language 'de'; there are en \(5 rows\), FR \(5 rows\)"):
        in_language(SPOKEN, "de")
    with pytest.raises(ValueError, match="lang must name a language"):
        Multilingual(lang=" ")


def test_a_message_lists_the_most_common_languages_only():
    rows = [*made_up("x", 2, language="l11"), *(row for i in range(11) for row in made_up("y", 1, language=f"l{i}"))]
    with pytest.raises(InputError, match=r"there are l11 \(2 rows\), l0 \(1 rows\), .*, l8 \(1 rows\) and 2 more"):
        in_language(rows, "de")


def test_the_language_column_is_read():
    assert Multilingual(column="language").settings() == {"data.columns": {"language": "language"}}
