"""The defenses, filed by the stage they work in."""

from hftlight.defenses.alignment import Booster

__all__ = ["Booster"]
