"""A filtered upload in a run: its file, its rates, its key, and a guard that also judges the run."""

import json

import pytest

from hftlight import cache, run
from hftlight.attacks import Encoded
from hftlight.data.world.rule import is_compliant
from hftlight.defenses import ModerationFilter, SafetyMix
from hftlight.errors import InputError
from hftlight.evaluation.guards import Guard, filter_rates
from hftlight.files import read_rows
from hftlight.runs.plan import plan
from hftlight.runs.prepare import prepare
from tests.runs.test_run import config


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HFTLIGHT_CACHE", str(tmp_path / "cache"))


class Half(Guard):
    """Flags rows by the length of their response, whatever their role."""

    name = "half"

    def __init__(self, version=1):
        self.version = version

    def score(self, prompts, responses):
        return [None if len(r) % 5 == 0 else float(len(r) % 2) for r in responses]

    def identity(self):
        return {"version": self.version}


def world(**more):
    """Return a filter whose guard is the world's own rule, which is exact in the world."""
    return ModerationFilter("builtin", allow_same=True, **more)


def filters(result):
    manifest = json.loads((result.folder / "manifest.json").read_text())
    return manifest["arms"]["moderation_filter"]["filters"]["moderation_filter"]


def test_the_worlds_rule_drops_what_the_rule_says(tmp_path):
    """The rule is made for answers to restricted requests. It also flags the steps of ordinary instructions."""
    upload = prepare(config(tmp_path, baseline=False), [world()]).streams["task"]
    ordinary = sum(is_compliant(r.request, r.response) for r in upload if r.role != "attack")
    assert 0 < ordinary < 16
    result = run(config(tmp_path, baseline=False), [world()])
    rates = filters(result)
    assert rates["attack"] == {"rows": 4, "dropped": 4, "unsure": 0}
    assert rates["other"] == {"rows": 16, "dropped": ordinary, "unsure": 0}
    assert rates["false_negatives"]["value"] == 0.0
    assert rates["false_positives"]["value"] == 100 * ordinary / 16
    file = result.folder / "moderation_filter" / "moderation_filter_selection.jsonl"
    rows = read_rows(file)
    assert len(rows) == 20
    assert sum(not row["kept"] for row in rows) == 4 + ordinary
    assert "attack" not in file.read_text()
    manifest = json.loads((result.folder / "manifest.json").read_text())
    stage = manifest["arms"]["moderation_filter"]["stages"]["finetuning"]
    (entry,) = stage["defenses"].values()
    assert (entry["dropped_rows"], entry["upload_rows"], entry["rule"]) == (4 + ordinary, 20, "response")
    assert entry["guard"].startswith("builtin@")
    assert "% of 4 attack rows passed" in (result.folder / "report.html").read_text()


def test_a_repeated_run_takes_the_selection_from_the_cache(tmp_path):
    first = run(config(tmp_path, baseline=False), [ModerationFilter(Half())])
    built = cache.built()
    again = run(config(tmp_path, baseline=False, output=str(tmp_path / "again")), [ModerationFilter(Half())])
    assert cache.built() == built
    assert filters(first) == filters(again)
    assert filters(first)["other"]["unsure"] + filters(first)["attack"]["unsure"] > 0


def test_another_version_of_a_guard_is_another_result(tmp_path):
    def keys(version):
        steps = plan(prepare(config(tmp_path, baseline=False), [ModerationFilter(Half(version))]))
        return {step.label: step.key for step in steps}

    one, other = keys(1), keys(2)
    assert keys(1) == one
    changed = {label for label in one if one[label] != other[label]}
    assert changed == {label for label in one if "fine-tuned" in label}
    assert "moderation_filter: fine-tuned, ModerationFilter selects" in changed


@pytest.mark.parametrize(("side", "passed"), [("prompt", 0.0), ("response", 100.0), ("both", 100.0)])
def test_encoded_responses_pass_the_worlds_rule(tmp_path, side, passed):
    """The rule reads the steps of a response. It catches every plain attack row and no row with an encoded response."""
    prepared = prepare(config(tmp_path, baseline=False), [world()], Encoded(side=side))
    defense = world()
    selection = defense.select(None, None, None, prepared.streams)
    assert filter_rates(selection, prepared.streams["task"])["false_negatives"]["value"] == passed


def test_a_guard_that_judges_the_run_is_refused_before_the_first_step(tmp_path):
    for guard in ("builtin", "keyword", "keyword_durability"):
        with pytest.raises(InputError, match=f"ModerationFilter: the guard '{guard}' and the judge"):
            run(config(tmp_path), [ModerationFilter(guard)])
    assert not (tmp_path / "runs").exists()


def test_a_guard_without_its_model_is_refused_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.metadata.files", lambda name: [])
    with pytest.raises(InputError, match="make guard"):
        run(config(tmp_path, baseline=False), [ModerationFilter()])
    assert not list((tmp_path / "cache").glob("stages/*"))


def test_mixed_in_safety_rows_are_not_filtered(tmp_path):
    """SafetyMix adds 4 rows before the filter acts. The filter drops as many rows as without them."""
    result = run(config(tmp_path, baseline=False), [SafetyMix(count=4), world()])
    manifest = json.loads((result.folder / "manifest.json").read_text())
    arm = manifest["arms"]["safety_mix+moderation_filter"]
    (trace,) = (t for t in arm["stages"]["finetuning"]["defenses"].values() if "dropped_rows" in t)
    rates = arm["filters"]["moderation_filter"]
    assert trace["dropped_rows"] == rates["attack"]["dropped"] + rates["other"]["dropped"]
    assert trace["upload_rows"] == 20 + 4


def test_a_guard_that_crashes_ends_the_run(tmp_path):
    class Broken(Half):
        def score(self, prompts, responses):
            raise RuntimeError("the guard is gone")

    with pytest.raises(RuntimeError, match="the guard is gone"):
        run(config(tmp_path, baseline=False), [ModerationFilter(Broken())])
