"""Defenses by name: two classes of one name, two names of one class, and classes that nobody registered."""

from importlib.metadata import EntryPoint

import pytest

from hftlight import registry
from hftlight.defenses import L2SP, Booster
from hftlight.errors import InputError
from hftlight.registry import called, defense_class, defenses, made, name_of


class Vaccine(Booster):
    """Has the name of a built-in class and is another one."""


@pytest.fixture
def offered(monkeypatch):
    """Let another package offer this file's class under two names."""
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
        """Local, and named like a built-in one."""

    assert name_of(Booster()).startswith("tests_test_registry_")
    assert name_of(Booster()) not in defenses()


def test_every_built_in_defense_goes_by_its_name():
    for name in defenses():
        assert name_of(defense_class(name)()) == name


def test_unknown_names_get_the_nearest():
    with pytest.raises(InputError, match="did you mean 'booster'"):
        made("bosster")
