"""A study: its parts are measured once, it goes on after a stop, and an analysis that cannot work stops no other."""

from collections import Counter
from dataclasses import dataclass

import pytest

from hftlight.analysis.analysis import Analysis, Picture, Row
from hftlight.analysis.page import write_study
from hftlight.analysis.registry import ANALYSES, analysis_class
from hftlight.analysis.study import sets_of, study
from hftlight.analysis.subjects import plain_subjects, runs_in, short_names, subjects_of_run
from hftlight.analysis.view import View
from hftlight.attacks import HarmfulMix
from hftlight.config import Evaluation, RunConfig
from hftlight.errors import InputError
from hftlight.files import read_rows, remove, write_json
from hftlight.model_files import model_path
from hftlight.report.figure import canvas

calls: Counter[str] = Counter()
CONFIG = RunConfig(
    model="tiny", accelerator="cpu", evaluation=Evaluation(prompts=4, over_refusal_prompts=4, task_rows=4)
)


@dataclass(frozen=True)
class Halves(Analysis):
    """Search for a number by halving an interval.

    Args:
        broken: part that stops the study.
    """

    broken: float | None = None

    def parts(self, known, view):
        at = [row.value for rows in known.values() for row in rows]
        return [{"at": 0.0}, {"at": 1.0}] if len(at) < 2 else [{"at": 0.5}]

    def measure(self, part, view):
        if part["at"] == self.broken:
            raise KeyboardInterrupt
        calls[f"{view.subject.model} {part['at']}"] += 1
        return [Row("place", part["at"], 0.0, 1.0, layer=1, position=part["at"])]

    def pictures(self, rows):
        yield Picture("halves", "Halves", "A caption.", canvas(1, height=2)[0])


@dataclass(frozen=True)
class Compared(Halves):
    """Needs the aligned model."""

    compares = True


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own(monkeypatch, cache_folder):
    """One cache for the model, without the analyses of other tests."""
    monkeypatch.setenv("HFTLIGHT_CACHE", str(cache_folder))
    remove([cache_folder / "analyses"])
    monkeypatch.setitem(ANALYSES, "halves", "Halves")
    monkeypatch.setitem(ANALYSES, "compared", "Compared")
    calls.clear()


def tiny(reference=None):
    return plain_subjects(["tiny"], CONFIG, reference)


def test_parts_are_measured_once_and_later_rounds_follow_earlier_ones():
    done = study(tiny(), [Halves()])
    assert [row.value for row in done.rows["halves"]] == [0.0, 1.0, 0.5]
    assert {row.model for row in done.rows["halves"]} == {"tiny"}
    assert study(tiny(), [Halves()]).rows == done.rows
    assert calls == {"tiny 0.0": 1, "tiny 1.0": 1, "tiny 0.5": 1}


def test_a_stopped_study_goes_on(monkeypatch):
    real = Halves.measure
    monkeypatch.setattr(Halves, "measure", lambda self, part, view: real(Halves(broken=0.5), part, view))
    with pytest.raises(KeyboardInterrupt):
        study(tiny(), [Halves()])
    monkeypatch.setattr(Halves, "measure", real)
    assert len(study(tiny(), [Halves()]).rows["halves"]) == 3
    assert calls == {"tiny 0.0": 1, "tiny 1.0": 1, "tiny 0.5": 1}


def test_an_analysis_without_its_reference_is_a_note(tmp_path):
    done = study(tiny(), [Compared(), Halves()])
    assert (len(done.rows["compared"]), len(done.rows["halves"])) == (0, 3)
    assert "no aligned model beside it" in done.notes["compared"][0]
    text = write_study(done, tmp_path / "out", "title").read_text()
    assert "no aligned model beside it" in text
    assert (tmp_path / "out" / "figures" / "halves.png").is_file()
    assert read_rows(tmp_path / "out" / "analysis.jsonl")[0] == {
        "analysis": "halves", "metric": "place", "value": 0.0, "low": 0.0, "high": 1.0, "layer": 1, "position": 0.0,
        "model": "tiny", "stage": "",
    }  # fmt: skip
    with pytest.raises(InputError, match="Nothing was measured"):
        study(tiny(), [Compared()])
    assert len(study(tiny("tiny"), [Compared()]).rows["compared"]) == 3


def test_the_reference_of_the_aligned_model_is_the_model_itself():
    with View(tiny("tiny")[0], sets_of(tiny()[0])) as view:
        assert view.reference is view.model
        assert len(view.prompts("harmful", 3)) == 3
        with pytest.raises(InputError, match="refuses 0 of 8 prompts"):
            view.openings(4)


def write_run(folder):
    """Write a run of two arms that share their aligned model."""
    arms = ("booster", "none")
    folder.mkdir()
    write_json(folder / "manifest.json", {"arms": {arm: {} for arm in arms}})
    for place in ("none/aligned", "booster/aligned"):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).symlink_to(model_path("tiny"))
    return folder


def test_a_model_that_arms_share_is_listed_once(tmp_path):
    run = write_run(tmp_path / "run")
    assert runs_in(str(run)) == [run]
    assert runs_in("tiny") is None
    config = RunConfig(model="tiny", accelerator="cpu")
    config.alignment.steps = 0
    found = subjects_of_run(run, config, HarmfulMix())
    assert [(s.model, s.stage) for s in found] == [("none", "alignment")]
    assert found[0].reference is not None
    with pytest.raises(InputError, match="no model of the stages finetuning"):
        subjects_of_run(run, config, HarmfulMix(), ["finetuning"])


def test_names_of_plain_models_tell_them_apart():
    assert short_names(["a/x/m", "a/y/m"]) == ["x/m", "y/m"]
    assert short_names(["a/x", "b/y", "tiny"]) == ["x", "y", "tiny"]


def test_unknown_analyses_are_refused_with_the_nearest_name():
    with pytest.raises(InputError, match="Did you mean 'tone'"):
        analysis_class("tones")


@pytest.mark.parametrize("name", ANALYSES)
def test_every_analysis_is_documented(name):
    kind = analysis_class(name)
    assert kind.name() == name
    doc = kind.__doc__ or ""
    assert len(doc.partition("\n")[0]) <= 110
    assert all(f"    {word}:" in doc for word in ("Cost", "Source"))
