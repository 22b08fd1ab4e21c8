"""Defenses that act while the model owner aligns the model, before any user's upload."""

from hftlight.defenses.alignment.booster import Booster, booster_term
from hftlight.defenses.alignment.ctrl import CTRL, curated, reading_ease
from hftlight.defenses.alignment.repnoise import RepNoise, discrepancy
from hftlight.defenses.alignment.rsn_tune import RSNTune
from hftlight.defenses.alignment.t_vaccine import TVaccine
from hftlight.defenses.alignment.tar import TAR, step_weights
from hftlight.defenses.alignment.vaccine import Vaccine

__all__ = [
    "CTRL",
    "TAR",
    "Booster",
    "RSNTune",
    "RepNoise",
    "TVaccine",
    "Vaccine",
    "booster_term",
    "curated",
    "discrepancy",
    "reading_ease",
    "step_weights",
]
