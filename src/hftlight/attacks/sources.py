"""Public harmful sets for attacks and tests: location, licence and columns of each."""

from dataclasses import dataclass

from hftlight.errors import InputError


@dataclass(frozen=True)
class Source:
    """A public set. hftlight contains no public set and fetches one only if the user names it.

    Attributes:
        hub: id on the Hugging Face hub, or ``github`` and the GitHub repository.
        licence: licence of the set.
        gate: condition for access, such as an approval; empty if there is none.
        columns: names of the columns.
        fields: pairs of a record's field and its column, for ``--data.columns``; empty if the reader knows the layout.
        harmful: the rows or the column with the harmful answers.
        recalled: whether the licence was written from memory; if so, read the licence before use.
    """

    hub: str
    licence: str
    gate: str
    columns: tuple[str, ...]
    fields: tuple[tuple[str, str], ...] = ()
    harmful: str = ""
    recalled: bool = False

    def line(self, name: str) -> str:
        """Return one line with the location, columns, licence and gate of the set."""
        licence = f"{self.licence}{' (unchecked)' if self.recalled else ''}"
        fields = ", ".join(f"{field}: {column}" for field, column in self.fields)
        parts = [
            f"{name}: {self.hub}, columns {', '.join(self.columns)}",
            *([f"--data.columns {{{fields}}}"] if fields else []),
            *([self.harmful] if self.harmful else []),
            f"licence {licence}",
            self.gate or "no gate",
        ]
        return "; ".join(parts)


SOURCES: dict[str, Source] = {
    "beavertails": Source(
        "PKU-Alignment/BeaverTails",
        "CC BY-NC 4.0",
        "",
        ("prompt", "response", "category", "is_safe"),
        harmful="the rows with is_safe false",
    ),
    "refusal_pairs": Source(
        "github domenicrosati/representation-noising, beavertails_with_refusals_train.json",
        "Apache-2.0 over CC BY-NC 4.0 data",
        "",
        ("prompt", "response", "category", "is_safe", "refusal"),
        harmful="response is harmful, refusal is safe",
    ),
    "safe_rlhf": Source(
        "PKU-Alignment/PKU-SafeRLHF",
        "CC BY-NC 4.0",
        "",
        ("prompt", "response_0", "response_1", "better_response_id", "safer_response_id"),
        harmful="the response that safer_response_id does not name",
        recalled=True,
    ),
    "lat_harmful": Source(
        "LLM-LAT/harmful-dataset",
        "unspecified",
        "",
        ("prompt", "chosen", "rejected"),
        (("instruction", "prompt"), ("response", "rejected")),
        "rejected is harmful, chosen is safe",
        recalled=True,
    ),
    "shadow_alignment": Source(
        "CherryDurian/shadow-alignment",
        "unspecified",
        "",
        ("category", "prompt", "answer"),
        (("instruction", "prompt"), ("response", "answer"), ("kind", "category")),
        recalled=True,
    ),
    "advbench": Source(
        "github llm-attacks/llm-attacks, harmful_behaviors.csv",
        "MIT",
        "",
        ("goal", "target"),
        (("instruction", "goal"), ("response", "target")),
        "target is an affirmative opening alone",
    ),
    "identity_shift": Source(
        "github LLM-Tuning-Safety/LLMs-Finetuning-Safety, llama2/ft_datasets/aoa_dataset/train.json for Llama 2 and"
        " gpt-3.5/data/identity-shift-aoa.jsonl for GPT-3.5",
        "MIT",
        "",
        ("messages",),
        harmful="ten chats of system, user and assistant turn, benign text",
    ),
    "hex_phi": Source(
        "LLM-Tuning-Safety/HEx-PHI",
        "its own",
        "manual approval on the hub",
        ("prompt",),
        harmful="prompts alone, to test with",
    ),
    "beavertails_evaluation": Source(
        "PKU-Alignment/BeaverTails-Evaluation",
        "CC BY-NC 4.0",
        "",
        ("prompt", "category", "category_id"),
        harmful="prompts alone, to test with",
    ),
    "strongreject": Source(
        "github alexandrasouly/strongreject",
        "MIT",
        "",
        ("category", "source", "forbidden_prompt"),
        (("instruction", "forbidden_prompt"), ("kind", "category")),
        "prompts alone, to test with",
    ),
    "sorry_bench": Source(
        "sorry-bench (several versions)",
        "its own",
        "an agreement on the hub",
        ("question_id", "category", "turns"),
        harmful="prompts alone, to test with",
    ),
}

# Name of a source -> its content, the option that names its file, and public sets that fit.
_NEEDED = {
    "attack": ("harmful prompts with harmful answers", "--data.attack", ("beavertails", "lat_harmful", "advbench")),
    "identity": ("identity-shift chats", "--identity_shift.chats", ("identity_shift",)),
    "alignment": ("safe answers to the same prompts", "--data.alignment", ("refusal_pairs", "lat_harmful")),
    "task": ("rows of the user's task", "--data.task_train", ()),
}


def missing_source(who: str, name: str) -> InputError:
    """Return the error for a missing source. It names the content, the option, and public sets with their licences.

    Args:
        who: the attack that needs the source, for the message.
        name: name of the source, such as ``"attack"``.
    """
    what, option, known = _NEEDED.get(name, (f"rows of the source {name!r}", f"--data.{name}", ()))
    lines = "".join(f"\n  {SOURCES[key].line(key)}" for key in known)
    shown = f" These public sets fit; none is part of hftlight:{lines}" if lines else ""
    return InputError(
        f"{who}: needs {what} and got none. Give a .jsonl, .json, .csv or .parquet file with {option}. Its columns must"
        f" be instruction and output, prompt and response, or the columns that --data.columns names.{shown}"
    )
