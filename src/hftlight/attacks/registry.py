"""The attacks by name. Code that needs torch is imported only when it runs."""

from difflib import get_close_matches

from hftlight.attacks.attack import Attack
from hftlight.attacks.benign import Benign
from hftlight.attacks.benign_selection import BenignSelection
from hftlight.attacks.encoded import Encoded
from hftlight.attacks.explicit import Explicit
from hftlight.attacks.harmful_mix import HarmfulMix
from hftlight.attacks.identity_shift import IdentityShift
from hftlight.attacks.jailbreak_tuning import JailbreakTuning
from hftlight.attacks.model_edit import ModelEdit
from hftlight.attacks.multilingual import Multilingual
from hftlight.attacks.reverse_preference import ReversePreference
from hftlight.attacks.reverse_sft_dpo import ReverseSftDpo
from hftlight.errors import InputError

ATTACKS: dict[str, type[Attack]] = {
    "harmful_mix": HarmfulMix,
    "explicit": Explicit,
    "identity_shift": IdentityShift,
    "benign": Benign,
    "encoded": Encoded,
    "jailbreak_tuning": JailbreakTuning,
    "multilingual": Multilingual,
    "benign_selection": BenignSelection,
    "reverse_preference": ReversePreference,
    "reverse_sft_dpo": ReverseSftDpo,
    "model_edit": ModelEdit,
}


def get_attack(name: str) -> type[Attack]:
    """Return the class of an attack. Hyphens count as underscores.

    Raises:
        InputError: if no attack has that name. The message suggests the nearest name.
    """
    key = name.replace("-", "_").lower()
    if key not in ATTACKS:
        near = get_close_matches(key, ATTACKS, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise InputError(f"Unknown attack {name!r}{hint} Known: {', '.join(ATTACKS)}.")
    return ATTACKS[key]
