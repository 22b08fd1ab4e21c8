"""Generation by vLLM, with a stub module that answers each prompt with the prompt's tokens reversed."""

import inspect
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from hftlight.errors import InputError
from hftlight.evaluation.answering import generate as by_transformers
from hftlight.evaluation.answering.vllm_generation import Engine, generate, load_engine

END = 9


class Numbers:
    """A tokenizer whose text is the ids themselves."""

    eos_token_id: int | None = END

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        assert skip_special_tokens
        assert not clean_up_tokenization_spaces
        return " " + " ".join(map(str, ids)) + " "


class LLM:
    """A stub engine that records its options and requests."""

    def __init__(self, **options):
        self.options, self.asked = options, []
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=20))

    def generate(self, prompts, sampling, use_tqdm, lora_request):
        assert not use_tqdm
        self.asked.append((prompts, vars(sampling), lora_request))
        answers = [list(reversed(prompt["prompt_token_ids"])) for prompt in prompts]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(ids))]) for ids in answers]


class LoRARequest:
    def __init__(self, *arguments):
        self.arguments = arguments


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    module, lora, request = ModuleType("vllm"), ModuleType("vllm.lora"), ModuleType("vllm.lora.request")
    module.LLM, module.SamplingParams, request.LoRARequest = LLM, SimpleNamespace, LoRARequest
    for each in (module, lora, request):
        monkeypatch.setitem(sys.modules, each.__name__, each)


def adapter(folder, **settings):
    base = folder / "base"
    tuned = folder / "tuned"
    for path in (base, tuned):
        path.mkdir()
    (base / "config.json").write_text("{}")
    (tuned / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base), "r": 8, **settings}))
    return base, tuned


def test_the_signature_is_that_of_generate():
    own, other = (inspect.signature(function).parameters for function in (generate, by_transformers.generate))
    assert list(own) == list(other)
    assert [(p.kind, p.default) for p in own.values()] == [(p.kind, p.default) for p in other.values()]


def test_prompts_go_in_as_ids_and_answers_come_back_without_their_end():
    engine, counts = Engine(LLM()), []
    prompts = [[1, 2, 3], [4, END, 5], [6]]
    assert generate(engine, Numbers(), prompts, max_new_tokens=7, progress=counts.append) == ["3 2 1", "5", "6"]
    assert counts == [3]
    ((inputs, sampling, request),) = engine.llm.asked
    assert inputs == [{"prompt_token_ids": ids} for ids in prompts]
    assert sampling == {"temperature": 0.0, "max_tokens": 7, "stop_token_ids": [END], "detokenize": False}
    assert request is None


def test_an_answer_is_cut_where_the_template_begins_another():
    assert generate(Engine(LLM()), Numbers(), [[1, 7, 3], [4]], max_new_tokens=7, stop="7") == ["3", "4"]


def test_a_tokenizer_without_an_end():
    tokenizer, engine = Numbers(), Engine(LLM())
    tokenizer.eos_token_id = None
    assert generate(engine, tokenizer, [[END, 1]], max_new_tokens=7) == ["1 9"]
    assert engine.llm.asked[0][1]["stop_token_ids"] == []


def test_no_prompts_no_answers():
    engine = Engine(LLM())
    assert generate(engine, Numbers(), [], max_new_tokens=4) == []
    assert engine.llm.asked == []


@pytest.mark.parametrize(
    ("settings", "room"), [({}, 8), ({"r": 9}, 16), ({"r": 257}, 320), ({"r": 4, "rank_pattern": {"q": 33}}, 64)]
)
def test_an_adapter_stays_beside_its_base(tmp_path, settings, room):
    base, tuned = adapter(tmp_path, **settings)
    engine = load_engine(tuned, dtype="bfloat16", tensor_parallel_size=2)
    assert engine.llm.options == {
        "model": str(base),
        "tokenizer": str(tuned),
        "dtype": "bfloat16",
        "enable_lora": True,
        "max_lora_rank": room,
        "tensor_parallel_size": 2,
    }
    assert engine.adapter.arguments == ("adapter", 1, str(tuned))
    generate(engine, Numbers(), [[1]], max_new_tokens=1)
    assert engine.llm.asked[0][2] is engine.adapter


def test_a_whole_model_and_one_loaded_by_its_folder(tmp_path):
    base, _ = adapter(tmp_path)
    assert load_engine(base).llm.options == {"model": str(base), "dtype": "float32"}
    assert generate(str(base), Numbers(), [[1, 2]], max_new_tokens=1) == ["2 1"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"r": 513}, "rank 513, at most 512.* Merge it"), ({"modules_to_save": ["lm_head"]}, "whole modules beside LoRA")],
)
def test_an_adapter_that_cannot_be_served_is_refused(tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        load_engine(adapter(tmp_path, **settings)[1])


def test_what_cannot_be_answered_is_refused():
    engine = Engine(LLM())
    assert generate(engine, Numbers(), [[1] * 16], max_new_tokens=4)
    with pytest.raises(InputError, match="20 positions, got 17 tokens of the longest prompt and 4 new"):
        generate(engine, Numbers(), [[1], [1] * 17], max_new_tokens=4)
    with pytest.raises(ValueError, match="max_new_tokens must be >= 1, got 0"):
        generate(engine, Numbers(), [[1]], max_new_tokens=0)
    with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
        generate(engine, Numbers(), [[1]], max_new_tokens=1, batch_size=0)
    with pytest.raises(ValueError, match="a prompt needs at least one token"):
        generate(engine, Numbers(), [[1], []], max_new_tokens=1)


def test_a_missing_package_names_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    for call in (lambda: load_engine(adapter(tmp_path)[0]), lambda: generate("x", Numbers(), [[1]], max_new_tokens=1)):
        with pytest.raises(InputError, match=r"pip install 'hftlight\[vllm\]'"):
            call()
