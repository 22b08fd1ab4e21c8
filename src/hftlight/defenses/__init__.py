"""The defenses, grouped by the stage in which they act."""

from hftlight.defenses.alignment import CTRL, TAR, Booster, RepNoise, RSNTune, TVaccine, Vaccine
from hftlight.defenses.finetuning import (
    ALRIGHT,
    BEA,
    EWC,
    KL,
    L2SP,
    LDIFS,
    MAXRIGHT,
    MLLR,
    PTST,
    SPPFT,
    ConstrainedSFT,
    Freeze,
    Lisa,
    SafeGrad,
    SafetyMix,
)
from hftlight.defenses.post_finetuning import Antidote, Rewind, SafeLoRA

__all__ = [
    "ALRIGHT",
    "BEA",
    "CTRL",
    "EWC",
    "KL",
    "L2SP",
    "LDIFS",
    "MAXRIGHT",
    "MLLR",
    "PTST",
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
    "SafeGrad",
    "SafeLoRA",
    "SafetyMix",
    "TVaccine",
    "Vaccine",
]
