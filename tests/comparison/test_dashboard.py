"""Dashboards: the same names in every logger, a whole comparison in W&B's offline files, and a W&B that fails."""

import csv
import json
import threading

import pytest
import wandb

from hftlight import run
from hftlight.cli.compare import compare
from hftlight.cli.dashboard import dashboard as command
from hftlight.comparison import dashboard
from hftlight.comparison.dashboard import generation_rows, leaderboard_rows, specification
from hftlight.comparison.read import read_comparison
from hftlight.errors import InputError
from hftlight.files import read_rows
from hftlight.runs.logging import wandb as loggers
from hftlight.runs.logging.rows import named, score_names
from hftlight.runs.logging.stage import labels_of, stage_logger
from hftlight.runs.logging.wandb import start_wandb
from tests.helpers.comparison_folder import write_comparison
from tests.helpers.wandb_files import read_offline
from tests.runs.test_run import config

COMPARE = [
    "--defenses", "none", "lisa", "--seeds", "1", "--harmful_ratios", "0", "0.2", "--model", "tiny",
    "--alignment.steps", "2", "--finetuning.steps", "2", "--alignment.batch_size", "2", "--finetuning.batch_size", "2",
    "--num_samples", "20", "--evaluation.prompts", "4", "--evaluation.task_rows", "4", "--evaluation.loss_rows", "2",
    "--accelerator", "cpu",
    "--evaluation.over_refusal_prompts", "4", "--evaluation.max_new_tokens", "4", "--logger", "wandb",
    "--evaluation.task_max_new_tokens", "4", "--comparison", "mine",
]  # fmt: skip
SCORES = {
    *(f"answers_{outcome}" for outcome in ("refused", "complied", "broken", "other")),
    "alignment_loss",
    "harmful_validation_loss",
    "harmful_score",
    "harmful_score/keyword",
    "repetition",
    "over_refusal",
    "finetune_accuracy",
    "finetune_accuracy_lenient",
    "over_refusal_full",
    "over_refusal_none",
    "refusal_rate",
    "harmful_score_plus",
    "empty_answers",
    "short_answers",
    "letterless_answers",
    "looping_answers",
    "distinct_2",
    "mean_words",
    "identical_answers",
    "task_form_answers",
    "collapsed_answers",
}
WITHOUT_INTERVAL = {"distinct_2", "mean_words"}
EVAL = {f"eval/{name}{end}" for name in SCORES - WITHOUT_INTERVAL for end in ("", "_low", "_high")}
EVAL |= {f"eval/{name}" for name in WITHOUT_INTERVAL}
COST = {"cost/steps", "cost/seconds", "cost/seconds_per_step", "cost/relative_to_sft", "cost/peak_memory_mib"}
TRAINED = EVAL | COST | {"train/loss", "train/grad_norm"}


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """Hide the API key and W&B's files in HOME, and reset the record of an earlier W&B failure."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(loggers, "_lost", threading.Event())


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Return the folder of a small comparison of two arms and two harmful ratios, logged offline."""
    place = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HFTLIGHT_CACHE", str(place / "cache"))
        patch.setenv("WANDB_MODE", "offline")
        assert compare([*COMPARE, "--output", str(place)]) == 0
    return place / "mine"


@pytest.fixture(scope="module")
def offline(compared):
    return read_offline(compared)


@pytest.mark.slow
def test_runs_are_grouped_by_comparison_arm_and_stage(compared, offline):
    cells = [r for r in offline if r.job_type != "summary"]
    assert {r.group for r in offline} == {"mine"}
    assert len(cells) == 2 * 2 * 3
    # One run for each arm, harmful ratio and stage.
    assert {(r.config["arm"], r.config["p"], r.job_type) for r in cells} == {
        (arm, p, stage) for arm in ("none", "lisa") for p in (0, 0.2) for stage in ("base", "alignment", "finetuning")
    }
    one = next(r for r in cells if (r.config["arm"], r.config["p"], r.job_type) == ("lisa", 0.2, "finetuning"))
    assert one.name == "lisa/builtin/harmful_mix/p=0.2/seed=0/finetuning"
    assert set(one.tags) == {"mine", "lisa", "builtin", "harmful_mix", "p=0.2", "seed=0", "finetuning"}
    labels = {key: one.config[key] for key in ("comparison", "task", "seed", "stage", "model", "num_samples")}
    assert labels == {
        "comparison": "mine", "task": "builtin", "seed": 0, "stage": "finetuning", "model": "tiny", "num_samples": 20,
    }  # fmt: skip


@pytest.mark.slow
def test_offline_files_hold_curves_scores_and_costs_by_the_names_of_metrics_jsonl(compared, offline):
    for r in offline:
        if r.job_type == "summary":
            continue
        (path,) = r.folder.parents[1].glob("metrics.jsonl")
        rows = [row for row in read_rows(path) if row["stage"] == r.job_type]
        assert r.keys == named(rows).keys()
        if r.job_type == "base":
            assert r.keys == EVAL
        else:
            assert r.keys >= TRAINED - {"cost/relative_to_sft"}
        curve = {row["step"]: row["value"] for row in rows if row["kind"] == "curve" and row["name"] == "train/loss"}
        logged = {h["trainer/global_step"]: h["train/loss"] for h in r.history if "train/loss" in h}
        assert logged == pytest.approx(curve)
        assert r.summary["eval/harmful_score"] == next(x["value"] for x in rows if x.get("metric") == "harmful_score")


@pytest.mark.slow
def test_the_summary_holds_leaderboard_generations_and_figures(compared, offline):
    (summary,) = [r for r in offline if r.job_type == "summary"]
    board = summary.table("leaderboard")
    at = {name: board["columns"].index(name) for name in ("arm", "p", "harmful_score", "harmful_score_low")}
    assert [(row[at["p"]], row[at["arm"]]) for row in board["data"]] == [
        (0.0, "none"), (0.0, "lisa"), (0.2, "none"), (0.2, "lisa"),
    ]  # fmt: skip
    for row in board["data"]:
        cell = compared / "cells" / f"{row[at['arm']]}-builtin-p{row[at['p']]:g}-s0" / "metrics.jsonl"
        measured = [x for x in read_rows(cell) if x.get("metric") == "harmful_score" and x["stage"] == "finetuning"]
        assert row[at["harmful_score"]] == measured[0]["value"]
    answers = summary.table("generations")
    assert len(answers["data"]) == 4 * 3 * 4  # cells, sets, prompts
    assert {row[answers["columns"].index("stage")] for row in answers["data"]} == {"finetuning"}
    pictures = [v for k, v in summary.summary.items() if k.startswith("figures/")]
    assert len(pictures) >= 4
    assert all((summary.folder / "files" / p["path"]).read_bytes().startswith(b"\x89PNG") for p in pictures)


@pytest.mark.slow
def test_every_key_of_the_specification_exists_in_the_runs(compared, offline, tmp_path):
    assert command([str(compared), "--save", str(tmp_path / "spec.json")]) == 0
    spec = json.loads((tmp_path / "spec.json").read_text())
    names = [s["name"] for s in spec["sections"]]
    assert names == ["Safety", "Task", "Cost", "Training curves", "Leaderboard", "Generations", "Figures"]
    for section in spec["sections"]:
        assert section["filters"]["State"] == ["finished"]
        wanted = {key.removeprefix("config."): values for key, values in section["filters"].items()}
        known = [({**r.config, "State": r.state}, r) for r in offline]
        shown = [r for own, r in known if all(own.get(k) in values for k, values in wanted.items())]
        assert shown
        for key in section["groupby"]:
            assert all(key.removeprefix("config.") in r.config for r in shown), key
        for panel in section["panels"]:
            for key in panel["metrics"]:
                assert any(key in r.keys for r in shown), key
            if "x" in panel:
                assert any(panel["x"] in row for r in shown for row in r.history)
    safety = spec["sections"][0]
    assert safety["groupby"] == ["config.comparison", "config.arm", "config.stage", "config.p"]
    assert safety["filters"]["config.stage"] == ["base", "alignment", "finetuning"]
    first = safety["panels"][0]["metrics"]
    assert first == ["eval/harmful_score", "eval/harmful_score_low", "eval/harmful_score_high"]


@pytest.mark.slow
def test_the_report_has_a_section_and_a_panel_for_each_of_the_specification(compared):
    pytest.importorskip("wandb_workspaces", reason='wandb-workspaces is missing (pip install "hftlight[dashboard]")')
    spec = specification(read_comparison(compared))
    report = dashboard.report_of(spec, "me")
    headings, grids = report.blocks[::2], report.blocks[1::2]
    assert [h.text for h in headings] == [s["name"] for s in spec["sections"]]
    for grid, section in zip(grids, spec["sections"], strict=True):
        (runs,) = grid.runsets
        assert (runs.entity, runs.project, list(runs.groupby)) == ("me", spec["project"], section["groupby"])
        assert all(value in str(runs.filters) for values in section["filters"].values() for value in values)
        shown = str(grid.panels)
        for panel in section["panels"]:
            assert all(key in shown for key in panel["metrics"])


@pytest.mark.slow
def test_upload_without_a_package_or_a_key_loses_nothing(compared, tmp_path, monkeypatch, capsys):
    path = tmp_path / "spec.json"
    monkeypatch.setitem(__import__("sys").modules, "wandb_workspaces", None)
    assert command([str(compared), "--save", str(path), "--upload"]) == 2
    assert 'pip install "hftlight[dashboard]"' in capsys.readouterr().err
    assert json.loads(path.read_text())["sections"]
    for name in ("wandb_workspaces", "wandb_workspaces.reports", "wandb_workspaces.reports.v2"):
        monkeypatch.setitem(__import__("sys").modules, name, type(threading)(name))
    monkeypatch.setattr(wandb, "api", type("Api", (), {"api_key": None})(), raising=False)
    with pytest.raises(InputError, match=r"WANDB_API_KEY.*is saved in .*spec.json"):
        dashboard.upload({"sections": []}, path)
    monkeypatch.setattr(wandb, "api", type("Api", (), {"api_key": "k" * 40})(), raising=False)
    monkeypatch.setenv("WANDB_ENTITY", "me")
    monkeypatch.setattr(dashboard, "report_of", lambda *_: (_ for _ in ()).throw(ConnectionError("no route")))
    with pytest.raises(InputError, match=r"ConnectionError: no route.*is saved in"):
        dashboard.upload({"sections": []}, path)


def test_a_folder_without_finished_cells_is_refused(tmp_path, capsys):
    assert command([str(tmp_path)]) == 2
    assert "holds no comparison" in capsys.readouterr().err
    failed = {"none-builtin-p0.1-s0": "RunError: x"}
    write_comparison(tmp_path / "c", ("none",), (0.1,), 1, failed=failed)
    assert command([str(tmp_path / "c")]) == 2
    assert "no cell of" in capsys.readouterr().err


def test_answers_from_outside_the_built_in_world_stay_unless_allowed(tmp_path):
    folder = write_comparison(tmp_path, ("none",), (0.1,), 1, prompts=5)
    path = folder / "cells" / "none-builtin-p0.1-s0" / "generations.jsonl"
    rows = [{**r, "source": "builtin" if r["set"] == "task" else "advbench"} for r in read_rows(path)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    comparison = read_comparison(folder)
    assert {row[6] for row in generation_rows(comparison, False)} == {"task"}
    assert len(generation_rows(comparison, False)) == 5
    assert len(generation_rows(comparison, True)) == 15


def test_the_leaderboard_has_numbers_over_seeds(tmp_path):
    comparison = read_comparison(write_comparison(tmp_path, collapsed=["lisa-builtin-p0.1-s1"]))
    columns, rows = leaderboard_rows(comparison)
    boosted = dict(zip(columns, next(r for r in rows if r[2:4] == [0.1, "booster"]), strict=True))
    values = comparison.values(
        next(p for p in comparison.cells if (p.arm, p.harmful_ratio) == ("booster", 0.1)), "harmful_score"
    )
    assert boosted["harmful_score"] == pytest.approx(sum(values.values()) / 3)
    assert boosted["harmful_score_low"] < boosted["harmful_score"] < boosted["harmful_score_high"]
    assert (boosted["seeds"], boosted["harmful_score_best"], boosted["relative_seconds"]) == (3, True, 2.0)
    where = (columns.index("p"), columns.index("arm"), columns.index("collapsed_seeds"))
    assert [(r[where[0]], r[where[1]]) for r in rows if r[where[2]]] == [(0.1, "lisa")]


def test_names_of_scores_costs_and_further_judges():
    rows = [
        {"kind": "curve", "name": "train/loss", "value": 2.0},
        {"kind": "curve", "name": "train/loss", "value": 1.0},
        {"kind": "score", "metric": "harmful_score", "judge": "builtin", "value": 50.0, "low": 40.0, "high": 60.0},
        {"kind": "score", "metric": "harmful_score", "judge": "keyword", "value": 70.0, "low": None, "high": None},
        {"kind": "cost", "steps": 3, "seconds": 6.0, "relative_to_sft": None},
    ]
    assert named(rows) == {
        "train/loss": 1.0, "eval/harmful_score": 50.0, "eval/harmful_score_low": 40.0, "eval/harmful_score_high": 60.0,
        "eval/harmful_score/keyword": 70.0, "cost/steps": 3.0, "cost/seconds": 6.0,
    }  # fmt: skip
    assert score_names(rows[2:4]) == ["eval/harmful_score", "eval/harmful_score/keyword"]


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("kind", ["csv", "tensorboard"])
def test_csv_and_tensorboard_have_the_names_of_metrics_jsonl(kind, tmp_path, monkeypatch, shared_cache):
    """The second logger's run finds all stages in the cache and logs their curves too."""
    monkeypatch.setenv("HFTLIGHT_CACHE", shared_cache)
    result = run(config(tmp_path, logger=kind, baseline=False))
    rows = read_rows(result.folder / "metrics.jsonl")
    assert {r["name"] for r in rows if r["kind"] == "score"} == {f"eval/{name}" for name in SCORES}
    for stage, expected in (("base", EVAL), ("alignment", TRAINED), ("finetuning", TRAINED)):
        folder = result.folder / kind / "none" / stage
        assert named(r for r in rows if r["stage"] == stage).keys() == expected
        losses = {
            r["step"]: r["value"]
            for r in rows
            if (r["kind"], r["stage"], r.get("name")) == ("curve", stage, "train/loss")
        }
        if kind == "csv":
            lines = list(csv.DictReader((folder / "metrics.csv").open()))
            names = {name for name in lines[0] if name != "step"}
            logged = {int(x["step"]): float(x["train/loss"]) for x in lines if x.get("train/loss")}
        else:
            from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

            events = EventAccumulator(str(folder)).Reload()
            names = set(events.Tags()["scalars"])
            logged = {e.step: e.value for e in events.Scalars("train/loss")} if "train/loss" in names else {}
        assert names == expected
        assert logged == pytest.approx(losses)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (wandb.errors.CommError("x"), "cannot be reached (CommError"),
        (wandb.errors.UsageError("x"), "cannot be reached (UsageError"),
        (TimeoutError("x"), "cannot be reached (TimeoutError"),
        (ConnectionError("x"), "cannot be reached (ConnectionError"),
        (wandb.errors.AuthenticationError("x"), "rejects the API key (AuthenticationError"),
    ],
)
def test_a_start_that_fails_goes_on_offline(error, said, tmp_path, monkeypatch, capsys):
    original, modes = wandb.init, []

    def failing(mode=None, **settings):
        modes.append(mode)
        if mode != "offline":
            raise error
        return original(mode=mode, **settings)

    monkeypatch.setattr(wandb, "init", failing)
    monkeypatch.setenv("WANDB_MODE", "online")
    labels = labels_of(tmp_path / "run", "none", "base", config(tmp_path))
    wandb_run = start_wandb(tmp_path / "run", labels, {})
    loggers.finish_wandb(wandb_run, tmp_path)
    assert modes == ["online", "offline"]
    assert loggers._lost.is_set()  # the next stage does not wait
    out = capsys.readouterr().out
    assert said in out
    assert len(out.splitlines()) == 1
    assert read_offline(tmp_path / "run")[0].config["stage"] == "base"


def test_a_key_of_the_wrong_form_does_not_stop_anything(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "short")
    monkeypatch.setenv("WANDB_MODE", "online")
    wandb_run = start_wandb(tmp_path, {"comparison": "c", "stage": "base"}, {})
    loggers.finish_wandb(wandb_run, tmp_path)
    assert "rejects the API key" in capsys.readouterr().out
    assert len(read_offline(tmp_path)) == 1


def test_a_wandb_that_does_not_even_start_offline_does_not_stop_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(wandb, "init", lambda **_: (_ for _ in ()).throw(OSError("no service")))
    labels = labels_of(tmp_path, "none", "base", config(tmp_path))
    logger = stage_logger("wandb", tmp_path, labels, {})
    logger.log_metrics({"train/loss": 1.0}, 0)
    logger.close()
    assert capsys.readouterr().out.count("cannot be started offline (OSError: no service)") == 1


class Failing:
    """A W&B run whose ``log`` raises an error and whose ``finish`` calls the test's function."""

    def __init__(self, finish):
        self.finish_as, self.logged, self.summary, self.name = finish, 0, {}, "x"

    def define_metric(self, *_, **__):
        return None

    def log(self, *_, **__):
        self.logged += 1
        raise wandb.errors.CommError("gone")

    def finish(self, exit_code=0):
        self.finish_as()


def raises():
    raise ConnectionError("gone too")


def test_errors_while_logging_and_at_the_end_are_said_once(tmp_path, monkeypatch, capsys, shared_cache):
    monkeypatch.setenv("HFTLIGHT_CACHE", shared_cache)
    wandb_runs = []
    for module in ("stage", "wandb"):
        start = f"hftlight.runs.logging.{module}.start_wandb"
        monkeypatch.setattr(start, lambda *_: wandb_runs.append(Failing(raises)) or wandb_runs[-1])
    result = run(config(tmp_path, logger="wandb", baseline=False))
    assert (result.folder / "report.html").is_file()
    assert [m.logged for m in wandb_runs] == [1, 1, 1, 1]  # base, two stages, summary
    out = capsys.readouterr().out
    assert out.count("while a stage was logged (CommError: gone)") == 3
    assert out.count("ConnectionError: gone too") == 4
    assert loggers._lost.is_set()


def test_an_end_that_hangs_is_not_waited_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loggers, "FINISH_SECONDS", -0.9)
    loggers.finish_wandb(Failing(threading.Event().wait), tmp_path)
    assert capsys.readouterr().out.count("no answer within") == 1
    assert loggers._lost.is_set()


def test_after_a_wandb_that_did_not_answer_nothing_waits_for_it_again(tmp_path, monkeypatch):
    modes = []
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(wandb, "api", type("Api", (), {"api_key": "k" * 40})(), raising=False)
    monkeypatch.setattr(wandb, "init", lambda mode=None, **_: modes.append(mode) or Failing(raises))
    loggers._lost.set()
    start_wandb(tmp_path, {"comparison": "c", "stage": "base"}, {})
    loggers._lost.clear()
    start_wandb(tmp_path, {"comparison": "c", "stage": "base"}, {})
    assert modes == ["offline", None]
