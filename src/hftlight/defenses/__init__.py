"""The defenses, grouped by the stage in which they act."""

from hftlight.defenses.alignment import CTRL, TAR, Booster, RepNoise, RSNTune, TVaccine, Vaccine
from hftlight.defenses.finetuning import (
    BEA,
    EWC,
    KL,
    L2SP,
    LARF,
    LDIFS,
    MLLR,
    PTST,
    SAFT,
    SEAL,
    SPPFT,
    ConstrainedSFT,
    Freeze,
    Lisa,
    SafetyMix,
)
from hftlight.defenses.post_finetuning import Antidote, Rewind, SafeLoRA

__all__ = [
    "BEA",
    "CTRL",
    "EWC",
    "KL",
    "L2SP",
    "LARF",
    "LDIFS",
    "MLLR",
    "PTST",
    "SAFT",
    "SEAL",
    "SPPFT",
    "TAR",
    "Antidote",
    "Booster",
    "ConstrainedSFT",
    "Freeze",
    "Lisa",
    "RSNTune",
    "RepNoise",
    "Rewind",
    "SafeLoRA",
    "SafetyMix",
    "TVaccine",
    "Vaccine",
]
