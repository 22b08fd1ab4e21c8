"""Rows taken from a source: ranges, conditions and columns as users write them, and refused values."""

import pytest

from hftlight.config import Data, RunConfig
from hftlight.errors import InputError
from hftlight.take import SOURCES, Take, meets, truth


@pytest.mark.parametrize(
    ("text", "start", "stop"), [("5001:10000", 5001, 10000), (":7", None, 7), ("2:", 2, None), (None, None, None)]
)
def test_a_range_is_a_python_slice(text, start, stop):
    assert Take(rows=text).range == slice(start, stop)


@pytest.mark.parametrize("text", ["5", "3:2", "4:4", ":0", "-3:", "1:2:3", "a:b", ""])
def test_a_range_that_takes_nothing_is_refused(text):
    with pytest.raises(InputError, match=r"rows must be START:STOP .*got '"):
        Take(rows=text)


@pytest.mark.parametrize(
    ("where", "conditions"),
    [
        ("is_safe=true", (("is_safe", "true"),)),
        ("is_safe=true, lang=en", (("is_safe", "true"), ("lang", "en"))),
        ("kind=drug_abuse,weapons", (("kind", "drug_abuse,weapons"),)),  # a value may contain commas
        (["kind=a,b=c", "lang=en"], (("kind", "a,b=c"), ("lang", "en"))),
        ((), ()),
    ],
)
def test_conditions_are_column_and_value(where, conditions):
    assert Take(where=where).conditions == conditions


@pytest.mark.parametrize("where", ["is_safe", "=true", ["a=b", "c"]])
def test_a_condition_without_column_or_value_is_refused(where):
    with pytest.raises(InputError, match=r"where must be column=value"):
        Take(where=where)


@pytest.mark.parametrize("value", [True, "true", "TRUE", "True", 1, "1"])
def test_yes_and_no_compare_in_any_case(value):
    assert truth(value) is True
    assert all(meets(value, wanted) for wanted in ("true", "True", "1"))
    assert not meets(value, "false")
    assert not meets(value, "safe")


def test_other_values_compare_as_text():
    assert meets("Safe", "Safe")
    assert not meets("Safe", "safe")
    assert meets(12, "12")
    assert not meets(None, "false")
    assert truth(None) is truth("yes") is truth(2) is None


def test_unknown_fields_and_counts_are_refused():
    with pytest.raises(InputError, match=r"must name fields among \['instruction'.*got \['prompt'\]"):
        Take(columns={"prompt": "q"})
    with pytest.raises(InputError, match=r"first must be >= 0 rows .* got -1"):
        Take(first=-1)


def test_a_configuration_says_what_is_taken_of_each_source():
    data = Data(
        split={"alignment": "30k_train"},
        rows={"alignment": "5:9"},
        where={"attack": ["is_safe=false", "lang=en"]},
        first={"attack": 3},
        columns={"instruction": "q", "alignment": {"response": "refusal"}},
    )
    usual = {"instruction": "q"}
    assert data.take("alignment") == Take("30k_train", "5:9", columns={"response": "refusal"}, usual=usual)
    assert data.take("attack") == Take(where=["is_safe=false", "lang=en"], first=3, usual=usual)
    assert data.take("test") == Take(usual=usual)
    RunConfig(data=data).check()


@pytest.mark.parametrize("option", ["split", "rows", "where", "first"])
def test_a_name_that_is_no_source_is_refused_with_the_nearest(option):
    with pytest.raises(InputError, match=rf"--data\.{option} takes a value per source .*Did you mean 'alignment'\?"):
        RunConfig(data=Data(**{option: {"alignement": "1:2"}})).check()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"columns": {"over_refusl": {"kind": "type"}}},
            r"--data\.columns takes a value per source .*Did you mean 'over_refusal'",
        ),
        (
            {"columns": {"alignment": "refusal"}},
            r"--data\.columns takes a value per source .*such as {alignment: {response",
        ),
        ({"columns": {"answer": "refusal"}}, r"--data\.columns must name fields among .*got \['answer'\]"),
        ({"rows": {"attack": "9"}}, r"--data\.rows must be START:STOP .*got '9'\. The source is attack"),
        ({"where": {"test": "safe"}}, r"--data\.where must be column=value.*got 'safe'\. The source is test"),
        ({"first": {"pairs": -2}}, r"--data\.first must be >= 0 .*got -2\. The source is pairs"),
    ],
)
def test_what_cannot_be_taken_names_the_option(data, message):
    with pytest.raises(InputError, match=message):
        RunConfig(data=Data(**data)).check()


def test_every_source_of_a_run_can_be_chosen_from():
    """Every source is an option of ``Data``. The other options choose the task, rows and columns."""
    assert {*SOURCES, "task", "split", "rows", "where", "first", "columns"} == set(Data.__dataclass_fields__)
