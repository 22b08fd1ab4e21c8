"""The defenses, grouped by the stage in which they act."""

from hftlight.defenses.alignment import CTRL, TAR, Booster, RepNoise, RSNTune, TVaccine, Vaccine
from hftlight.defenses.finetuning import (
    BEA,
    EWC,
    KL,
    L2SP,
    LDIFS,
    MLLR,
    PTST,
    SPPFT,
    ConstrainedSFT,
    Freeze,
    Lisa,
    ModerationFilter,
    SafetyMix,
)
from hftlight.defenses.post_finetuning import Antidote, Rewind, SafeLoRA

__all__ = [
    "BEA",
    "CTRL",
    "EWC",
    "KL",
    "L2SP",
    "LDIFS",
    "MLLR",
    "PTST",
    "SPPFT",
    "TAR",
    "Antidote",
    "Booster",
    "ConstrainedSFT",
    "Freeze",
    "Lisa",
    "ModerationFilter",
    "RSNTune",
    "RepNoise",
    "Rewind",
    "SafeLoRA",
    "SafetyMix",
    "TVaccine",
    "Vaccine",
]
