"""The model card: base, data, defenses, scores and gaps of one artifact, with its Markdown escaped."""

import json

import pytest
import yaml

from hftlight.report import read_result
from hftlight.report.card import model_card, write_cards
from hftlight.report.escape import in_latex, in_markdown
from tests.helpers.run_folder import harmful, score, write_run

MANIFEST = {
    "hftlight_version": "0.2.0",
    "model": {"name": "org/model", "hash": "abc123"},
    "seed": 7,
    "template": "chat",
    "attack": {"attack": "harmful_mix"},
    "data": {
        "rows": {"alignment": 20, "task": 10},
        "hashes": {"alignment": "aa", "task": "bb", "test": "cc"},
        "taken": {
            "alignment": {"source": "my|rows_*.jsonl"},
            "task_train": {"source": "chats.jsonl"},
            "test": {"source": "builtin"},
        },
        "trained_on": {"rows": 10, "attack_rows": 1},
    },
    "arms": {
        "none": {"defenses": [], "stages": {}},
        "booster": {
            "defenses": [{"name": "booster", "arguments": {"lam": 5.0, "alpha": 0.1}}],
            "stages": {"finetuning": {"key": "k1"}},
        },
    },
}


@pytest.fixture
def result(tmp_path):
    rows = [
        harmful("booster", "finetuning", 20),
        score("booster", "finetuning", "finetune_accuracy", 90, 100),
        harmful("none", "finetuning", 60),
    ]
    folder = write_run(tmp_path, rows, [], arms=("none", "booster"))
    (folder / "manifest.json").write_text(json.dumps(MANIFEST))
    (folder / "booster" / "finetuned").mkdir(parents=True)
    (folder / "booster" / "finetuned" / "adapter_config.json").write_text("{}")
    return read_result(folder)


def test_a_card_states_what_the_model_is_made_from_and_how_it_scores(result):
    card = model_card(result, "booster", "finetuning")
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "org/model",
        "library_name": "peft",
        "tags": ["hftlight", "harmful-fine-tuning"],
    }
    for part in (
        "SHA-256 of its files `abc123`",
        "Data `alignment`: 20 rows from my\\|rows\\_\\*.jsonl, hash `aa`",
        "Data `task`: 10 rows from chats.jsonl, hash `bb`",
        "attack `harmful_mix`, 1 of 10 rows are the attacker's",
        "attacks other than harmful_mix",
        "Seed 7, template `chat`, key `k1`",
        "- booster: `lam=5.0, alpha=0.1`",
        "| harmful_score | builtin | 20.0 | 13.8 to 28.0 | 120 |",
        "Refusals of ordinary requests",
        "Other seeds than 7",
        "no score holds for a real service",
    ):
        assert part in body
    assert "Accuracy on the user's task" not in body


def test_the_undefended_and_the_aligned_model_say_so(result):
    assert "None: this is the undefended model." in model_card(result, "none", "finetuning")
    aligned = model_card(result, "booster", "alignment")
    assert "Upload" not in aligned
    assert "Nothing has been measured yet." in aligned


def test_a_card_lies_in_every_artifact_that_exists(result):
    write_cards(result, {"alignment": "aligned", "finetuning": "finetuned"})
    assert [str(p.relative_to(result.folder)) for p in result.folder.rglob("README.md")] == [
        "booster/finetuned/README.md"
    ]


def test_markdown_and_latex_of_others_are_text():
    assert in_markdown("a|b `c` <img src=x> [d](e)\n# f $x$ ~g~ _h_ i_j") == (
        "a\\|b \\`c\\` \\<img src=x\\> \\[d\\](e) \\# f \\$x\\$ \\~g\\~ \\_h\\_ i_j"
    )
    assert in_latex("a_b & 5 % {x} \\y ~ ^\n#") == (
        "a\\_b \\& 5 \\% \\{x\\} \\textbackslash{}y \\textasciitilde{} \\textasciicircum{} \\#"
    )
