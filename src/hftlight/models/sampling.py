"""Sampled answers of a model, with a seed."""

from collections.abc import Sequence
from typing import Any

import torch

from hftlight.data.tokens import padding_id
from hftlight.engine.step.passes import same_random_state


def sampled(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    batch_size: int = 8,
) -> list[str]:
    """Return one sampled answer to each prompt, without special tokens and outer white space.

    The answers are the same for the same seed, batch size and device. The random state is restored.

    Args:
        model: a causal LM. Its mode is restored.
        tokenizer: decodes the answers.
        prompts: token ids of each prompt, template and BOS included.
        max_new_tokens: longest answer, in tokens, >= 1.
        temperature: divisor of the logits, > 0.
        top_p: probability mass of the tokens that are sampled from, in (0, 1].
        seed: seed of the samples.
        batch_size: prompts per batch, >= 1.
    """
    device, pad, texts = next(model.parameters()).device, padding_id(tokenizer), list[str]()
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), same_random_state(device):
            torch.manual_seed(seed)
            for start in range(0, len(prompts), batch_size):
                rows = prompts[start : start + batch_size]
                width = max(map(len, rows))
                ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
                mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
                output = model.generate(
                    input_ids=ids, attention_mask=mask, do_sample=True, temperature=temperature, top_p=top_p, top_k=0,
                    max_new_tokens=max_new_tokens, pad_token_id=pad, eos_token_id=tokenizer.eos_token_id,
                )  # fmt: skip
                texts += [text.strip() for text in tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)]
    finally:
        model.train(training)
    return texts
