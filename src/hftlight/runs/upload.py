"""Export of a run's upload as the file that a fine-tuning service takes."""

from pathlib import Path

from hftlight.config import RunConfig
from hftlight.data.messages import write_upload
from hftlight.data.records import Record
from hftlight.data.templates import get_template
from hftlight.data.tokens import encode_all
from hftlight.engine import Stage
from hftlight.engine.step.order import passes_order
from hftlight.errors import InputError
from hftlight.files import ensure_writable, write_json
from hftlight.models.load import load_tokenizer
from hftlight.runs.prepare import UNLIMITED, Prepared
from hftlight.runs.stages.train import stage_config

SIDE = ".rows.json"  # end of the name of the file beside the upload that says what its rows are


def export_upload(prepared: Prepared, path: Path) -> Path:
    """Write the rows of the attack's upload in chat format, and beside them a file that says what they are.

    The rows carry the attack's system text. They are in the order in which the run's fine-tuning reads them first. A
    run leaves out or cuts rows longer than its model's ``--max_tokens``, but the file holds them whole. The file beside
    holds the attack's values, the seed, and each row's id and role in the same order. It is not for the service.

    Args:
        prepared: the run.
        path: the file for the service, such as ``upload.jsonl``.

    Returns:
        The path of the file beside it.

    Raises:
        InputError: if the run has a defense, or its upload cannot be written as chats: pairs of answers, a weight edit,
            several uploads, or rows that the aligned model chooses. Also if a row has an empty question or answer.
    """
    attack, config = prepared.attack, prepared.config
    if named := [arm.name for arm in prepared.arms if arm.defenses]:
        raise InputError(
            f"--export_upload writes what a user uploads, and the service runs no defense, got --defense"
            f" {' '.join(named)}. Leave --defense out."
        )
    if len(prepared.phases) > 1 or attack.acts_on != "rows":
        reason = {"pairs": "pairs of answers", "weights": "no rows, but edits the weights"}
        what = "several uploads" if len(prepared.phases) > 1 else reason[attack.acts_on]
        raise InputError(
            f"--export_upload: the attack {attack.name} has {what}, and a service takes one file of chats. Choose"
            " another attack."
        )
    if prepared.choosing is not None:
        raise InputError(
            f"--export_upload: the aligned model chooses the rows of {attack.name}. Run the attack once, and pass the"
            f" scores that it writes with --{attack.name}.scores FILE."
        )
    if path.suffix != ".jsonl":
        raise InputError(f"--export_upload writes JSONL, so the file must end in .jsonl, got {str(path)!r}.")
    ensure_writable(path.parent, "--export_upload")
    own = stage_config(config, attack, Stage.FINETUNING)
    rows = _in_order(prepared, own)
    write_upload(path, rows, own.system)
    beside = path.with_name(path.stem + SIDE)
    about = [{"id": r.id, "role": r.role, "kind": r.kind, "source": r.source} for r in rows]
    write_json(beside, {"attack": attack.describe(), "seed": config.seed, "rows": about})
    return beside


def _in_order(prepared: Prepared, own: RunConfig) -> list[Record]:
    """Return the rows of the upload in the order of the fine-tuning's first pass.

    Args:
        prepared: the run.
        own: configuration of the fine-tuning.
    """
    rows, lengths = prepared.streams["task"], None
    if own.order == "length":
        tokenizer = load_tokenizer(own.model)
        examples, _ = encode_all(rows, get_template(own.template, tokenizer), tokenizer, UNLIMITED, own.system)
        lengths = [len(example.input_ids) for example in examples]
    batches = passes_order(len(rows), own.finetuning.batch_size, own.seed, "task", 0, lengths)
    return [rows[row] for batch in batches for row in batch]
