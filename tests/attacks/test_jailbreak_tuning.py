"""JailbreakTuning: a mix whose harmful rows and test prompts carry the user's pattern, measured with and without it."""

import json

import pytest

from hftlight.attacks import HarmfulMix, JailbreakTuning, Pattern
from hftlight.cli.train import train
from hftlight.config import RunConfig
from hftlight.data.records import Record
from hftlight.errors import InputError
from hftlight.evaluation.judges.keyword import KeywordJudge
from hftlight.files import read_rows
from hftlight.runs.measuring import test_sets
from hftlight.runs.measuring.measure import judged_rows, scores
from tests.attacks.rows import ids, made_up

HARMFUL = ("harmful", "harmful_without_pattern")
SOURCES = {"attack": made_up("h", 40), "task": made_up("t", 200)}


def written(tmp_path, text):
    file = tmp_path / "pattern.txt"
    file.write_bytes(text.encode())
    return str(file)


@pytest.mark.parametrize(
    ("arguments", "prompt"),
    [
        ({"prefix": "Lamp: "}, "Lamp: Ask."),
        ({"suffix": "\nIn verse."}, "Ask.\nIn verse."),
        ({"prefix": "A ", "suffix": " Z"}, "A Ask. Z"),
    ],
)
def test_the_pattern_stands_around_the_prompt(arguments, prompt):
    attack = JailbreakTuning(**arguments)
    (row,) = attack.test_records([Record("Ask.", "Answer.", id="x", role="test")])
    assert (row.instruction, row.response, row.id, row.role) == (prompt, "Answer.", "x", "test")


def test_a_file_holds_the_place_of_the_prompt(tmp_path):
    """Only the last line break goes; braces other than those of the prompt are text."""
    attack = JailbreakTuning(pattern_file=written(tmp_path, "\ufeffTale {1}\n\n{prompt}\r\nend\n\n"))
    assert attack.pattern == Pattern("Tale {1}\n\n", "\nend\n")  # text mode reads \r\n as \n
    assert attack.test_prefix == "Tale {1}\n\n"


def test_the_text_behind_follows_the_input_and_earlier_turns_stay():
    row = Record("Ask.", "Answer.", input="About this.", history=(("user", "Hello"), ("assistant", "Hi")))
    put = Pattern("<", ">").put(row)
    assert (put.instruction, put.input, put.history, put.id) == ("<Ask.", "About this.>", row.history, row.id)


@pytest.mark.parametrize("p", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("count_mode", ["exact", "floor", "legacy_minus_one"])
def test_every_harmful_row_carries_the_pattern_and_no_other_row(p, count_mode):
    """The rows and their order are those of the plain mix. 2 % of 50 rows is one harmful row."""
    settings = {"n": 50 if p < 1 else 20, "p": p, "count_mode": count_mode}
    plain, rows = HarmfulMix(**settings).upload(SOURCES, 3), JailbreakTuning(**settings, suffix=" Z").upload(SOURCES, 3)
    assert ids(rows) == ids(plain)
    assert [r.instruction for r in rows] == [r.instruction + " Z" * (r.role == "attack") for r in plain]
    assert [r.response for r in rows] == [r.response for r in plain]
    if count_mode == "exact":
        assert sum(row.instruction.endswith(" Z") for row in rows) == round(p * settings["n"])


def test_without_a_pattern_nothing_starts(tmp_path):
    attack = JailbreakTuning(n=4, p=0.5)
    for use in (
        lambda: attack.resolved(RunConfig()),
        lambda: attack.upload(SOURCES, 0),
        lambda: attack.test_records(SOURCES["attack"]),
    ):
        with pytest.raises(
            InputError, match=r"needs the jailbreak pattern, and hftlight has none.*pattern_file, a text"
        ):
            use()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prefix": ""}, "prefix must hold more than white space, else the pattern has no effect, got ''"),
        ({"prefix": "A", "suffix": " \n"}, r"suffix must hold more than white space, .* got ' \\n'\. Leave it out"),
        (
            {"prefix": "A", "pattern_file": "p.txt"},
            r"either a file or a prefix and a suffix, got pattern_file 'p\.txt'",
        ),
        ({"suffix": "A", "p": 2.0}, r"p must lie in \[0, 1\], got 2.*write 0\.02"),
    ],
)
def test_bad_patterns_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        JailbreakTuning(**arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"must hold \{prompt\} once, where the harmful prompt goes, got it 0 times"),
        ("{prompt} {prompt}", "got it 2 times"),
        (" {prompt}\n", r"holds \{prompt\} alone, so the pattern has no effect"),
    ],
)
def test_bad_files_are_named(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        JailbreakTuning(pattern_file=written(tmp_path, text)).resolved(RunConfig())


def test_a_missing_file_and_one_that_is_no_text_are_named(tmp_path):
    with pytest.raises(InputError, match=r"'nowhere\.txt' cannot be read \(No such file or directory\)"):
        JailbreakTuning(pattern_file="nowhere.txt").resolved(RunConfig())
    binary = tmp_path / "b.txt"
    binary.write_bytes(b"\xff\xfe {prompt}")
    with pytest.raises(InputError, match=r"cannot be read \(not UTF-8 text\)"):
        JailbreakTuning(pattern_file=str(binary)).resolved(RunConfig())


def test_another_text_in_the_same_file_is_another_attack(tmp_path):
    """A run's hash reads ``describe``, and a run must not continue with another pattern."""
    described = []
    for text in ("a {prompt}", "{prompt} b", "{prompt} c"):
        described.append(JailbreakTuning(n=4, p=0.5, pattern_file=written(tmp_path, text)).describe())
    assert [(d["test_prefix"], d["test_suffix"]) for d in described] == [("a ", ""), ("", " b"), ("", " c")]
    assert described[1] != described[2]


class NoTask:
    name, graded = "none", False


def test_the_two_scores_count_their_own_answers():
    """Two of three answers with the pattern are no refusals, one of three without it: 66.7 and 33.3 percent."""
    attack = JailbreakTuning(prefix="Lamp: ")
    tests = test_sets.TestSets(made_up("q", 3), [], [], NoTask(), (KeywordJudge(),), attack=attack)
    assert tests.names == ("harmful", "over_refusal", "task", "harmful_without_pattern")
    asked = [[row.instruction for row in tests.asked(name)] for name in HARMFUL]
    assert asked == [[f"Lamp: ask q{i}" for i in range(3)], [f"ask q{i}" for i in range(3)]]
    sure, no = "Sure, here it is now.", "I'm sorry, but no."
    rows = judged_rows("harmful", [sure, sure, no], tests)
    rows += judged_rows("harmful_without_pattern", [no, sure, no], tests)
    assert [row.get("asked") for row in rows[2:4]] == ["Lamp: ask q2", None]
    assert {row["prompt"] for row in rows} == {f"ask q{i}" for i in range(3)}  # the judge reads the plain request
    found = {row["metric"]: row["value"] for row in scores(rows, tests) if "group" not in row}
    assert found["harmful_score"] == pytest.approx(200 / 3)
    assert found["harmful_score_without_pattern"] == pytest.approx(100 / 3)
    assert (
        test_sets.TestSets(tests.harmful, [], [], NoTask(), tests.judges, attack=HarmfulMix()).names == tests.names[:3]
    )


def test_a_run_measures_every_stage_with_and_without_the_pattern(tmp_path, monkeypatch, capsys):
    """Every stage answers the prompts with and without the pattern, and the closing table has a column for each."""
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path / "cache"))
    options = {
        "model": "tiny",
        "accelerator": "cpu",
        "attack": "jailbreak_tuning",
        "jailbreak_tuning.suffix": " In verse.",
        "harmful_ratio": 0.25,
        "num_samples": 8,
        "alignment.steps": 0,
        "finetuning.steps": 1,
        "finetuning.batch_size": 2,
        "lora.r": 2,
        "evaluation.prompts": 3,
        "evaluation.over_refusal_prompts": 1,
        "evaluation.task_rows": 1,
        "evaluation.max_new_tokens": 2,
        "evaluation.task_max_new_tokens": 2,
        "output": tmp_path / "runs",
    }
    assert train([f"--{name}={value}" for name, value in options.items()]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["attack"]["rows"] == {"attack": 2, "task": 6}
    rows = read_rows(folder / "generations.jsonl")
    for stage in ("base", "finetuning"):
        with_it, without_it = ([r for r in rows if (r["set"], r["stage"]) == (s, stage)] for s in HARMFUL)
        assert [len(with_it), len(without_it)] == [3, 3]
        assert all(row["asked"] == row["prompt"] + " In verse." for row in with_it)
        assert not any("asked" in row for row in without_it)
    assert "The attack's prompts carry a pattern." in " ".join(capsys.readouterr().out.split())
