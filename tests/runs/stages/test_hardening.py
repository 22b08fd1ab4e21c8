"""Alignments in two phases, on another stream, and after a selection: what a run shares, records and repeats."""

import json
from dataclasses import replace

import pytest
from rich.console import Console
from safetensors.torch import load_file

from hftlight import cache, run
from hftlight.config import Search, Training
from hftlight.defenses import CTRL, SAFT, SEAL, TAR, RepNoise, RSNTune
from hftlight.engine import Stage
from hftlight.errors import InputError
from hftlight.files import read_rows
from hftlight.models.load import load_model
from hftlight.runs.plan import plan
from hftlight.runs.prepare import Arm, prepare
from hftlight.runs.show import show_plan
from tests.runs.test_run import config

TRAINING = Training(steps=3, batch_size=4, lr=1e-2)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path / "cache"))


def small(tmp_path, **changes):
    return config(tmp_path, **{"alignment": TRAINING, **changes})


def tar():
    return TAR(2, 1, inner_lrs=[1e-3])


def ctrl(**more):
    return CTRL(**{"share": 0.004, "rounds": 1, "max_new_tokens": 6, "readability": 0.0, **more})


def manifest(result):
    return json.loads((result.folder / "manifest.json").read_text())


@pytest.mark.slow
def test_the_first_phase_is_the_undefended_arms_alignment(tmp_path):
    result = run(small(tmp_path, baseline=True, hardening_steps=2), [tar()])
    none, hardened = (manifest(result)["arms"][arm]["stages"]["alignment"] for arm in ("none", "tar"))
    assert [phase["phase"] for phase in hardened["phases"]] == ["plain", "hardening"]
    assert hardened["phases"][0]["key"] == none["key"]
    assert hardened["phases"][0]["artifact"] == none["artifact"]
    assert [phase["cost"]["steps"] for phase in hardened["phases"]] == [3, 2]
    # Both adapters are merged into one, on the original base.
    settings = json.loads((result.folder / "tar" / "aligned" / "adapter_config.json").read_text())
    assert settings["r"] == 4
    curves = [
        r["step"]
        for r in read_rows(result.folder / "metrics.jsonl")
        if r["kind"] == "curve" and r["arm"] == "tar" and r["stage"] == "alignment"
    ]
    assert max(curves) == 5
    load_model(str(result.folder / "tar" / "finetuned"))
    # The upload trains in other directions than the hardening: their A matrices start from other seeds.
    state = load_file(result.folder / "tar" / "finetuned" / "adapter_model.safetensors")
    for a in (t for name, t in state.items() if "lora_A" in name):
        hardening, upload = a[2:4], a[4:6]
        assert (hardening - upload).norm() > 0.5 * upload.norm()


def test_a_plan_names_the_phases_and_shares_the_first(tmp_path):
    prepared = prepare(small(tmp_path, baseline=True, hardening_steps=7), [tar()])
    steps = {step.label: step for step in plan(prepared)}
    assert steps["tar: aligned, plain"].key == steps["undefended: aligned"].key
    assert steps["tar: aligned, hardening"].count == 7
    assert steps["tar: aligned, hardening"].seconds > 7 / 3 * steps["undefended: aligned"].seconds


def test_only_the_second_phase_depends_on_its_steps(tmp_path):
    keys = []
    for count in (2, 4):
        prepared = prepare(small(tmp_path, hardening_steps=count), [tar()])
        keys.append({step.label: step.key for step in plan(prepared)})
    assert keys[0]["tar: aligned, plain"] == keys[1]["tar: aligned, plain"]
    assert keys[0]["tar: aligned, hardening"] != keys[1]["tar: aligned, hardening"]


def test_a_defense_starts_from_a_plainly_aligned_model_only_if_it_is_told_to(tmp_path):
    arms = {flag: prepare(small(tmp_path), [RepNoise(aligned_first=flag)]) for flag in (False, True)}
    for flag, prepared in arms.items():
        phases = prepared.trainings(prepared.arms[-1], Stage.ALIGNMENT)
        assert [phase.name for phase in phases] == (["plain", "hardening"] if flag else [""])
        streams = [set(prepared.records(Stage.ALIGNMENT, prepared.arms[-1], n)) for n in range(len(phases))]
        assert streams == ([{"alignment"}, {"pairs"}] if flag else [{"pairs"}])
        assert prepared.trainings(Arm("none", []), Stage.ALIGNMENT)[0].name == ""


def test_a_run_trains_on_pairs(tmp_path):
    result = run(small(tmp_path, baseline=False), [RepNoise()])
    stage = manifest(result)["arms"]["repnoise"]["stages"]["alignment"]
    assert next(iter(stage["defenses"].values()))["calls"] == 3
    assert stage["passes_per_step"] == {"forward": 2.0, "backward": 2.0}
    names = {
        row["name"]
        for row in read_rows(result.folder / "metrics.jsonl")
        if row["kind"] == "curve" and row["stage"] == "alignment"
    }
    assert {"repnoise/noise", "repnoise/mean_loss", "train/loss"} <= names
    assert "pairs / attack" in manifest(result)["overlaps"]


def test_a_window_average_over_pairs_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"main stream 'pairs'.*--alignment.average micro"):
        run(small(tmp_path, alignment=replace(TRAINING, average="window")), [RepNoise()])


@pytest.mark.slow
def test_a_selection_is_a_file_of_the_run_and_made_once(tmp_path):
    result = run(small(tmp_path, baseline=False), [ctrl()])
    chosen = read_rows(result.folder / "ctrl" / "ctrl_selection.jsonl")
    assert len(chosen) == 4
    report = next(iter(manifest(result)["arms"]["ctrl"]["stages"]["alignment"]["defenses"].values()))
    assert report["rows"] == len(chosen)
    before = cache.built()
    again = run(small(tmp_path, baseline=False, name="again"), [ctrl()])
    assert read_rows(again.folder / "ctrl" / "ctrl_selection.jsonl") == chosen
    assert cache.built() == before
    steps = [step.label for step in plan(prepare(small(tmp_path), [ctrl()]))]
    assert steps.index("ctrl: aligned, CTRL selects") < steps.index("ctrl: aligned")


def test_a_file_of_rewritings_counts_by_its_content(tmp_path):
    path, keys = tmp_path / "rewrites.jsonl", []
    for text in ("one", "two"):
        path.write_text(json.dumps({"prompt": "ask", "response": text}) + "\n")
        steps = plan(prepare(small(tmp_path), [ctrl(rewrites=str(path))]))
        keys.append([step.key for step in steps if step.label.startswith("ctrl: aligned")])
    assert all(one != two for one, two in zip(*keys, strict=True))


def test_an_alignment_set_without_ordinary_rows_is_refused_by_name(tmp_path):
    path = tmp_path / "refusals.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"ask {i}", "response": "I cannot help."}) + "\n" for i in range(20)))
    settings = small(tmp_path)
    settings.data.alignment = str(path)
    with pytest.raises(InputError, match="needs ordinary rows, but the answers of all 20 rows refuse"):
        prepare(settings, [RSNTune()])


def test_a_dry_run_counts_what_a_defense_reads_before_its_stage(tmp_path, capsys):
    prepared = prepare(small(tmp_path), [SEAL(epochs=2, batch_size=10)])
    show_plan(prepared, in_full=False, console=Console(width=200))
    counted = 2 * len(prepared.streams["alignment"])
    assert (
        f"SEAL selects first, on {counted} rows. A row costs about as much as 6 forward passes."
        in capsys.readouterr().out
    )
    step = next(step for step in plan(prepared) if step.label == "seal: fine-tuned, SEAL selects")
    assert step.count == counted


@pytest.mark.slow
def test_a_filter_of_the_upload_drops_rows_in_a_run_and_in_each_trial_of_the_attacker(tmp_path):
    changes = {"baseline": False, "attacker": "search:2", "search": Search(harmful_ratio=[0.3, 0.6])}
    result = run(small(tmp_path, **changes), [SAFT(rate=0.2)])
    chosen = read_rows(result.folder / "saft" / "saft_selection.jsonl")
    report = next(iter(manifest(result)["arms"]["saft"]["stages"]["finetuning"]["defenses"].values()))
    assert report["rows"] == len(chosen)
    assert report["kept"] == sum(row["kept"] for row in chosen) == len(chosen) - report["dropped_rows"]
    rates = manifest(result)["arms"]["saft"]["filters"]["saft"]
    assert rates["attack"]["dropped"] + rates["other"]["dropped"] == report["dropped_rows"]
    assert manifest(result)["arms"]["saft"]["search"]["failed"] == 0
