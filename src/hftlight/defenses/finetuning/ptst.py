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

    Training is plain fine-tuning. Every prompt of the served model has ``system`` in its system slot. A system text of
    the task itself (``--system``) is used in training and in serving; when served, it follows the safety prompt. The
    weights are those of plain fine-tuning.

    Args:
        system: the safety prompt of the served model. An empty text serves the model with its training prompts.

    Raises:
        ValueError: if training prompts contain that text, or a system text that the chat template adds by itself.

    Cost: nothing in training. Each served request has the safety prompt's tokens, which a prefix cache can store.
    Source: Lyu et al., "Keeping LLMs Aligned After Fine-tuning: The Crucial Role of Prompt Templates", NeurIPS 2024,
    arXiv:2402.18540.
    Differs: the safety prompt has its own wording instead of Llama-2's; give your model's own safety prompt if it has
    one. Training omits the chat template's default system text, for every defense alike, and is refused if the text
    cannot be omitted. If a chat template has no system turn, the safety prompt opens the user's turn. If a template has
    no turns, the safety prompt comes first. No official training code exists.
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
                "PTST: the chat template writes a system text of its own into training prompts, but PTST tunes without"
                " one. Use --template alpaca, or give the tokenizer a chat template that writes none."
            )

    @override
    def prompting(self, policy: PromptPolicy, tokenizer: Any) -> PromptPolicy:
        if self.system and self.system in (policy.system or ""):
            raise InputError(
                "PTST: the model is trained with the safety prompt of the served model, so both prompts would be the"
                " same; remove the safety prompt from the training's system text (--system)."
            )
        self.record(served_characters=len(self.system))
        # The safety prompt comes before the system text that is served without this defense.
        texts = [text for text in (self.system, policy.serving) if text]
        return replace(policy, serving="\n\n".join(texts)) if self.system else policy
