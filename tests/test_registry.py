"""Defenses by name: two classes of one name, two names of one class, and unregistered classes."""

import re
from importlib.metadata import EntryPoint

import pytest

from hftlight import registry
from hftlight.cli.train import train
from hftlight.defenses import L2SP, Booster
from hftlight.errors import InputError
from hftlight.registry import called, defense_class, defenses, made, name_of


class Vaccine(Booster):
    """Shares the name of a built-in class, but is a different class."""


@pytest.fixture
def offered(monkeypatch):
    """Register this file's class under two names, as another package would."""
    points = [EntryPoint(name, f"{__name__}:Vaccine", registry.GROUP) for name in ("other_vaccine", "vaccine_again")]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    defenses.cache_clear()
    yield
    defenses.cache_clear()


def test_a_class_of_a_built_in_name_keeps_its_own(offered):
    assert name_of(Vaccine()) == "other_vaccine"
    assert name_of(defense_class("vaccine")()) == "vaccine"
    assert defense_class("other_vaccine") is Vaccine


def test_two_names_of_one_class_stay_apart(offered):
    one, two = made("other_vaccine", lam=1.0), made("vaccine-again", lam=2.0)
    assert [name_of(one), name_of(two)] == ["other_vaccine", "vaccine_again"]
    assert [name_of(called(Booster(), "booster")), name_of(Booster())] == ["booster", "booster"]


def test_an_unregistered_class_takes_nobodys_name():
    assert name_of(Vaccine()) == "tests_test_registry_vaccine"
    assert name_of(L2SP()) == "l2_sp"

    class Booster(Vaccine):
        """A local class with the name of a built-in class."""

    assert name_of(Booster()).startswith("tests_test_registry_")
    assert name_of(Booster()) not in defenses()


def test_every_built_in_defense_goes_by_its_name():
    for name in defenses():
        assert name_of(defense_class(name)()) == name


def test_unknown_names_get_the_nearest():
    with pytest.raises(InputError, match="did you mean 'booster'"):
        made("bosster")


# Defenses of other packages.


class Keeps(Booster):
    """Stores no attribute for its argument."""

    def __init__(self, strength: float = 1.0) -> None:
        super().__init__()


NO_DEFENSE = 5


class NotOne:
    """Is no subclass of ``Defense``."""


def offer(monkeypatch, name, value):
    monkeypatch.setattr(registry, "entry_points", lambda group: [EntryPoint(name, value, registry.GROUP)])
    defenses.cache_clear()


@pytest.fixture
def clean():
    yield
    defenses.cache_clear()


@pytest.mark.parametrize("asked", ["my-booster", "my_booster", "My-Booster"])
def test_a_name_with_hyphens_and_capitals_is_found(clean, monkeypatch, asked):
    offer(monkeypatch, "My-Booster", f"{__name__}:Vaccine")
    assert name_of(made(asked)) == "my_booster"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("seed", f"{__name__}:Vaccine", "--seed is an option of hftlight"),
        ("none", f"{__name__}:Vaccine", "--none is an option of hftlight"),
        ("5 %", f"{__name__}:Vaccine", "a name must be letters, digits and hyphens"),
        ("lisa", f"{__name__}:Vaccine", "Two packages offer a defense 'lisa'"),
        ("mine", "no_such_package:Mine", "cannot be imported: ModuleNotFoundError"),
        ("mine", "broken_plugin:Mine", "cannot be imported: SyntaxError"),
        ("mine", f"{__name__}:Missing", "cannot be imported: AttributeError.*Missing"),
        ("mine", f"{__name__}:NotOne", "is no subclass of hftlight.engine.Defense"),
        ("mine", f"{__name__}:NO_DEFENSE", "is no subclass of hftlight.engine.Defense"),
        ("mine", f"{__name__}:Keeps", "keeps no attribute for one of its arguments .*strength"),
    ],
)
def test_a_plugin_that_cannot_work_is_told_in_a_sentence(clean, monkeypatch, tmp_path, capsys, name, value, message):
    (tmp_path / "broken_plugin.py").write_text("def (\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    offer(monkeypatch, name, value)
    assert train(["--defense", name if name.isalpha() else "lisa", "--model", "tiny", "--dry_run"]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert len(error.splitlines()) == 1
