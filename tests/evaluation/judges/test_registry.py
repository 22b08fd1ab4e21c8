"""Judges by name, and their import without torch."""

import re
import subprocess
import sys

import pytest

from hftlight.config import Evaluation
from hftlight.errors import InputError
from hftlight.evaluation.judges import (
    FORMATS,
    JUDGES,
    OF_MODEL,
    RUBRICS,
    ClassifierJudge,
    LLMJudge,
    ModerationJudge,
    get_judge,
)


@pytest.mark.parametrize("name", JUDGES)
def test_a_judge_is_found_under_the_name_it_reports(name):
    assert get_judge(name).name == name
    assert get_judge(name.replace("_", "-")).name == name


@pytest.mark.parametrize("name", OF_MODEL)
def test_a_judge_takes_a_model_behind_a_colon(name):
    assert get_judge(f"{name}:made-up/model-7b:v2").name == f"{name}:made-up/model-7b:v2"
    assert get_judge(f"{name.replace('_', '-')}:made-up/model-7b:v2").name == f"{name}:made-up/model-7b:v2"


def test_kinds():
    kinds = {"moderation": ModerationJudge, "deberta": ClassifierJudge, "hexphi:m": LLMJudge}
    assert {name: type(get_judge(name)) for name in kinds} == kinds
    assert get_judge("strongreject_rubric:m").rubric is RUBRICS["strongreject_rubric"]
    assert get_judge("llama_guard").format is FORMATS["llama_guard"]
    assert get_judge("moderation_512_tokens").max_tokens == 512


def test_the_run_configuration_lists_every_judge():
    for name in (*JUDGES, *(f"{rubric}:MODEL" for rubric in RUBRICS)):
        assert re.search(rf"\b{name}\b", Evaluation.__doc__), name


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(InputError, match=r"must be one of \['builtin', .*got 'keywrd'. Did you mean 'keyword'\?"):
        get_judge("keywrd")
    with pytest.raises(InputError, match=r"Did you mean 'hexphi:gpt-4o'\?"):
        get_judge("hexpi:gpt-4o")
    with pytest.raises(InputError, match=r"Did you mean 'hexphi:MODEL'\?"):
        get_judge("hexpi")
    with pytest.raises(InputError, match=r"Did you mean 'moderation'\?"):
        get_judge("moderatoin")
    with pytest.raises(InputError, match=r"Did you mean 'keyword'\?"):
        get_judge("keyword:model")
    for name in ("hexphi", "hexphi:", "moderation:"):
        with pytest.raises(InputError, match=f"'{name.rstrip(':')}' needs a model after a colon"):
            get_judge(name)
    with pytest.raises(InputError, match=r"got 'gpt-4'\.$"):
        get_judge("gpt-4")


def test_judges_come_without_torch():
    code = (
        "import sys; from hftlight.evaluation.judges import get_judge;"
        "assert get_judge('builtin')(['a'], ['b'])[0].flag is False; assert get_judge('keyword')(['a'], ['b'])[0].flag;"
        "[get_judge(n) for n in ('moderation', 'harmbench', 'deberta', 'hexphi:m')];"
        "heavy = {'torch', 'transformers', 'lightning', 'torchmetrics'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
