"""An attack of two phases: the second starts from the first, and together they are one fine-tuning."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from hftlight import run
from hftlight.attacks import Explicit, ReverseSftDpo
from hftlight.defenses import L2SP, Antidote, ConstrainedSFT, SafetyMix
from hftlight.errors import InputError
from hftlight.files import read_rows
from hftlight.models.load import load_model
from hftlight.runs import run as run_module
from hftlight.runs.plan import plan
from hftlight.runs.prepare import prepare
from hftlight.runs.run import total_cost
from tests.runs.test_run import EVALUATION, config

ATTACK = ReverseSftDpo(n=6, dpo_steps=2, dpo_lr=2e-2)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path / "cache"))


def manifest(result):
    return json.loads((result.folder / "manifest.json").read_text())


def adapter(result, arm="none", stage="finetuned"):
    return load_file(result.folder / arm / stage / "adapter_model.safetensors")


def losses(result, arm="none"):
    return [
        (row["step"], row["value"])
        for row in read_rows(result.folder / "metrics.jsonl")
        if (row["kind"], row.get("name"), row["stage"], row["arm"]) == ("curve", "train/loss", "finetuning", arm)
    ]


def test_the_second_phase_starts_from_the_model_of_the_first(tmp_path):
    """The first phase equals the plain attack on the same rows. The second phase's first loss is log 2."""
    plain = run(config(tmp_path, baseline=False), attack=Explicit(n=6))
    result = run(config(tmp_path, baseline=False, logger="csv"), attack=ATTACK)
    stage = manifest(result)["arms"]["none"]["stages"]["finetuning"]
    first, second = stage["phases"]
    assert [phase["attack"] for phase in (first, second)] == ["explicit", "reverse_preference"]
    assert first["key"] == manifest(plain)["arms"]["none"]["stages"]["finetuning"]["key"]
    assert stage["key"] == second["key"] != first["key"]
    curve = losses(result)
    assert [step for step, _ in curve] == [1, 2, 3, 4, 5]
    assert curve[:3] == losses(plain)
    assert curve[3][1] == pytest.approx(math.log(2), abs=1e-6)
    assert curve[4][1] < math.log(2)
    rows = read_rows(result.folder / "metrics.jsonl")
    (cost,) = [row for row in rows if row["kind"] == "cost" and row["stage"] == "finetuning"]
    assert cost["steps"] == 5
    assert cost["seconds"] == pytest.approx(first["cost"]["seconds"] + second["cost"]["seconds"], abs=1e-3)
    assert {row["stage"] for row in rows if row["kind"] == "score"} == {"base", "alignment", "finetuning"}
    logged = (result.folder / "csv" / "none" / "finetuning" / "metrics.csv").read_text().splitlines()
    place = logged[0].split(",").index("step")
    assert {1, 2, 3, 4, 5} <= {int(line.split(",")[place]) for line in logged[1:]}
    # Under the merge protocol each stage and phase appends its own adapter's rows: 2 + 2 + 2.
    one, two = adapter(plain), adapter(result)
    assert all(torch.equal(t, two[name][: len(t)]) for name, t in one.items() if "lora_A" in name)
    assert {len(t) for name, t in two.items() if "lora_A" in name} == {6}


def test_killed_between_the_phases_it_goes_on_with_the_second(tmp_path, monkeypatch):
    settings, on_pairs, whole = config(tmp_path, baseline=False), [], run_module.run_stage

    def dying(job, *rest):
        on_pairs.append(job.preference is not None)
        if on_pairs[-1] and len(on_pairs) == 3:
            raise KeyboardInterrupt
        return whole(job, *rest)

    monkeypatch.setattr(run_module, "run_stage", dying)
    with pytest.raises(KeyboardInterrupt):
        run(settings, [L2SP(0.1)], attack=ATTACK)
    resumed = run(settings, [L2SP(0.1)], attack=ATTACK)
    assert on_pairs == [False, False, True] * 2
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path / "another"))
    again = run(replace(settings, output=str(tmp_path / "again")), [L2SP(0.1)], attack=ATTACK)
    one, two = adapter(resumed, "l2_sp"), adapter(again, "l2_sp")
    assert all(torch.equal(t, two[name]) for name, t in one.items())
    assert losses(resumed, "l2_sp") == losses(again, "l2_sp")
    phases = manifest(again)["arms"]["l2_sp"]["stages"]["finetuning"]["phases"]
    assert [next(iter(phase["defenses"].values()))["calls"] for phase in phases] == [3, 2]  # L2SP acts in both phases


def test_a_repair_takes_both_phases_as_the_users_update(tmp_path):
    folder = run(config(tmp_path, baseline=False), [Antidote(1.0)], attack=ATTACK).folder / "antidote"
    aligned, tuned, repaired = (
        load_model(str(folder / stage)).state_dict() for stage in ("aligned", "finetuned", "repaired")
    )
    assert all(torch.allclose(t, repaired[name], atol=1e-6) for name, t in aligned.items())
    assert any(not torch.allclose(t, tuned[name], atol=1e-6) for name, t in aligned.items())


def test_a_curve_counts_the_steps_of_both_phases(tmp_path):
    evaluation = replace(EVALUATION, at=[2, 4], at_prompts=2)
    result = run(config(tmp_path, baseline=False, evaluation=evaluation), attack=ATTACK)
    curve_rows = [row for row in read_rows(result.folder / "metrics.jsonl") if row["kind"] == "curve"]
    assert {row["step"] for row in curve_rows if row["name"].startswith("eval/harmful_score")} == {2, 4}
    phases = manifest(result)["arms"]["none"]["stages"]["finetuning"]["phases"]
    assert [phase["evaluated"]["at"] for phase in phases] == [[2], [1]]


@pytest.mark.parametrize(
    ("defense", "evaluation", "message"),
    [
        (ConstrainedSFT(), {}, "ConstrainedSFT: the loss slot weighs the tokens of single answers"),
        (SafetyMix(count=2), {}, "SafetyMix: .*Defenses that rewrite rows do not work on pairs"),
        (
            None,
            {"at": [2], "stop_above": 50.0},
            "--evaluation.stop_above can stop only one training, but ReverseSftDpo has 2",
        ),
        (None, {"at": [6]}, "--evaluation.at must name steps of the fine-tuning, from 1 to 5, got 6"),
    ],
)
def test_what_cannot_act_in_every_phase_is_refused_before_the_first_step(tmp_path, defense, evaluation, message):
    settings = config(tmp_path, evaluation=replace(EVALUATION, **evaluation))
    with pytest.raises(InputError, match=message):
        prepare(settings, [defense] if defense else [], ATTACK)


def test_the_plan_knows_both_uploads(tmp_path):
    prepared = prepare(config(tmp_path), [], ATTACK)
    assert len(prepared.streams["task"]) == 6
    assert len(prepared.streams["task_2"]) == 2 * 6
    assert [unit.count for unit in plan(prepared) if unit.label == "undefended: fine-tuned"] == [3, 2]
    assert not any("task_2" in pair for pair in prepared.overlaps)


def test_costs_of_phases_add_up():
    first = {"steps": 3, "seconds": 6.0, "seconds_per_step": 2.0, "peak_memory_mib": 10.0}
    second = {"steps": 1, "seconds": 1.0, "seconds_per_step": 1.0, "peak_memory_mib": 12.0}
    assert total_cost([first]) == first
    assert total_cost([first, second]) == {
        "steps": 4,
        "seconds": 7.0,
        "seconds_per_step": 1.75,
        "peak_memory_mib": 12.0,
    }
