"""Batched greedy decoding that gives the same answers as one prompt at a time."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hftlight.errors import InputError
from hftlight.evaluation.answering.inference import evaluating
from hftlight.models.load import embedding_rows, positions_of

STRIDE = 8  # tokens between two checks which rows have ended


@dataclass(frozen=True)
class Answer:
    """One answer of a model.

    Attributes:
        text: the answer without special tokens and outer white space.
        ids: the answer's token ids, without the one that ended it.
        ended: whether the answer ended by itself. Otherwise the token limit cut it off.
    """

    text: str
    ids: list[int]
    ended: bool


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    progress: Callable[[int], None] | None = None,
    stop: str = "",
) -> list[str]:
    """Return the text of the model's greedy answer to each prompt, up to ``stop``.

    The other arguments are those of ``answer``.
    """
    answers = answer(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress)
    return [up_to(each.text, stop) for each in answers]


def up_to(text: str, stop: str) -> str:
    """Return an answer up to the text that begins the next turn, such as a template's ``stop``.

    An empty ``stop`` cuts nothing.
    """
    return text.partition(stop)[0].strip() if stop else text


def answer(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Return the model's greedy answer to each prompt.

    Prompts of similar length share a batch. The longest prompts come first, so that a batch that does not fit in memory
    fails at once. Of the model's own ``generation_config`` only the end-of-sequence ids count, not the temperature,
    penalties or length limits. Padding is on the left and masked. In half precision, batching can still change an
    answer at a near tie. Rows that have ended leave the batch, so they cost nothing while other rows go on.

    Args:
        model: a Hugging Face causal LM with a key-value cache, or a LoRA model around one. Its mode is restored
            afterwards.
        tokenizer: decodes the answers. Its end-of-sequence id and the model's end an answer.
        prompts: token ids of each prompt, template and BOS included.
        max_new_tokens: longest answer, in tokens, >= 1.
        batch_size: prompts per batch, >= 1.
        progress: called after each batch with the number of prompts answered so far.

    Returns:
        Answers in the order of the prompts.

    Raises:
        ValueError: if a number is below 1 or a prompt is empty.
        InputError: if a prompt and its answer exceed the model's positions.
    """
    check_prompts(model, prompts, max_new_tokens, batch_size)
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    answers = [Answer("", [], False)] * len(prompts)
    ends = _end_ids(model, tokenizer)
    # A tokenizer's padding id may have no row in the embedding. Padding is masked, so any id with a row serves.
    known = embedding_rows(model.config) or math.inf
    pad = next(i for i in (tokenizer.pad_token_id, *ends, 0) if i is not None and i < known)
    with _decoding(model):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            ids, mask = _left_padded([prompts[row] for row in rows], pad, next(model.parameters()).device)
            for row, (new, ended) in zip(rows, _answer(model, ids, mask, ends, pad, max_new_tokens), strict=True):
                text = tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                answers[row] = Answer(text.strip(), new, ended)
            if progress is not None:
                progress(start + len(rows))
    return answers


def check_prompts(model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int = 1) -> None:
    """Check the arguments of ``answer`` and raise its errors, before the model runs."""
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"generate: {name} must be >= 1, got {value}.")
    lengths = list(map(len, prompts)) or [1]
    if min(lengths) == 0:
        raise ValueError(f"generate: a prompt needs at least one token, prompt {lengths.index(0)} has none.")
    limit = positions_of(model.config)
    if limit and max(lengths) + max_new_tokens > limit:
        raise InputError(
            f"generate: prompt and answer must fit in the model's {limit} positions, got {max(lengths)} tokens of"
            f" prompt {lengths.index(max(lengths))} and {max_new_tokens} new ones. Lower max_new_tokens or remove the"
            " prompt."
        )


def _answer(
    model: nn.Module, ids: Tensor, mask: Tensor, ends: list[int], pad: int, left: int
) -> list[tuple[list[int], bool]]:
    """Return the new token ids of each row up to its end, and whether the row has ended.

    The model generates ``STRIDE`` tokens at a time. After each stride the ended rows leave the batch.

    Args:
        model: the model, in evaluation mode.
        ids: left-padded prompts, int64 ``[batch, tokens]``.
        mask: 1 on the prompts, 0 on the padding, int64 ``[batch, tokens]``.
        ends: ids that end an answer. Without any, no row leaves the batch.
        pad: any id. It fills a row after its end.
        left: tokens that an answer may still have.
    """
    answers: list[list[int]] = [[] for _ in ids]
    # live[place] is the row of the original batch at this place of the shrunken batch.
    live, cache = list(range(len(ids))), dict[str, Any]()
    while live and left:
        greedy = _greedy(min(left, STRIDE) if ends else left, ends, pad)
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=greedy, **cache)  # type: ignore[operator]
        new = output.sequences[:, ids.shape[1] :]
        left -= new.shape[1]
        going = []
        for place, (row, tokens) in enumerate(zip(live, new.tolist(), strict=True)):
            end = next((i for i, token in enumerate(tokens) if token in ends), None)
            answers[row] += tokens[:end]
            if end is None:
                going.append(place)
        keep = torch.tensor(going, dtype=torch.long, device=ids.device)
        live = [live[place] for place in going]
        ids, mask = output.sequences[keep], torch.cat([mask, torch.ones_like(new)], dim=1)[keep]
        if len(keep) < len(new):
            # Every kind of cache has this method, for beam search. The index may leave rows out.
            output.past_key_values.reorder_cache(keep)
        cache = {"past_key_values": output.past_key_values}
    return [(ids, row not in live) for row, ids in enumerate(answers)]


def _greedy(new_tokens: int, ends: list[int], pad: int) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=new_tokens,
        eos_token_id=ends or None,
        pad_token_id=pad,
        return_dict_in_generate=True,
    )


@contextmanager
def _decoding(model: nn.Module) -> Iterator[None]:
    """Run the block in evaluation mode, without gradients and with blank generation configs, then restore all."""
    from transformers import GenerationConfig

    settings = {m: m.generation_config for m in model.modules() if "generation_config" in vars(m)}
    for module in settings:
        # generate() takes options that the caller's config leaves open from this one, so it must be blank.
        module.generation_config = GenerationConfig()  # type: ignore[assignment]
    try:
        with evaluating(model):
            yield
    finally:
        for module, config in settings.items():
            module.generation_config = config


def _left_padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return token ids and mask, each int64 ``[batch, tokens of the longest prompt]``."""
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _end_ids(model: nn.Module, tokenizer: Any) -> list[int]:
    config = getattr(model, "generation_config", None)
    own = getattr(config, "eos_token_id", None)
    ends = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return sorted({token for token in ends if token is not None})
