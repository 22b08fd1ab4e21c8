"""Defenses that repair a model after the user's fine-tuning."""

from hftlight.defenses.post_finetuning.antidote import Antidote
from hftlight.defenses.post_finetuning.nlsr import NLSR
from hftlight.defenses.post_finetuning.rewind import Rewind
from hftlight.defenses.post_finetuning.safe_lora import SafeLoRA
from hftlight.defenses.post_finetuning.safety_lock import SafetyLock

__all__ = ["NLSR", "Antidote", "Rewind", "SafeLoRA", "SafetyLock"]
