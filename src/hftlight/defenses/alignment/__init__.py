"""Defenses that act while the model owner aligns the model, before any upload."""

from hftlight.defenses.alignment.booster import Booster, booster_term

__all__ = ["Booster", "booster_term"]
