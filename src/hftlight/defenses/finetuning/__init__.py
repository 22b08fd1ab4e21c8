"""Defenses that act while a user's upload fine-tunes the aligned model."""

from hftlight.defenses.finetuning.bea import BEA
from hftlight.defenses.finetuning.constrained_sft import ConstrainedSFT, constraint_weights
from hftlight.defenses.finetuning.ewc import EWC, ewc_term
from hftlight.defenses.finetuning.freeze import Freeze
from hftlight.defenses.finetuning.kl import KL, divergence
from hftlight.defenses.finetuning.l2_sp import L2SP, l2_sp_term
from hftlight.defenses.finetuning.larf import LARF, paired_scores
from hftlight.defenses.finetuning.ldifs import LDIFS, feature_distance
from hftlight.defenses.finetuning.lisa import Lisa, proximal_pull, update_pull
from hftlight.defenses.finetuning.mllr import MLLR
from hftlight.defenses.finetuning.ptst import PTST
from hftlight.defenses.finetuning.safety_mix import SafetyMix
from hftlight.defenses.finetuning.saft import SAFT, leading_directions, spectral_scores
from hftlight.defenses.finetuning.seal import SEAL, learned_logits, one_step_scores, row_weights, weighted_loss
from hftlight.defenses.finetuning.sppft import SPPFT

__all__ = [
    "BEA",
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
    "ConstrainedSFT",
    "Freeze",
    "Lisa",
    "SafetyMix",
    "constraint_weights",
    "divergence",
    "ewc_term",
    "feature_distance",
    "l2_sp_term",
    "leading_directions",
    "learned_logits",
    "one_step_scores",
    "paired_scores",
    "proximal_pull",
    "row_weights",
    "spectral_scores",
    "update_pull",
    "weighted_loss",
]
