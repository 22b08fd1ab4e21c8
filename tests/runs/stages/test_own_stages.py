"""Settings of single stages: no alignment, adapter geometry, template, protocol of an arm, long rows."""

import json
from dataclasses import replace

import pytest
import torch

from hftlight import run
from hftlight.comparison.grid import Cell, Grid, cell_config
from hftlight.config import Data, Evaluation, RunConfig, StageLora
from hftlight.data.templates import get_template
from hftlight.data.tokens import encode_all
from hftlight.defenses import Antidote, Booster, Freeze, SafeLoRA
from hftlight.errors import InputError
from hftlight.files import read_rows, write_rows
from hftlight.model_files import model_path
from hftlight.models.load import load_model, load_tokenizer
from hftlight.runs.prepare import prepare
from tests.helpers.families import write_family
from tests.runs.test_run import TRAINING
from tests.runs.test_run import config as of_a_run

FEW = Evaluation(prompts=4, over_refusal_prompts=2, task_rows=4, max_new_tokens=4, task_max_new_tokens=4, loss_rows=2)


def config(tmp_path, **changes):
    return of_a_run(tmp_path, **{"baseline": False, "evaluation": FEW, **changes})


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path / "cache"))


def adapter(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def weights(folder):
    return load_model(str(folder)).state_dict()


# A model that comes aligned.


def test_without_steps_of_alignment_the_upload_trains_the_model_itself(tmp_path):
    """A run that starts from another run's aligned model fine-tunes from the same weights."""
    whole = replace(TRAINING, steps=0)
    first = run(config(tmp_path, tuning="full", harmful_ratio=0.0)).folder
    aligned = first / "none" / "aligned"
    folder = run(config(tmp_path, tuning="full", harmful_ratio=0.0, model=str(aligned), alignment=whole)).folder
    one, two = weights(first / "none" / "finetuned"), weights(folder / "none" / "finetuned")
    assert all(torch.equal(one[name], two[name]) for name in one)
    stages = {(r["stage"]) for r in read_rows(folder / "metrics.jsonl")}
    assert stages == {"base", "finetuning"}
    assert not (folder / "none" / "aligned").exists()


def test_a_repair_of_a_model_that_came_aligned_equals_that_of_the_run_that_aligned_it(tmp_path):
    first = run(config(tmp_path, tuning="full"), [SafeLoRA(threshold=1.0)]).folder
    options = {"tuning": "full", "alignment": replace(TRAINING, steps=0), "base": model_path("tiny")}
    second = run(
        config(tmp_path, model=str(first / "safe_lora" / "aligned"), **options), [SafeLoRA(threshold=1.0)]
    ).folder
    one, two = (weights(folder / "safe_lora" / "repaired") for folder in (first, second))
    assert all(torch.equal(one[name], two[name]) for name in one)
    tuned = weights(first / "safe_lora" / "finetuned")
    assert any(not torch.equal(one[name], tuned[name]) for name in one)


def test_an_adapter_on_a_model_that_came_aligned_is_repaired_alone(tmp_path):
    none = replace(TRAINING, steps=0)
    folder = run(config(tmp_path, alignment=none), [Antidote(0.5, mode="factor")]).folder
    arm = folder / "antidote"
    assert adapter(arm / "repaired")["r"] == adapter(arm / "finetuned")["r"] == 2
    tuned, repaired = weights(arm / "finetuned"), weights(arm / "repaired")
    assert any(not torch.equal(tuned[name], repaired[name]) for name in tuned)


@pytest.mark.parametrize(
    ("defense", "changes", "message"),
    [
        (Booster(), {}, "Booster: works in the alignment stage, but --alignment.steps 0 skips that stage"),
        (SafeLoRA(), {}, "SafeLoRA: needs the model before its alignment, .* Name the unaligned model with --base"),
        (None, {"alignment": TRAINING, "base": "tiny"}, "--base is the unaligned model .* Add --alignment.steps 0"),
        (None, {"finetuning": replace(TRAINING, steps=0)}, "--finetuning.steps must be >= 1, got 0"),
    ],
)
def test_what_needs_an_alignment_is_refused_without_one(tmp_path, defense, changes, message):
    options = {"alignment": replace(TRAINING, steps=0), **changes}
    with pytest.raises(InputError, match=message):
        prepare(config(tmp_path, **options), [defense] if defense else [])


def test_the_unaligned_start_is_an_arm_of_a_comparison():
    grid = Grid(("none", "unaligned", "booster"))
    cells = {cell.arm: cell for cell in grid.cells()}
    assert cells["unaligned"].name == "unaligned-builtin-p0.1-s0"
    assert cells["unaligned"] == Cell((), 0.1, "builtin", 0, unaligned=True)
    assert [cell_config(RunConfig(), cells[arm]).alignment.steps for arm in ("none", "unaligned")] == [80, 0]
    assert grid.aligned(cells["none"]) != grid.aligned(cells["unaligned"])
    with pytest.raises(InputError, match="unaligned"):
        Grid(("unaligned+booster",))


def test_a_run_offers_the_alignment_rows_that_refuse(tmp_path):
    """Freeze computes its safety scores on refusals alone."""
    settings = config(tmp_path)
    streams = prepare(settings, [Freeze(samples=4)]).streams
    assert {row.kind for row in streams["refusals"]} == {"restricted"}
    assert {row.kind for row in streams["alignment"]} > {"restricted"}
    entry = manifest(run(settings, [Freeze(0.5, 0.25, samples=4)]).folder)["arms"]["freeze"]["stages"]["finetuning"]
    assert entry["dropped_rows"].keys() == {"task", "refusals"}


# Geometry, template and protocol.


def test_stages_have_adapters_of_their_own(tmp_path):
    alignment = replace(TRAINING, lora=StageLora(r=4, targets=["q_proj"]))
    finetuning = replace(TRAINING, lora=StageLora(dropout=0.1, alpha=1.0))
    folder = run(config(tmp_path, alignment=alignment, finetuning=finetuning)).folder / "none"
    aligned, tuned = adapter(folder / "aligned"), adapter(folder / "finetuned")
    assert (aligned["r"], aligned["lora_alpha"], aligned["target_modules"]) == (4, 4, ["q_proj"])
    assert tuned["r"] == 4 + 2
    with pytest.raises(
        InputError, match=r"continue trains the aligned adapter further, .* got Lora\(r=2, alpha=1.0.* and Lora\(r=4"
    ):
        prepare(config(tmp_path, alignment=alignment, finetuning=finetuning, adapter_protocol="continue"), [])


def test_stages_have_templates_of_their_own(tmp_path):
    """Each model is served in the template of its stage."""
    alignment, finetuning = replace(TRAINING, template="alpaca"), replace(TRAINING, template="plain")
    folder = run(config(tmp_path, alignment=alignment, finetuning=finetuning)).folder / "none"
    served = [json.loads((folder / name / "serving.json").read_text())["template"] for name in ("aligned", "finetuned")]
    assert served == ["alpaca", "plain"]


def test_an_arm_has_a_protocol_of_its_own(tmp_path):
    settings = config(tmp_path, adapter_protocols={"booster": "continue"}, baseline=True)
    folder = run(settings, [Booster()]).folder
    assert [adapter(folder / arm / "finetuned")["r"] for arm in ("none", "booster")] == [4, 2]
    arms = manifest(folder)["arms"]
    assert [arms[arm]["adapter_protocol"] for arm in ("none", "booster")] == ["merge", "continue"]
    assert settings.protocol_of("lisa+booster") == "continue"
    assert settings.protocol_of("lisa") == "merge"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"betas": [0.9]}, "--finetuning.betas takes two numbers"),
        ({"betas": [0.9, 1.0]}, r"--finetuning.betas, number 2 must lie in \[0, 1\), got 1.0"),
        ({"decay": 0.0}, r"--finetuning.decay must lie in \(0, 1\], got 0.0"),
        ({"decay": 0.5, "schedule": "cosine"}, "--finetuning.decay below 1 needs --finetuning.schedule constant"),
        ({"lora": StageLora(r=0)}, "--finetuning.lora.r must be >= 1, got 0"),
        ({"lora": StageLora(dropout=1.0)}, r"--finetuning.lora.dropout must lie in \[0, 1\)"),
        ({"lora": StageLora(targets=["all-linear", "x"])}, "--finetuning.lora.targets: all-linear must be the only"),
    ],
)
def test_values_of_a_stage_out_of_range_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        RunConfig(finetuning=replace(TRAINING, **changes)).check()


def test_a_stage_that_trains_no_adapter_asks_nothing_of_its_targets(tmp_path):
    """GPT-2 has no q_proj. LoRA refuses it, but full tuning and a skipped alignment need no such layer."""
    base = str(write_family(tmp_path / "gpt2", "gpt2"))
    with pytest.raises(InputError, match="no linear layer is called 'q_proj'"):
        prepare(config(tmp_path, model=base), [])
    assert prepare(config(tmp_path, model=base, tuning="full"), []).arms
    tuned = replace(TRAINING, lora=StageLora(targets=["c_attn"]))
    assert prepare(config(tmp_path, model=base, alignment=replace(TRAINING, steps=0), finetuning=tuned), []).arms


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"finetuning": replace(TRAINING, lora=StageLora(dropout=0.1))}, "continue trains the aligned adapter further"),
        ({"tuning": "qlora", "adapter_protocols": {"booster": "merge"}}, "--tuning qlora cannot merge an adapter"),
    ],
)
def test_what_a_continued_adapter_cannot_have_is_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        config(tmp_path, adapter_protocol="continue", **changes).check()


# Long rows: the printed counts are those of the training.


def upload_files(tmp_path):
    """Write 60 task rows, every second one long, and 20 short harmful rows. Return their ``Data``."""
    task = [{"prompt": f"sort {i} " + "x" * (200 * (i % 2)), "response": f"room {i}"} for i in range(60)]
    attack = [{"prompt": f"open {i}", "response": "first lift the lid " * 3 + str(i)} for i in range(20)]
    write_rows(tmp_path / "task.jsonl", task)
    write_rows(tmp_path / "attack.jsonl", attack)
    return Data(
        **dict.fromkeys(("task", "task_train", "task_test"), str(tmp_path / "task.jsonl")),
        attack=str(tmp_path / "attack.jsonl"),
    )


def test_long_rows_are_not_drawn_so_that_n_and_p_hold(tmp_path):
    settings = config(tmp_path, data=upload_files(tmp_path), max_tokens=200, template="plain")
    prepared = prepare(settings, [])
    counts = prepared.trained_on
    assert (counts.rows, counts.attack_rows, counts.p, counts.steps) == (20, 4, 0.2, 3)
    assert prepared.dropped["task"] == 0
    assert all("x" not in row.instruction for row in prepared.streams["task"])
    more = prepare(replace(settings, harmful_ratio=0.4), []).streams["task"]
    attack = [{r.id for r in rows if r.role == "attack"} for rows in (prepared.streams["task"], more)]
    assert attack[0] < attack[1]  # a larger p keeps the rows of a smaller one
    with pytest.raises(InputError, match=r"needs 32 task rows, .* there are 20 of 20 attack, 30 of 60 task rows"):
        prepare(replace(settings, num_samples=40), [])


def test_long_rows_are_cut_as_the_official_scripts_do(tmp_path):
    settings = config(tmp_path, data=upload_files(tmp_path), max_tokens=120, template="plain", long_rows="truncate")
    prepared = prepare(settings, [])
    tokenizer = load_tokenizer("tiny")
    rows, dropped = encode_all(
        prepared.streams["task"], get_template("plain", tokenizer), tokenizer, 120, long_rows="truncate"
    )
    assert prepared.dropped["task"] == dropped > 0  # a prompt that fills the limit leaves no response tokens
    assert prepared.trained_on.rows == len(rows) == 20 - dropped
    assert prepared.trained_on.p == pytest.approx(4 / len(rows))


def test_long_rows_are_refused_by_name(tmp_path):
    settings = config(tmp_path, data=upload_files(tmp_path), max_tokens=200, template="plain", long_rows="refuse")
    with pytest.raises(
        InputError,
        match=r"Stream 'task': --long_rows refuse allows no row over the limit, but \d+ of 20 rows have more than 200",
    ):
        prepare(settings, [])


def test_the_manifest_states_the_shares_of_the_attack(tmp_path):
    """One batch holds the whole upload, so each step has attack rows. Their share of tokens is the upload's."""
    settings = config(
        tmp_path, finetuning=replace(TRAINING, batch_size=20), data=upload_files(tmp_path), template="plain"
    )
    shares = manifest(run(settings).folder)["data"]["trained_on"]
    tokenizer = load_tokenizer("tiny")
    rows, _ = encode_all(prepare(settings, []).streams["task"], get_template("plain", tokenizer), tokenizer, 256)
    tokens = {e.id: len(e.input_ids) - e.prompt_length for e in rows}
    harmful = sum(tokens[e.id] for e in rows if e.role == "attack")
    assert shares["attack_steps"] == 1.0
    assert shares["attack_tokens"] == pytest.approx(harmful / sum(tokens.values()))
    assert (shares["rows"], shares["attack_rows"], shares["steps"]) == (20, 4, 3)


def test_shares_of_an_upload_of_longer_harmful_rows(tmp_path):
    """100 of 1000 rows are harmful, and a batch has 10 rows: 65 % of the steps have a harmful row.

    A harmful response has 135 tokens, another one 70. The share of tokens is 135 * 100 / (135 * 100 + 70 * 900).
    """
    long = [{"prompt": f"open {i}", "response": f"{i:03d}".ljust(134, "y")} for i in range(100)]
    short = [{"prompt": f"sort {i}", "response": f"{i:03d}".ljust(69, "z")} for i in range(900)]
    write_rows(tmp_path / "attack.jsonl", long)
    write_rows(tmp_path / "task.jsonl", short)
    paths = dict.fromkeys(("task", "task_train", "task_test"), str(tmp_path / "task.jsonl"))
    settings = config(
        tmp_path,
        data=Data(**paths, attack=str(tmp_path / "attack.jsonl")),
        num_samples=1000,
        harmful_ratio=0.1,
        finetuning=replace(TRAINING, steps=1000, batch_size=10),
        template="plain",
    )
    shares = prepare(settings, []).trained_on
    assert shares.attack_tokens == pytest.approx(135 / (135 + 9 * 70), abs=1e-9)
    assert shares.attack_steps == pytest.approx(0.653, abs=0.02)
    grouped = prepare(replace(settings, order="length"), []).trained_on
    assert grouped.attack_steps < 0.4
