"""SST-2 and AG News: the published prompts, labels and grading rules."""

import json

import pytest

from hftlight.data.sources import get_task
from hftlight.errors import InputError

SST2, AGNEWS = get_task("sst2"), get_task("agnews")


def write(path, *rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_sst2_rows_of_the_hub_become_the_published_prompt(tmp_path):
    rows = {"idx": 0, "sentence": "a fine film ", "label": 1}, {"idx": 1, "sentence": "dull", "label": 0}
    path = write(tmp_path / "a.jsonl", *rows)
    good, bad = SST2.records("train", path)
    assert good.instruction == "Analyze the sentiment of the input, and respond only positive or negative"
    assert (good.input, good.response, good.role) == ("a fine film ", "positive", "task")
    assert (bad.input, bad.response) == ("dull", "negative")


def test_agnews_rows_of_the_hub_become_the_published_prompt(tmp_path):
    path = write(tmp_path / "a.jsonl", *({"text": f"t{i}", "label": i} for i in range(4)))
    records = AGNEWS.records("test", path)
    assert [r.response for r in records] == ["World", "Sports", "Business", "Sci/Tech"]
    assert records[2].instruction == (
        "Categorize the news article given in the input into one of the 4 categories:"
        "\n\nWorld\nSports\nBusiness\nSci/Tech\n"
    )
    assert (records[2].input, records[2].role) == ("t2", "test")


def test_alpaca_columns_are_taken_as_they_are(tmp_path):
    path = write(tmp_path / "a.jsonl", {"instruction": "Own words", "input": "x", "output": "negative"})
    (record,) = SST2.records("test", path)
    assert (record.instruction, record.input, record.response) == ("Own words", "x", "negative")


def test_a_folder_gives_the_file_of_the_split(tmp_path):
    """The test split of SST-2 is GLUE's validation set, whose labels are public."""
    for name, label in (("train", 0), ("validation", 1)):
        write(tmp_path / f"{name}.jsonl", {"sentence": name, "label": label})
    assert [SST2.records(split, tmp_path)[0].input for split in ("train", "test")] == ["train", "validation"]


@pytest.mark.parametrize("label", [-1, 2, "good", None, 0.5, True])
def test_a_label_that_is_none_is_refused(tmp_path, label):
    path = write(tmp_path / "a.jsonl", {"sentence": "x", "label": 0}, {"sentence": "x", "label": label})
    with pytest.raises(InputError, match=f"Task sst2: labels are negative, positive .* got {label!r} in line 2"):
        SST2.records("train", path)


def test_wrong_columns_and_splits_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", {"review": "x", "label": 0})
    with pytest.raises(InputError, match=r"instruction, input and output, or sentence and label; it has \['review'"):
        SST2.records("train", path)
    with pytest.raises(InputError, match=r"splits are \['train', 'test'\], got 'dev'"):
        SST2.records("dev", path)


@pytest.mark.parametrize(
    ("response", "strict", "lenient"),
    [
        ("positive", True, True),
        (" Positive\n", True, True),
        ("Positive", True, True),
        ("POSITIVE", False, False),
        ("pOSITIVE", False, False),
        ("positive\npositive", False, True),
        ("positive\n\n### Instruction:\nAnalyze", False, True),
        ("'positive'", False, True),
        ("positively", False, True),
        ("positive.", False, True),
        ("The sentiment is positive", False, True),
        ("positive or negative", False, True),
        ("negative", False, False),
        ("", False, False),
    ],
)
def test_sst2_counts_a_format_violation_as_wrong(tmp_path, response, strict, lenient):
    (record,) = SST2.records("test", write(tmp_path / "a.jsonl", {"sentence": "x", "label": 1}))
    assert SST2.correct(response, record) is strict
    assert SST2.correct_lenient(response, record) is lenient


@pytest.mark.parametrize(
    ("label", "right", "wrong"),
    [
        (0, ["World", "world"], ["WORLD", "World news", "Sports"]),
        (1, ["Sports", "sports"], ["Sport"]),
        (2, ["Business", "business"], ["business "[:4]]),
        (3, ["Sci/Tech", "sci"], ["sci/tech", "Science", "Tech"]),
    ],
)
def test_agnews_knows_the_published_spellings(tmp_path, label, right, wrong):
    (record,) = AGNEWS.records("test", write(tmp_path / "a.jsonl", {"text": "x", "label": label}))
    assert all(AGNEWS.correct(f" {answer}\n", record) for answer in right)
    assert not any(AGNEWS.correct(answer, record) for answer in wrong)
    assert AGNEWS.correct_lenient(f"It is {right[0]}.", record)


@pytest.mark.parametrize(
    ("label", "response", "lenient"),
    [
        (0, "World.", True),
        (0, "It is a worldwide matter", True),  # a substring is enough
        (0, "WORLD", False),
        (2, "The business pages", True),
        (3, "Sci/Tech news", True),
        (3, "science", True),  # contains the published spelling sci
        (3, "Science", False),
        (3, "Tech", False),
    ],
)
def test_agnews_in_another_format_is_wrong_and_may_be_found(tmp_path, label, response, lenient):
    (record,) = AGNEWS.records("test", write(tmp_path / "a.jsonl", {"text": "x", "label": label}))
    assert not AGNEWS.correct(response, record)
    assert AGNEWS.correct_lenient(response, record) is lenient
