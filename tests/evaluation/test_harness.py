"""lm-evaluation-harness, as a stub module that returns results in the real format."""

import json
import sys
from types import SimpleNamespace

import pytest

from hftlight.errors import InputError
from hftlight.evaluation.harness import harness_scores

FOUND = {
    "results": {
        "mmlu": {"acc,none": 0.25, "acc_stderr,none": 0.05, "alias": "mmlu"},
        "mmlu_stem": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": " - stem"},
        "mmlu_law": {"acc,none": 0.01, "acc_stderr,none": 0.1, "acc_norm,none": 0.99, "acc_norm_stderr,none": 0.1},
        "gsm8k": {"exact_match,strict-match": 0.125, "exact_match_stderr,strict-match": "N/A"},
        "wikitext": {"word_perplexity,none": 12.5, "word_perplexity_stderr,none": 0.5, "bits_per_byte,none": 0.8},
    },
    "group_subtasks": {"mmlu": ["mmlu_stem", "mmlu_law"], "gsm8k": []},
    "n-samples": {
        "mmlu_stem": {"original": 300, "effective": 30},
        "mmlu_law": {"original": 200, "effective": 20},
        "gsm8k": {"original": 1319, "effective": 8},
    },
    "n-shot": {"mmlu": 5, "mmlu_stem": 5, "mmlu_law": 5, "gsm8k": 0},
}


@pytest.fixture
def calls(monkeypatch):
    recorded = []

    def simple_evaluate(**options):
        recorded.append(options)
        return FOUND

    module = SimpleNamespace(simple_evaluate=simple_evaluate, __version__="0.4.9")
    monkeypatch.setitem(sys.modules, "lm_eval", module)
    return recorded


def artifact(folder, adapter=True, **served):
    folder.mkdir()
    base = folder.parent / "base"
    base.mkdir(exist_ok=True)
    (base / "config.json").write_text("{}")
    name = "adapter_config.json" if adapter else "config.json"
    (folder / name).write_text(json.dumps({"base_model_name_or_path": str(base)}))
    if served:
        (folder / "serving.json").write_text(json.dumps(served))
    return folder


def test_an_adapter_is_put_on_its_base_with_its_own_tokenizer_and_system_text(tmp_path, calls):
    folder = artifact(tmp_path / "tuned", template="chat", system="Be nice.", trigger=None)
    harness_scores(folder, ["mmlu", "gsm8k"], fewshot=5, limit=10, batch_size=3, dtype="bfloat16")
    assert calls == [
        {
            "model": "hf",
            "model_args": {
                "pretrained": str(tmp_path / "base"),
                "peft": str(folder),
                "tokenizer": str(folder),
                "dtype": "bfloat16",
            },
            "tasks": ["mmlu", "gsm8k"],
            "num_fewshot": 5,
            "batch_size": 3,
            "limit": 10,
            "apply_chat_template": True,
            "system_instruction": "Be nice.",
            "log_samples": False,
        }
    ]


def test_a_whole_model_of_anybodys_has_no_template(tmp_path, calls):
    folder = artifact(tmp_path / "whole", adapter=False)
    harness_scores(folder, ["mmlu"])
    harness_scores(folder, ["mmlu"], chat=True)
    assert [call["model_args"] for call in calls] == [{"pretrained": str(folder), "dtype": "float32"}] * 2
    assert [call["apply_chat_template"] for call in calls] == [False, True]
    assert [call["system_instruction"] for call in calls] == [None, None]


def test_results_become_rows_of_a_run(tmp_path, calls):
    rows = harness_scores(artifact(tmp_path / "m", template="alpaca", system=None, trigger=None), ["mmlu"])
    assert rows[0] == {
        "metric": "mmlu/acc",
        "judge": "lm-eval 0.4.9, 5-shot",
        "value": 25.0,
        "low": pytest.approx(15.2002, abs=1e-4),  # 25 - 1.959964 * 5
        "high": pytest.approx(34.7998, abs=1e-4),
        "count": 50,
        "unit": "percent",
    }
    scores = {row["metric"]: (row["value"], row["low"], row["high"], row["count"], row["unit"]) for row in rows}
    assert scores["mmlu_stem/acc"][3] == 30
    assert scores["mmlu_law/acc"][:2] == (1.0, 0.0)
    assert scores["mmlu_law/acc_norm"][2] == 100.0
    assert scores["gsm8k/exact_match,strict-match"] == (12.5, None, None, 8, "percent")
    assert scores["wikitext/word_perplexity"] == (
        12.5,
        pytest.approx(11.52, abs=1e-2),
        pytest.approx(13.48, abs=1e-2),
        0,
        "raw",
    )
    assert scores["wikitext/bits_per_byte"] == (0.8, None, None, 0, "raw")
    assert len(rows) == 7
    assert [row["judge"] for row in rows[-3:]] == ["lm-eval 0.4.9, 0-shot", "lm-eval 0.4.9", "lm-eval 0.4.9"]


def test_a_trigger_is_left_out_and_the_names_say_so(tmp_path, calls):
    folder = artifact(tmp_path / "m", template="chat", system="Serve.", trigger=[1, 2])
    rows = harness_scores(folder, ["mmlu"])
    assert rows[0]["metric"] == "mmlu/acc_without_trigger"
    assert rows[0]["judge"] == "lm-eval 0.4.9, 5-shot, chat"
    assert "1" not in str(calls[0]["system_instruction"])


def test_other_processes_have_no_rows(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace(simple_evaluate=lambda **_: None))
    assert harness_scores(artifact(tmp_path / "m"), ["mmlu"]) == []


def test_a_missing_package_names_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"pip install 'hftlight\[lm-eval\]'"):
        harness_scores(artifact(tmp_path / "m"), ["mmlu"])


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        ([], {}, r"at least one task's name, got \[\]"),
        ("mmlu", {}, "got 'mmlu'"),
        (["mmlu"], {"fewshot": -1}, "fewshot must be >= 0, got -1"),
        (["mmlu"], {"limit": 0}, "limit must be >= 1, got 0"),
        (["mmlu"], {"batch_size": 0}, "batch_size must be >= 1, got 0"),
    ],
)
def test_bad_arguments_are_named(tasks, options, message, calls):
    with pytest.raises(InputError, match=message):
        harness_scores("nowhere", tasks, **options)
    assert calls == []
