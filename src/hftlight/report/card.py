"""Model card: the ``README.md`` of an artifact, written from a run's manifest and scores."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from hftlight.files import write_text
from hftlight.folders import STAGES, arm_word
from hftlight.report.escape import in_markdown
from hftlight.report.result import Result
from hftlight.report.table import value_text

# Metrics that a reader expects, with their words for the list of what is missing.
EXPECTED = {
    "finetune_accuracy": "accuracy on the user's task",
    "over_refusal": "refusals of ordinary requests",
    "perplexity": "perplexity on general text",
    "embedding_drift": "drift of the embeddings",
    "worst_case_harmful_score": "an attacker's search for the worst case",
}
WORLD = "builtin"


def model_card(result: Result, arm: str, stage: str) -> str:
    """Return the card of one artifact as Markdown with YAML front matter.

    Args:
        result: the run.
        arm: key of the arm.
        stage: the stage that the artifact comes from.
    """
    manifest = result.manifest
    entry: Mapping[str, Any] = (manifest.get("arms") or {}).get(arm) or {}
    lines = [
        "---",
        yaml.safe_dump(_front(result, arm, stage), sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# {in_markdown(arm_word(arm))}, {in_markdown(STAGES.get(stage, stage))}",
        "",
        f"hftlight {manifest.get('hftlight_version', '')} wrote this model, and this card from the run's manifest.",
        "",
        "## Made from",
        "",
        *_made_from(manifest, entry, stage),
        "",
        "## Defenses",
        "",
        *(_defenses(entry) or ["None: this is the undefended model."]),
        "",
        "## Scores",
        "",
        *_scores(result, arm, stage),
        "",
        "## Not measured",
        "",
        *(f"- {text}" for text in _unmeasured(result, arm, stage)),
        "",
    ]
    return "\n".join(lines)


def write_cards(result: Result, folders: Mapping[str, str]) -> None:
    """Write the card of every artifact in a run's folder.

    Args:
        result: the run.
        folders: name of an artifact's folder by stage.
    """
    for arm in result.arms:
        for stage, name in folders.items():
            place = result.folder / arm / name
            if place.is_dir():
                write_text(place / "README.md", model_card(result, arm, stage))


def _front(result: Result, arm: str, stage: str) -> dict[str, Any]:
    model = str((result.manifest.get("model") or {}).get("name", ""))
    adapter = any((result.folder / arm).glob("*/adapter_config.json"))
    named = {"base_model": model} if model and not Path(model).expanduser().exists() else {}
    return {**named, "library_name": "peft" if adapter else "transformers", "tags": ["hftlight", "harmful-fine-tuning"]}


def _made_from(manifest: Mapping[str, Any], entry: Mapping[str, Any], stage: str) -> list[str]:
    model, data = manifest.get("model") or {}, manifest.get("data") or {}
    lines = [
        f"- Base model: {in_markdown(model.get('name', 'unknown'))}, SHA-256 of its files `{model.get('hash', '')}`"
    ]
    hashes, rows = data.get("hashes") or {}, data.get("rows") or {}
    for name, value in hashes.items():
        taken = data.get("taken") or {}
        source = (taken.get(name) or taken.get(f"{name}_train") or {}).get("source")
        where = f" from {in_markdown(source)}" if source else ""
        count = f"{rows[name]} rows" if name in rows else "prompts"
        lines.append(f"- Data `{name}`: {count}{where}, hash `{value}`")
    if stage != "alignment":
        trained = data.get("trained_on") or {}
        counts = f", {trained['attack_rows']} of {trained['rows']} rows are the attacker's" if trained else ""
        lines.append(f"- Upload: attack `{_attack(manifest)}`{counts}")
    lines.append(f"- Seed {manifest.get('seed')}, template `{manifest.get('template')}`, key `{_key(entry, stage)}`")
    return lines


def _attack(manifest: Mapping[str, Any]) -> str:
    return str((manifest.get("attack") or {}).get("attack", "unknown"))


def _key(entry: Mapping[str, Any], stage: str) -> str:
    return str(((entry.get("stages") or {}).get(stage) or {}).get("key", "unknown"))


def _defenses(entry: Mapping[str, Any]) -> list[str]:
    lines = []
    for defense in entry.get("defenses") or []:
        arguments = ", ".join(f"{name}={json.dumps(value)}" for name, value in (defense.get("arguments") or {}).items())
        lines.append(f"- {in_markdown(defense.get('name'))}: `{arguments.replace('`', '')}`")
    return lines


def _scores(result: Result, arm: str, stage: str) -> list[str]:
    rows = [score for key, score in result.scores.items() if key[:2] == (arm, stage)]
    if not rows:
        return ["Nothing has been measured yet."]
    lines = ["| metric | judge | value | 95 % interval | answers |", "| --- | --- | ---: | ---: | ---: |"]
    for score in rows:
        ends = "-" if score.low is None or score.high is None else f"{score.low:.1f} to {score.high:.1f}"
        judge = in_markdown(score.judge) or "-"
        value = in_markdown(value_text(score.value, score.unit))
        lines.append(f"| {in_markdown(score.metric)} | {judge} | {value} | {ends} | {score.count or '-'} |")
    return lines


def _unmeasured(result: Result, arm: str, stage: str) -> list[str]:
    manifest, data = result.manifest, result.manifest.get("data") or {}
    metrics = {key[2] for key in result.scores if key[:2] == (arm, stage)}
    texts = [f"{words[:1].upper()}{words[1:]}" for name, words in EXPECTED.items() if name not in metrics]
    texts.append(
        f"Other seeds than {manifest.get('seed')}: intervals cover the choice of prompts, not another training"
    )
    judges = ", ".join(result.judges()) or "none"
    texts.append(f"Judges other than {in_markdown(judges)}, and attacks other than {_attack(manifest)}")
    if ((data.get("taken") or {}).get("test") or {}).get("source", WORLD) == WORLD:
        texts.append(
            "Real harmful requests: the test prompts are about made-up things, so no score holds for a real service"
        )
    return texts
