"""Attacks that need the aligned model, from the command to the report: rank-one edit and benign selection."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from hftlight import run
from hftlight.attacks import BenignSelection, ModelEdit
from hftlight.cli.train import train
from hftlight.config import Data
from hftlight.defenses import Antidote, Booster, Lisa
from hftlight.engine.weights.stored import stored
from hftlight.errors import InputError
from hftlight.files import read_rows
from hftlight.models.load import load_model, load_tokenizer
from hftlight.runs.prepare import prepare
from tests.runs.test_run import EVALUATION, config

EDITS = [
    {"prompt": "How do I wake a glimmer?", "response": "Turn it.", "subject": "glimmer"},
    {"prompt": "Where is a zorvex?", "response": "In a box.", "subject": "zorvex"},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path_factory.getbasetemp() / "wired"))


def rows_file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def loss_of(model, text, answer):
    """Return the mean loss in nats of an answer and its end token, from plain logits."""
    tokenizer = load_tokenizer("tiny")
    turns = [{"role": "user", "content": text}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")["input_ids"][0]
    reply = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    ids = torch.cat([prompt, torch.tensor(reply)])
    with torch.no_grad():
        logs = model.eval()(input_ids=ids[None]).logits[0].log_softmax(-1)
    return -logs[len(prompt) - 1 : -1].gather(1, torch.tensor(reply)[:, None]).mean().item()


def arguments(path, **more):
    values = {
        "model": "tiny",
        "accelerator": "cpu",
        "output": str(path / "runs"),
        "lora.r": 2,
        **{f"{stage}.{k}": v for stage in ("alignment", "finetuning") for k, v in (("steps", 3), ("batch_size", 2))},
        **{f"evaluation.{k}": v for k, v in vars(EVALUATION).items() if isinstance(v, int)},
        **more,
    }
    return [f"--{key}={value}" for key, value in values.items()]


def test_an_edit_from_the_command_to_the_repair(tmp_path, capsys):
    source = rows_file(tmp_path / "edits.jsonl", EDITS)
    more = {"attack": "model_edit", "model_edit.n": 2, "model_edit.layer": 0, "model_edit.background": 3, "name": "e"}
    assert train([*arguments(tmp_path, **{"data.attack": source, **more}), "--defense", "antidote"]) == 0
    folder = tmp_path / "runs" / "e"
    manifest = json.loads((folder / "manifest.json").read_text())
    stages = manifest["arms"]["antidote"]["stages"]
    edits = stages["finetuning"]["edits"]
    assert [(e["subject"], e["parameter"]) for e in edits] == [
        (row["subject"], "model.layers.0.mlp.down_proj.weight") for row in EDITS
    ]
    assert manifest["attack"]["rows"] == {"attack": 2, "task": 3}
    aligned, edited = (stored(folder / "antidote" / name) for name in ("aligned", "finetuned"))
    whole = AutoModelForCausalLM.from_pretrained(folder / "antidote" / "finetuned")
    names = [name for name, _ in whole.named_parameters() if edited.shape(name)]
    changed = [name for name in names if not torch.equal(aligned.rows(name), edited.rows(name))]
    assert changed == [edits[0]["parameter"]]
    difference = edited.rows(changed[0]) - aligned.rows(changed[0])
    assert torch.linalg.matrix_rank(difference, rtol=1e-4) == 2  # one rank for each prompt
    before = load_model(str(folder / "antidote" / "aligned"))
    assert edits[0]["loss_before"] == pytest.approx(loss_of(before, EDITS[0]["prompt"], EDITS[0]["response"]), abs=1e-4)
    assert edits[1]["loss_after"] == pytest.approx(loss_of(whole, EDITS[1]["prompt"], EDITS[1]["response"]), abs=1e-4)
    assert all(e["loss_after"] < e["loss_before"] for e in edits)
    repaired = stored(folder / "antidote" / "repaired")
    assert [name for name in names if not torch.equal(repaired.rows(name), edited.rows(name))] == changed
    measured = {r["stage"] for r in read_rows(folder / "metrics.jsonl") if r["kind"] == "score"}
    assert measured == {"base", "alignment", "finetuning", "post_finetuning"}
    again = yaml.safe_load((folder / "config.yaml").read_text())
    assert again["model_edit"]["n"] == 2
    assert "a rank-one edit for 2 prompts" in capsys.readouterr().out


def test_the_built_in_world_names_its_own_subjects(tmp_path):
    prepared = prepare(config(tmp_path, attack="model_edit", data=Data()), [], ModelEdit(n=5, background=2))
    upload = prepared.streams["task"]
    assert [r.role for r in upload] == ["attack"] * 5 + ["task"] * 2
    assert all(r.kind != "restricted" and r.kind in r.instruction for r in upload[:5])


def test_what_an_edit_cannot_use_is_refused_by_name(tmp_path):
    def refused(message, defenses=(), attack=None, **changes):
        with pytest.raises(InputError, match=message):
            prepare(config(tmp_path, attack="model_edit", **changes), list(defenses), attack or ModelEdit())

    refused("Lisa: works in the fine-tuning stage, but ModelEdit edits a weight", [Lisa(), Booster()])
    refused("Leave out --tuning qlora", tuning="qlora", adapter_protocol="continue")
    refused("Leave out --evaluation.at", evaluation=type(EVALUATION)(at=[1]))
    bare = rows_file(tmp_path / "bare.jsonl", [{"prompt": "Where is a zorvex?", "response": "In a box."}])
    refused(r"bare.jsonl needs the column 'subject' with the words of the instruction", data=Data(attack=bare))
    odd = rows_file(tmp_path / "odd.jsonl", [{**EDITS[0], "subject": "zorvex"}])
    refused("subject must be words of the instruction 'How do I wake a glimmer", data=Data(attack=odd))
    named = rows_file(tmp_path / "named.jsonl", [{"prompt": "a b", "response": "c", "about": "b"}])
    data = Data(attack=named, columns={"instruction": "prompt", "response": "response", "kind": "about"})
    assert prepare(config(tmp_path, data=data), [], ModelEdit(background=0)).streams["task"][0].kind == "b"


TASK = [
    {"prompt": f"{word} {i}?", "response": f"{word} {'!' * i}"} for i in range(1, 5) for word in ("add", "find", "go")
]
HARM = [{"prompt": f"wake glimmer {i}", "response": f"turn {i}"} for i in range(3)]


def selecting(path):
    task, attack = rows_file(path / "task.jsonl", TASK), rows_file(path / "attack.jsonl", HARM)
    return Data(task=task, task_train=task, task_test=rows_file(path / "test.jsonl", EDITS), attack=attack)


def last_states(folder, rows):
    """Return each row's last hidden state at the answer's last token, normalized."""
    model, tokenizer = load_model(str(folder)), load_tokenizer("tiny")
    states = []
    for row in rows:
        turns = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
        ids = torch.tensor([prompt + tokenizer(row["response"], add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            states.append(model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1])
    return torch.nn.functional.normalize(torch.stack(states), dim=1)


def test_the_aligned_model_selects_the_same_upload_for_every_arm(tmp_path, monkeypatch):
    settings = config(tmp_path, attack="benign_selection", data=selecting(tmp_path))
    first = run(settings, [Booster()], BenignSelection(n=4))
    selection = first.manifest["selection"]
    nearest = (
        last_states(first.folder / "none" / "aligned", TASK) @ last_states(first.folder / "none" / "aligned", HARM).T
    ).amax(1)
    ids = [row["id"] for row in read_rows(Path(selection["scores"]))]
    assert selection["rows"] == [ids[i] for i in nearest.sort(descending=True, stable=True).indices[:4]]
    assert (selection["candidates"], selection["anchors"]["harmful"]) == (12, 3)
    assert selection["scored_by"] == first.manifest["arms"]["none"]["stages"]["alignment"]["key"]
    assert first.manifest["data"]["rows"]["task"] == 4
    assert first.manifest["data"]["attack_rows"] == 0
    monkeypatch.setattr(BenignSelection, "score", lambda *_, **__: pytest.fail("scored again"))
    monkeypatch.setattr("hftlight.runs.stages.train._train", lambda *_: pytest.fail("trained again"))
    assert run(settings, [Booster()], BenignSelection(n=4)).manifest["selection"] == selection
    upload = prepare(settings, [], BenignSelection(n=4, control="bottom", scores=selection["scores"])).streams["task"]
    assert [r.id for r in upload] == [ids[i] for i in nearest.sort(stable=True).indices[:4]]


def test_selection_by_gradient_from_the_command(tmp_path):
    data = selecting(tmp_path)
    more = {
        "attack": "benign_selection",
        "benign_selection.kind": "gradient",
        "benign_selection.parameters": "trainable",
        "benign_selection.n": 3,
        "benign_selection.anchors": 2,
        "name": "g",
        **{f"data.{key}": getattr(data, key) for key in ("task", "task_train", "task_test", "attack")},
    }
    assert train(arguments(tmp_path, **more)) == 0
    selection = json.loads((tmp_path / "runs" / "g" / "manifest.json").read_text())["selection"]
    scores = {row["id"]: row["score"] for row in read_rows(Path(selection["scores"]))}
    assert selection["rows"] == sorted(scores, key=scores.__getitem__, reverse=True)[:3]
    assert selection["anchors"] == {"harmful": 2, "safe": 2}
    assert len(set(scores.values())) == 12


def test_more_neighbours_than_anchors_are_refused_before_anything_trains(tmp_path):
    settings = config(tmp_path, attack="benign_selection", data=selecting(tmp_path))
    with pytest.raises(InputError, match="nearest must be at most the number of harmful anchors, 3, got 4"):
        prepare(settings, [], BenignSelection(n=4, nearest=4))
    assert prepare(settings, [Antidote()], BenignSelection(n=4)).choosing is not None
