"""Defenses that repair a model after the user's fine-tuning."""

from hftlight.defenses.post_finetuning.antidote import Antidote
from hftlight.defenses.post_finetuning.nlsr import NLSR
from hftlight.defenses.post_finetuning.resta import RESTA
from hftlight.defenses.post_finetuning.rewind import Rewind
from hftlight.defenses.post_finetuning.safe_lora import SafeLoRA
from hftlight.defenses.post_finetuning.safety_lock import SafetyLock
from hftlight.defenses.post_finetuning.somf import SOMF
from hftlight.defenses.post_finetuning.task_arithmetic import TaskArithmetic

__all__ = ["NLSR", "RESTA", "SOMF", "Antidote", "Rewind", "SafeLoRA", "SafetyLock", "TaskArithmetic"]
