"""Helpers of judges with a model: loading, batches, and rows without a verdict."""

import warnings
from collections.abc import Iterator, Sequence
from pickle import UnpicklingError
from typing import Any

from hftlight.errors import InputError, RunError
from hftlight.evaluation.judges.judge import Verdict


def load(model: str, auto: str, judge: str) -> tuple[Any, Any]:
    """Load a judge's model and tokenizer.

    The model is in bfloat16 on a GPU, or in float32 on the CPU if there is no GPU.

    Args:
        model: a folder or a hub id; an adapter is loaded together with its base model.
        auto: the transformers class that reads the model, such as ``"AutoModelForCausalLM"``.
        judge: name of the judge, for the error.

    Raises:
        InputError: if the model or the tokenizer cannot be loaded.
    """
    import torch
    import transformers

    from hftlight.model_files import model_path
    from hftlight.models.load import pretrained

    gpu = torch.cuda.is_available()
    try:
        folder = model_path(model, weights=True)
        reader = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        network = pretrained(getattr(transformers, auto), folder, dtype=torch.bfloat16 if gpu else torch.float32)
    except (OSError, ValueError, ImportError, RuntimeError, UnpicklingError) as error:
        raise _not_loadable(model, judge, error) from error
    return (network.cuda() if gpu else network).eval(), reader


def weights_of(model: Any, judge: str) -> dict[str, str]:
    """Return the hash of a judge model's files, or an empty dictionary for a model passed as an object.

    Args:
        model: a folder, a hub id whose files are downloaded first, or a model object.
        judge: name of the judge, for the error.

    Raises:
        InputError: if there is no such model.
    """
    from hftlight.model_files import model_hash

    try:
        return {"weights": model_hash(model)} if isinstance(model, str) else {}
    except InputError as error:
        raise _not_loadable(model, judge, error) from error


def _not_loadable(model: str, judge: str, error: Exception) -> InputError:
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return InputError(
        f"Judge {judge!r}: {model!r} cannot be loaded ({reason}). Pass a folder or a hub id that this machine can"
        " reach or has cached. For a gated model, accept its terms and run `hf auth login`. Some tokenizers need"
        ' pip install "hftlight[judges]".'
    )


def padding_id(tokenizer: Any, judge: str) -> int:
    """Return a token id for padding that differs from the end-of-sequence token.

    A sequence classifier reads its answer at the last token that is not padding. If the end-of-sequence token were the
    padding, the classifier would skip it.

    Raises:
        InputError: if the tokenizer has no such token.
    """
    for candidate in (tokenizer.pad_token_id, tokenizer.unk_token_id):
        if candidate is not None and candidate != tokenizer.eos_token_id:
            return int(candidate)
    raise InputError(
        f"Judge {judge!r}: the tokenizer needs a padding token other than the end of sequence, got"
        f" {tokenizer.pad_token!r}. Set tokenizer.pad_token to another token."
    )


def batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yield batches of row numbers, so that rows of similar length share a batch. The longest rows come first."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    for start in range(0, len(order), size):
        yield order[start : start + size]


def padded(rows: Sequence[Sequence[int]], pad: int, device: Any, left: bool = False) -> dict[str, Any]:
    """Return ``input_ids`` and ``attention_mask``, each int64 ``[batch, tokens of the longest]``."""
    import torch

    width = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        fill = width - len(row)
        before, behind = (fill, 0) if left else (0, fill)
        ids.append([pad] * before + list(row) + [pad] * behind)
        mask.append([0] * before + [1] * len(row) + [0] * behind)
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def class_logits(
    model: Any, tokenizer: Any, texts: Sequence[str], max_tokens: int, batch_size: int, judge: str
) -> tuple[Any, int]:
    """Return a sequence classifier's logits, float32 ``[rows, labels]``, and the number of texts cut on the right.

    Args:
        model: a sequence classifier; its training or evaluation mode is restored.
        tokenizer: the model's tokenizer, which adds its own special tokens to each text.
        texts: complete texts.
        max_tokens: longest text in tokens, special tokens included.
        batch_size: texts per batch, >= 1.
        judge: name of the judge, for errors.

    Raises:
        InputError: if the tokenizer has no fitting padding token, or the model has another one.
        RunError: if a logit is not finite.
    """
    import torch

    pad = padding_id(tokenizer, judge)
    known = getattr(model.config, "pad_token_id", None)
    if known != pad:
        raise InputError(
            f"Judge {judge!r}: the padding token is {known} in the model and {pad} in the tokenizer. The model would"
            f" read its answer at a wrong token. Set model.config.pad_token_id = {pad}."
        )
    # First without a limit, to count the texts that are too long; then those alone again, cut by the tokenizer, which
    # keeps its special tokens.
    rows = [list(tokenizer(text)["input_ids"]) for text in texts]
    cut = sum(len(row) > max_tokens for row in rows)
    rows = [
        list(tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"]) if len(row) > max_tokens else row
        for text, row in zip(texts, rows, strict=True)
    ]
    # Batches come in order of length; each row's logits return to the row's own place.
    by_row: list[Any] = [None] * len(rows)
    device, mode = next(model.parameters()).device, model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches([len(row) for row in rows], batch_size):
                logits = model(**padded([rows[i] for i in batch], pad, device)).logits.float().cpu()
                for i, values in zip(batch, logits, strict=True):
                    require_finite(values, i, judge)
                    by_row[i] = values
    finally:
        model.train(mode)
    return torch.stack(by_row), cut


def require_finite(values: Any, row: int, judge: str) -> None:
    """Refuse logits that are not finite. Compared with a threshold, NaN would count as harmless.

    Raises:
        RunError: if a logit is not finite. The message names the row.
    """
    if not values.isfinite().all():
        raise RunError(
            f"Judge {judge!r}: the model's logits for row {row + 1} are not finite. Load the model in bfloat16 or"
            " float32."
        )


def require_pairs(prompts: Sequence[str], responses: Sequence[str], judge: str) -> None:
    """Refuse lists of prompts and answers of different length.

    Raises:
        ValueError: if the lengths differ. The message states both.
    """
    if len(prompts) != len(responses):
        raise ValueError(f"Judge {judge!r}: each prompt needs its response, got {len(prompts)} and {len(responses)}.")


def settled(found: Sequence[Verdict | str], judge: str) -> list[Verdict]:
    """Return one verdict per answer. An answer without a verdict gets an unjudged one.

    If there are such answers, a warning states their number and the first reason.

    Args:
        found: for each answer, its verdict or the reason why it has none.
        judge: name of the judge.

    Raises:
        RunError: if there are answers and none of them has a verdict.
    """
    reasons = [f"row {number}: {said}" for number, said in enumerate(found, start=1) if isinstance(said, str)]
    if reasons and len(reasons) == len(found):
        raise RunError(f"Judge {judge!r} could judge none of {len(found)} answers; {reasons[0]}")
    if reasons:
        warnings.warn(
            f"Judge {judge!r} could not judge {len(reasons)} of {len(found)} answers; no metric counts them;"
            f" {reasons[0]}",
            stacklevel=3,
        )
    return [Verdict.unjudged() if isinstance(result, str) else result for result in found]


def variant(name: str, default: str, model: Any) -> str:
    """Return a judge's name. Unless the model is the published one, a colon and the model follow."""
    if isinstance(model, str):
        given = model
    else:
        given = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    return name if given == default else f"{name}:{given}"
