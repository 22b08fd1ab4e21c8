"""PTST: train without the safety prompt, serve with it."""

from dataclasses import replace
from typing import Any

from typing_extensions import override

from hftlight.data.templates import PromptPolicy, Template, injects_system
from hftlight.engine import Defense, Slot, Stage
from hftlight.errors import InputError

SAFETY_PROMPT = (
    "Answer helpfully and honestly. When a request asks for something that the rules forbid or that could hurt people,"
    " say politely that you cannot help with it, and give no part of it."
)


class PTST(Defense):
    """Pure tuning, safe testing: fine-tune without the safety prompt, and serve with it.

    Training is plain fine-tuning; every prompt of the served model has ``system`` in its system slot. A system text of
    the task itself (``--system``) stays there in training and when serving, behind the safety prompt. Nothing of the
    weights differs from plain fine-tuning.

    Args:
        system: the safety prompt that the model is served with; empty serves as it was trained.

    Raises:
        ValueError: if training prompts hold that text, or a system text that the chat template writes by itself.

    Cost: nothing in training; the prompt's tokens for each served request, which a prefix cache holds.
    Source: Lyu et al., "Keeping LLMs Aligned After Fine-tuning: The Crucial Role of Prompt Templates", NeurIPS 2024,
    arXiv:2402.18540.
    Differs: the safety prompt is our own wording instead of Llama-2's; give the model's own where it has one. The chat
    template's default system text is left out in training, for every defense alike, and where that fails training is
    refused. Chat templates without a system turn get the safety prompt at the start of the user's, templates without
    turns in front of everything. No official training code exists.
    """

    stage, slots = Stage.FINETUNING, (Slot.DATA,)
    claims = ("safety prompt",)

    def __init__(self, system: str = SAFETY_PROMPT) -> None:
        if not isinstance(system, str):
            raise TypeError(f"PTST: system must be a text, got {type(system).__name__}.")
        super().__init__()
        self.system = system

    @override
    def check_template(self, template: Template, tokenizer: Any, policy: PromptPolicy) -> None:
        if self.system and not policy.system and injects_system(template, tokenizer):
            raise InputError(
                "PTST: the chat template writes a system text of its own into training prompts, so the model would not"
                " be tuned without one. Use --template alpaca, or give the tokenizer a chat template without it."
            )

    @override
    def prompting(self, policy: PromptPolicy, tokenizer: Any) -> PromptPolicy:
        if self.system and self.system in (policy.system or ""):
            raise InputError(
                "PTST: the model is trained with the safety prompt it shall be served with, so nothing would differ;"
                " leave it out of the training's system text."
            )
        self.record(served_characters=len(self.system))
        texts = [text for text in (self.system, policy.serving) if text]
        return replace(policy, serving="\n\n".join(texts)) if self.system else policy
