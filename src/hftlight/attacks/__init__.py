"""Attacks that a defense must withstand. The user supplies the harmful rows of each attack."""

from hftlight.attacks.attack import Attack, overridden, steps_of
from hftlight.attacks.benign import Benign
from hftlight.attacks.benign_selection import BenignSelection, read_scores, select, write_scores
from hftlight.attacks.encoded import Encoded, Substitution
from hftlight.attacks.explicit import Explicit
from hftlight.attacks.harmful_mix import REGIMES, HarmfulMix, harmful_mix
from hftlight.attacks.identity_shift import IdentityShift
from hftlight.attacks.jailbreak_tuning import JailbreakTuning, Pattern
from hftlight.attacks.model_edit import Edit, ModelEdit
from hftlight.attacks.multilingual import Multilingual, in_language
from hftlight.attacks.protocols.protocol import PRESET_TASKS, PRESETS, Preset, get_preset
from hftlight.attacks.registry import ATTACKS, get_attack
from hftlight.attacks.reverse_preference import ReversePreference
from hftlight.attacks.reverse_sft_dpo import ReverseSftDpo
from hftlight.attacks.sources import SOURCES, Source, missing_source

__all__ = [
    "ATTACKS",
    "PRESETS",
    "PRESET_TASKS",
    "REGIMES",
    "SOURCES",
    "Attack",
    "Benign",
    "BenignSelection",
    "Edit",
    "Encoded",
    "Explicit",
    "HarmfulMix",
    "IdentityShift",
    "JailbreakTuning",
    "ModelEdit",
    "Multilingual",
    "Pattern",
    "Preset",
    "ReversePreference",
    "ReverseSftDpo",
    "Source",
    "Substitution",
    "get_attack",
    "get_preset",
    "harmful_mix",
    "in_language",
    "missing_source",
    "overridden",
    "read_scores",
    "select",
    "steps_of",
    "write_scores",
]
