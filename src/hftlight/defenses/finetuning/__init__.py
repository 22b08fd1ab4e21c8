"""Defenses that act while a user's upload fine-tunes the aligned model."""

from hftlight.defenses.finetuning.alright import ALRIGHT
from hftlight.defenses.finetuning.bea import BEA
from hftlight.defenses.finetuning.constrained_sft import ConstrainedSFT, constraint_weights
from hftlight.defenses.finetuning.ewc import EWC, ewc_term
from hftlight.defenses.finetuning.freeze import Freeze
from hftlight.defenses.finetuning.freeze_plus import FreezePlus, UnitGroups, importance_ranks, unit_groups
from hftlight.defenses.finetuning.kl import KL
from hftlight.defenses.finetuning.l2_sp import L2SP, l2_sp_term
from hftlight.defenses.finetuning.larf import LARF, paired_scores
from hftlight.defenses.finetuning.ldifs import LDIFS, feature_distance
from hftlight.defenses.finetuning.lisa import Lisa, proximal_pull, update_pull
from hftlight.defenses.finetuning.maxright import MAXRIGHT
from hftlight.defenses.finetuning.mllr import MLLR
from hftlight.defenses.finetuning.moderation_filter import ModerationFilter
from hftlight.defenses.finetuning.panacea import Panacea, panacea_term
from hftlight.defenses.finetuning.ptst import PTST
from hftlight.defenses.finetuning.sa_lora import SaLoRA
from hftlight.defenses.finetuning.safe_grad import SafeGrad, surgery
from hftlight.defenses.finetuning.safety_mix import SafetyMix
from hftlight.defenses.finetuning.saft import SAFT, leading_directions, spectral_scores
from hftlight.defenses.finetuning.seal import SEAL, learned_logits, one_step_scores, row_weights, weighted_loss
from hftlight.defenses.finetuning.sppft import SPPFT
from hftlight.engine.divergence import divergence

__all__ = [
    "ALRIGHT",
    "BEA",
    "EWC",
    "KL",
    "L2SP",
    "LARF",
    "LDIFS",
    "MAXRIGHT",
    "MLLR",
    "PTST",
    "SAFT",
    "SEAL",
    "SPPFT",
    "ConstrainedSFT",
    "Freeze",
    "FreezePlus",
    "Lisa",
    "ModerationFilter",
    "Panacea",
    "SaLoRA",
    "SafeGrad",
    "SafetyMix",
    "UnitGroups",
    "constraint_weights",
    "divergence",
    "ewc_term",
    "feature_distance",
    "importance_ranks",
    "l2_sp_term",
    "leading_directions",
    "learned_logits",
    "one_step_scores",
    "paired_scores",
    "panacea_term",
    "proximal_pull",
    "row_weights",
    "spectral_scores",
    "surgery",
    "unit_groups",
    "update_pull",
    "weighted_loss",
]
