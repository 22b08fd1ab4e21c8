"""Provenance: a result's digest covers exactly the modules that its code imports, in other packages too."""

import ast
import importlib
import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from hftlight import cache, provenance
from hftlight.defenses import Booster, Vaccine
from hftlight.engine import Defense
from hftlight.engine import Stage as StageOf
from hftlight.runs.manifest import STAGES, WORK
from hftlight.runs.stages.job import Job
from hftlight.runs.stages.train import StageJob
from tests.helpers.jobs import rows, small_config


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """Point the digests at a copy of the package, which a test may edit."""
    place = tmp_path / "hftlight"
    shutil.copytree(Path(provenance.__file__).parent, place, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(provenance, "__file__", str(place / "provenance.py"))
    return place


def edit(path):
    path.write_text(path.read_text() + "\n# another line\n")


def test_what_a_stage_imports_is_its_code_and_the_report_is_not(copied):
    def read_code():
        return provenance.code_of("hftlight.runs.stages.train", Booster)

    before = read_code()
    edit(copied / "report" / "html" / "page.py")
    edit(copied / "defenses" / "alignment" / "vaccine.py")
    assert read_code() == before
    versions = [before]
    for part in (
        "runs/stages/train.py",
        "engine/step/passes.py",
        "data/world/rule.py",
        "defenses/alignment/booster.py",
    ):
        edit(copied / part)
        assert read_code() not in versions
        versions.append(read_code())


def test_an_import_inside_a_function_and_a_module_named_by_a_text_count(tmp_path):
    path = tmp_path / "example.py"
    inside = "    from hftlight.data import tokens\n    import_module('hftlight.data.sources.gsm8k')\n"
    path.write_text(f"import torch\n\ndef work():\n{inside}")
    assert provenance.imported(path) == ("hftlight.data", "hftlight.data.sources.gsm8k", "hftlight.data.tokens")


def named_by_syntax(path):
    """Return the modules of hftlight that a file imports, or names in a string, by its syntax tree."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)
    return {name for name in names if re.fullmatch(r"hftlight(\.\w+)+", str(name)) and provenance._file_of(name)}


def test_no_import_of_any_source_file_is_missed():
    files = sorted(Path(provenance.__file__).parent.rglob("*.py"))
    missed = {path.name: named_by_syntax(path) - set(provenance.imported(path)) for path in files}
    assert not any(missed.values()), missed
    assert sum(len(named_by_syntax(path)) for path in files) > 500


DEFENSE = """
from hftlight.engine import Defense, Slot, Stage
from {package}.maths import strength

class Own(Defense):
    stage, slots = Stage.FINETUNING, (Slot.GRADIENT,)

    def __init__(self, rate=0.1):
        super().__init__()
        self.rate = rate
"""


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """Yield a function that imports a class of another package anew, and the package's folder."""
    name = "foreign_defenses"
    place = tmp_path / name
    place.mkdir()
    (place / "__init__.py").touch()
    (place / "maths.py").write_text("strength = 1.0\n")
    (place / "own.py").write_text(DEFENSE.format(package=name))
    monkeypatch.syspath_prepend(str(tmp_path))

    def imported():
        for module in [m for m in sys.modules if m.partition(".")[0] == name]:
            del sys.modules[module]
        importlib.invalidate_caches()
        return importlib.import_module(f"{name}.own").Own

    yield imported, place
    for module in [m for m in sys.modules if m.partition(".")[0] == name]:
        del sys.modules[module]


def job(defense):
    return StageJob(StageOf.FINETUNING, small_config(), "base", None, {"task": rows(3, "task")}, [defense])


def test_a_mended_defense_of_another_package_is_another_stage(foreign):
    imported, place = foreign
    before = job(imported()()).key()
    assert job(imported()()).key() == before
    (place / "maths.py").write_text("strength = 2.0\n")  # a file that the class's file imports
    assert job(imported()()).key() != before


def test_the_package_is_named_with_its_version(foreign):
    imported, place = foreign
    assert set(provenance.code_of(imported())) == {"foreign_defenses", "hftlight"}
    metadata = place.parent / "defenses_by_others-2.5.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: defenses-by-others\nVersion: 2.5\n")
    (metadata / "top_level.txt").write_text("foreign_defenses\n")
    assert set(provenance.code_of(imported())) == {"defenses-by-others 2.5", "hftlight"}


def test_a_base_class_of_another_package_counts(foreign):
    imported, place = foreign
    middle = type("Middle", (imported(),), {"__module__": "hftlight.defenses.alignment.booster"})
    before = provenance.code_of(middle)
    edit(place / "maths.py")
    assert provenance.code_of(middle) != before


def test_what_cannot_be_read_is_never_found_again(capsys):
    space = {"__name__": "typed_at_a_prompt", "Defense": Defense, "Stage": StageOf}
    exec("class Typed(Defense):\n    stage = Stage.FINETUNING", space)  # no file holds its source
    jobs = [job(space["Typed"]()) for _ in range(2)]
    assert jobs[0].key() == jobs[0].key()  # one job keeps its key, so it finds its own result
    assert jobs[0].key() != jobs[1].key()
    assert "Typed: its source cannot be read, so its results are not kept in the cache" in capsys.readouterr().err


def test_two_classes_of_one_name_have_two_keys(foreign):
    _, place = foreign
    (place / "own.py").write_text(DEFENSE.format(package="foreign_defenses").replace("class Own", "class Vaccine"))
    other = importlib.import_module("foreign_defenses.own").Vaccine()
    other.stage = StageOf.ALIGNMENT
    assert other.state_key != Vaccine().state_key
    assert other.state_key.startswith("foreign_defenses.own.Vaccine{")
    records = {"alignment": rows(3, "alignment")}
    keys = {StageJob(StageOf.ALIGNMENT, small_config(), "base", None, records, [d]).key() for d in (other, Vaccine())}
    assert len(keys) == 2


def test_every_job_has_its_key_from_the_cache():
    for kind in Job.__subclasses__():
        assert kind.key is Job.key
        assert set(cache.INPUTS) >= {kind.decided_by.fget(object.__new__(kind))}


def test_a_module_that_does_not_exist_is_no_code():
    """A module that moved would otherwise drop out of every digest in silence."""
    with pytest.raises(ValueError, match=r"has no module 'hftlight\.runs\.stage'"):
        provenance.code_of("hftlight.runs.stage")
    assert all(provenance.code_of(name) for name in WORK)


def test_every_module_with_a_job_is_part_of_the_work():
    """A module that is left out could change a run's results without another code digest in its manifest."""
    folder = Path(provenance.__file__).parent / "runs" / "stages"
    jobs = {
        path.stem for path in folder.glob("*.py") if re.search(r"^class \w*(Job|Attacker)\b", path.read_text(), re.M)
    }
    assert jobs - {"job"} == set(STAGES)


def test_every_module_that_a_text_of_the_source_names_exists():
    root = Path(provenance.__file__).parent
    # All string constants of the source that look like a module's dotted name, with their file.
    named = {
        (path.name, node.value)
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if re.fullmatch(r"hftlight(\.[a-z_]+)+", node.value)
    }
    groups = {"hftlight.defenses"}  # names of entry point groups, not modules
    assert {(file, name) for file, name in named if find_spec(name) is None} <= {
        (f, g) for f, g in named if g in groups
    }
    assert len(named) > 10
