"""The defenses, grouped by the stage in which they act."""

from hftlight.defenses.alignment import Booster, TVaccine, Vaccine
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
    SafetyMix,
)
from hftlight.defenses.post_finetuning import Antidote, Rewind, SafeLoRA

__all__ = [
    "BEA",
    "EWC",
    "KL",
    "L2SP",
    "LDIFS",
    "MLLR",
    "PTST",
    "SPPFT",
    "Antidote",
    "Booster",
    "ConstrainedSFT",
    "Freeze",
    "Lisa",
    "Rewind",
    "SafeLoRA",
    "SafetyMix",
    "TVaccine",
    "Vaccine",
]
