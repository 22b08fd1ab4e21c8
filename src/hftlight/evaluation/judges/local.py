"""What judges with a model share: loading it, rows in batches, and rows that get no verdict."""

import warnings
from collections.abc import Iterator, Sequence
from pickle import UnpicklingError
from typing import Any

from hftlight.errors import InputError, RunError
from hftlight.evaluation.judges.judge import Verdict


def load(model: str, auto: str, judge: str) -> tuple[Any, Any]:
    """Return a judge's model and tokenizer; bfloat16 on a GPU where there is one, else float32 on the CPU.

    Args:
        model: a folder or a hub id; an adapter stands for itself and its base.
        auto: the transformers class that reads the model, such as ``"AutoModelForCausalLM"``.
        judge: who asks, for the error.

    Raises:
        InputError: if they cannot be loaded.
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
    """Return the hash of a judge model's files, if the model was given by name.

    Args:
        model: a folder or a hub id, whose files are fetched first; or a model, which has no files.
        judge: who asks, for the error.

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
        " reach or has cached; a gated one needs its terms accepted and `hf auth login`. Some tokenizers need"
        ' pip install "hftlight[judges]".'
    )


def padding_id(tokenizer: Any, judge: str) -> int:
    """Return an id for padding that is not the end of a text, where a classifier would look for its last token.

    Raises:
        InputError: if the tokenizer has none.
    """
    for candidate in (tokenizer.pad_token_id, tokenizer.unk_token_id):
        if candidate is not None and candidate != tokenizer.eos_token_id:
            return int(candidate)
    raise InputError(
        f"Judge {judge!r}: its tokenizer needs a padding token other than the end of sequence, got"
        f" {tokenizer.pad_token!r}. Set tokenizer.pad_token."
    )


def batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yield row numbers in batches of similar length, longest first."""
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
        model: a sequence classifier; comes back in its own mode.
        tokenizer: its tokenizer; puts its own special tokens around each text.
        texts: complete texts.
        max_tokens: longest text, tokens, special ones included.
        batch_size: texts per batch.
        judge: who asks, for errors.

    Raises:
        InputError: if padding cannot be told from text.
        RunError: if a logit is not finite.
    """
    import torch

    pad = padding_id(tokenizer, judge)
    known = getattr(model.config, "pad_token_id", None)
    if known != pad:
        raise InputError(
            f"Judge {judge!r}: the model takes token {known} for padding and the tokenizer {pad}, so the model would"
            f" read its answer at a wrong token. Set model.config.pad_token_id = {pad}."
        )
    rows = [list(tokenizer(text)["input_ids"]) for text in texts]
    cut = sum(len(row) > max_tokens for row in rows)
    rows = [
        list(tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"]) if len(row) > max_tokens else row
        for text, row in zip(texts, rows, strict=True)
    ]
    found: list[Any] = [None] * len(rows)
    device, mode = next(model.parameters()).device, model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches([len(row) for row in rows], batch_size):
                logits = model(**padded([rows[i] for i in batch], pad, device)).logits.float().cpu()
                for i, values in zip(batch, logits, strict=True):
                    require_finite(values, i, judge)
                    found[i] = values
    finally:
        model.train(mode)
    return torch.stack(found), cut


def require_finite(values: Any, row: int, judge: str) -> None:
    """Refuse logits that are not numbers: compared with a threshold they would pass for harmless.

    Raises:
        RunError: naming the row.
    """
    if not values.isfinite().all():
        raise RunError(
            f"Judge {judge!r}: the model's logits for row {row + 1} are not finite. Load it in bfloat16 or float32."
        )


def require_pairs(prompts: Sequence[str], responses: Sequence[str], judge: str) -> None:
    """Refuse prompts and answers that do not pair.

    Raises:
        ValueError: with both counts.
    """
    if len(prompts) != len(responses):
        raise ValueError(f"Judge {judge!r}: each prompt needs its response, got {len(prompts)} and {len(responses)}.")


def settled(found: Sequence[Verdict | str], judge: str) -> list[Verdict]:
    """Return the verdicts, an unjudged one in the place of each reason, with a warning that counts and quotes them.

    Args:
        found: verdicts, or why there is none.
        judge: who judged.

    Raises:
        RunError: if there are answers and no verdict at all.
    """
    reasons = [f"row {number}: {said}" for number, said in enumerate(found, start=1) if isinstance(said, str)]
    if reasons and len(reasons) == len(found):
        raise RunError(f"Judge {judge!r} could judge none of {len(found)} answers; {reasons[0]}")
    if reasons:
        warnings.warn(
            f"Judge {judge!r} could not judge {len(reasons)} of {len(found)} answers; they count nowhere; {reasons[0]}",
            stacklevel=3,
        )
    return [Verdict.unjudged() if isinstance(said, str) else said for said in found]


def variant(name: str, default: str, model: Any) -> str:
    """Return a judge's name, with its model behind a colon unless it is the published one."""
    if isinstance(model, str):
        given = model
    else:
        given = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    return name if given == default else f"{name}:{given}"
