"""Greedy answers by vLLM, for large models or many prompts. ``generate`` is called like that of transformers."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hftlight.errors import InputError
from hftlight.evaluation.answering.generate import up_to
from hftlight.model_files import ADAPTER_CONFIG, base_of, model_path

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values that vLLM allows as max_lora_rank


@dataclass(frozen=True)
class Engine:
    """A model that vLLM has loaded.

    Attributes:
        llm: the ``vllm.LLM`` object.
        adapter: the LoRA request that goes with every prompt. None without an adapter.
    """

    llm: Any
    adapter: Any = None


def load_engine(model: str | Path, dtype: str = "float32", **options: Any) -> Engine:
    """Load a model into vLLM. An adapter is not merged, since vLLM serves it beside its base.

    Args:
        model: an artifact's folder, or what ``load_model`` takes.
        dtype: data type of the weights, by its torch name.
        **options: vLLM's own options, such as ``tensor_parallel_size`` or ``gpu_memory_utilization``.

    Raises:
        InputError: if vLLM is not installed, or cannot serve the adapter.
    """
    vllm = _vllm()
    folder = model_path(str(model), weights=True)
    settings = Path(folder) / ADAPTER_CONFIG
    if not settings.is_file():
        return Engine(vllm.LLM(model=folder, dtype=dtype, **options))
    from vllm.lora.request import LoRARequest

    adapter = json.loads(settings.read_text())
    rank = max(adapter["r"], *(adapter.get("rank_pattern") or {"": 0}).values())
    if rank > RANKS[-1] or adapter.get("modules_to_save"):
        reason = f"rank {rank}, at most {RANKS[-1]}" if rank > RANKS[-1] else "whole modules beside LoRA"
        raise InputError(
            f"vLLM cannot serve the adapter in {folder} ({reason}). Merge it: load_model(folder).save_pretrained(...)."
        )
    llm = vllm.LLM(
        model=model_path(base_of(Path(folder)), weights=True),
        tokenizer=folder,
        dtype=dtype,
        enable_lora=True,
        max_lora_rank=next(room for room in RANKS if room >= rank),
        **options,
    )
    return Engine(llm, LoRARequest("adapter", 1, folder))


def generate(
    model: Engine | str | Path,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    progress: Callable[[int], None] | None = None,
    stop: str = "",
) -> list[str]:
    """Return the model's greedy answer to each prompt, as ``hftlight.evaluation.answering.generate.generate`` does.

    vLLM gets the prompts as token ids, so template, trigger and BOS are exactly the same. vLLM's kernels round
    differently. An answer can therefore differ from the answer of transformers from a near tie on.

    Args:
        model: an engine from ``load_engine``, which loads once for many calls, or what ``load_engine`` takes.
        tokenizer: decodes the answers. Its end-of-sequence id and the model's end an answer.
        prompts: token ids of each prompt, template and BOS included.
        max_new_tokens: longest answer, in tokens, >= 1.
        batch_size: prompts per batch, >= 1. It has no effect, since vLLM batches by itself. The parameter gives both
            functions the same signature.
        progress: called once, with the number of prompts, after the last answer.
        stop: text at which an answer is cut off. Empty cuts nothing.

    Returns:
        Answers in the order of the prompts, without special tokens and outer white space.

    Raises:
        ValueError: if a number is below 1 or a prompt is empty.
        InputError: if vLLM is not installed, or a prompt and its answer exceed the model's positions.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"generate: {name} must be >= 1, got {value}.")
    if not all(prompts):
        raise ValueError("generate: a prompt needs at least one token.")
    vllm = _vllm()
    engine = model if isinstance(model, Engine) else load_engine(model)
    _check_room(engine, prompts, max_new_tokens)
    end = tokenizer.eos_token_id
    sampling = vllm.SamplingParams(
        temperature=0.0, max_tokens=max_new_tokens, stop_token_ids=[] if end is None else [end], detokenize=False
    )
    inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    outputs = engine.llm.generate(inputs, sampling, use_tqdm=False, lora_request=engine.adapter) if inputs else []
    answers = []
    for output in outputs:
        # vLLM's token ids may include the end-of-sequence id.
        ids = list(output.outputs[0].token_ids)
        ids = ids[: ids.index(end)] if end in ids else ids
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        answers.append(up_to(text.strip(), stop))
    if progress is not None:
        progress(len(answers))
    return answers


def _check_room(engine: Engine, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    config = getattr(getattr(engine.llm, "llm_engine", None), "model_config", None)
    limit = getattr(config, "max_model_len", None)
    longest = max(map(len, prompts), default=0)
    if limit and longest + max_new_tokens > limit:
        raise InputError(
            f"generate: prompt and answer must fit in the model's {limit} positions, got {longest} tokens of the"
            f" longest prompt and {max_new_tokens} new ones. Lower max_new_tokens, remove the prompt, or raise"
            " max_model_len."
        )


def _vllm() -> Any:
    try:
        import vllm
    except ImportError as error:
        raise InputError("vLLM is not installed. Run pip install 'hftlight[vllm]', or use generate().") from error
    return vllm
