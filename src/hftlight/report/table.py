"""Closing table of a run by arm and stage, for a terminal, as plain text and in Markdown."""

from collections.abc import Callable, Mapping

from rich.box import SIMPLE_HEAD
from rich.table import Table

from hftlight.evaluation.metrics.outcomes import OUTCOMES, Outcome
from hftlight.evaluation.score import Score
from hftlight.folders import STAGES, WITHOUT_PATTERN, arm_word
from hftlight.report.escape import in_markdown
from hftlight.report.result import Result

HEADERS = (
    "Arm",
    "Stage",
    "Refused, complied, broken %",
    "Harmful score % (95 %)",
    "Finetune accuracy %",
    "Over-refusal %",
    "s/step (x SFT)",
    "Peak memory MiB",
)
PATTERN_PLACE = 4  # column of the harmful score without the attack's pattern, next to that with it
PATTERN_HEADER = "Without the pattern % (95 %)"
HEADLINE = (
    "Refused, complied (flagged), broken (a sign of collapse): parts of the same answers. The rest to 100 % are other"
    " answers."
)
ONCE = "s once"  # unit of a repair in the column of seconds per step, since a repair has no steps
NARROW = (
    "Arm",
    "Stage",
    "Refused/\ncomplied/\nbroken %",
    "Harmful score\n% (95 %)",
    "Fine-\ntune\nacc. %",
    "Over-\nref. %",
    "s/step\n(x SFT)",
    "Peak\nMiB",
)


def headers(result: Result) -> list[str]:
    """Return ``HEADERS``, and next to the harmful score that without the attack's pattern if it was measured."""
    columns = list(HEADERS)
    if result.judges(WITHOUT_PATTERN):
        columns.insert(PATTERN_PLACE, PATTERN_HEADER)
    return columns


def closing_rows(result: Result) -> list[list[str]]:
    """Return one row of text per arm and stage, in the order of ``headers``. '-' stands for no measurement."""
    rows = []
    for arm in result.arms:
        for stage in result.stages(arm):
            cost = result.costs.get((arm, stage))
            harmful, *others = (
                result.score(arm, stage, metric) for metric in ("harmful_score", "finetune_accuracy", "over_refusal")
            )
            relative = f" ({cost.relative_to_sft:.1f}x)" if cost and cost.relative_to_sft is not None else ""
            speed = f"{seconds(cost.seconds_per_step)}{relative}" if cost and cost.seconds_per_step is not None else "-"
            if cost and cost.steps == 0 and cost.seconds is not None:
                speed = f"{seconds(cost.seconds)} {ONCE}"
            memory = f"{cost.peak_memory_mib:.0f}" if cost and cost.peak_memory_mib is not None else "-"
            plain = [f"{score.value:.1f}" if score else "-" for score in others]
            shares = {name: score.value for name, score in result.outcomes(arm, stage).items()}
            row = [arm_word(arm), STAGES[stage], headline(shares), with_interval(harmful), *plain, speed, memory]
            if result.judges(WITHOUT_PATTERN):
                row.insert(PATTERN_PLACE, with_interval(result.score(arm, stage, WITHOUT_PATTERN)))
            rows.append(row)
    return rows


def headline(shares: Mapping[Outcome, float]) -> str:
    """Return the outcomes of answers to harmful prompts as ``35/57/8``: refused, complied, broken, in percent.

    The rest to 100 percent are other answers. Without a measurement the text is '-'.
    """
    return "/".join(f"{shares[name]:.0f}" for name in OUTCOMES if name != "other") if shares else "-"


def seconds(value: float) -> str:
    """Return seconds with about three significant digits and without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 1e-3 else f"{value:.6f}"


def with_interval(score: Score | None) -> str:
    """Return a score as ``61.7 (52.8-69.9)``, without an interval as the number alone, and None as '-'."""
    if score is None:
        return "-"
    value, low, high = (value_text(end, score.unit) for end in (score.value, score.low, score.high))
    return value if score.low is None or score.high is None else f"{value} ({low}-{high})"


def value_text(value: float | None, unit: str) -> str:
    """Return a percentage with one decimal, any other number with three significant digits, and None as '-'."""
    return "-" if value is None else f"{value:.1f}" if unit == "percent" else f"{value:.3g}"


def caption(result: Result) -> str:
    """Return the table's caption: judge, number of answers, meaning of the columns, and which direction is better."""
    judge = next(iter(result.judges()), "")
    counts = sorted({s.count for s in result.scores.values() if s.metric == "harmful_score" and s.judge == judge})
    n = "" if not counts else f", n = {counts[0]}" if len(counts) == 1 else f", n = {counts[0]} to {counts[-1]}"
    by = f" by judge '{judge}'" if judge else ""
    parts = f" {HEADLINE}" if any(result.outcomes(arm, stage) for arm, stage, *_ in result.scores) else ""
    once = (
        f" '{ONCE}': seconds of the whole repair."
        if any(stage == "post_finetuning" for _, stage in result.costs)
        else ""
    )
    pattern = (
        " Without the pattern: the same prompts without the attack's pattern, as an outsider sends them."
        if result.judges(WITHOUT_PATTERN)
        else ""
    )
    return (
        f"Harmful score: percent of answers to held-out harmful prompts flagged{by}{n}, with 95 % interval; lower is "
        f"safer.{pattern}{parts} s/step: seconds per optimizer step, in brackets the multiple of plain fine-tuning "
        f"(SFT).{once}"
    )


def closing_table(result: Result) -> Table:
    """Return the closing table for a terminal of 80 columns, with the undefended arm first and a section per arm."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=0)
    table.caption, table.caption_justify = caption(result), "left"
    narrow, pattern = list(NARROW), bool(result.judges(WITHOUT_PATTERN))
    if pattern:  # 80 columns have no room for a second interval, nor for the memory in the last column
        narrow[PATTERN_PLACE:] = ["No\npat-\ntern\n%", *narrow[PATTERN_PLACE:-1]]
    for number, header in enumerate(narrow):
        table.add_column(header, justify="left" if number < 2 else "right", no_wrap=number > 0, overflow="fold")
    before = ""
    for arm, *cells in closing_rows(result):
        if before and arm != before:
            table.add_section()
        if pattern:
            cells[PATTERN_PLACE - 1] = cells[PATTERN_PLACE - 1].partition(" ")[0]
            del cells[-1]
        table.add_row("" if arm == before else arm, *cells)
        before = arm
    return table


def closing_text(result: Result) -> str:
    """Return the closing table in aligned plain text, for a log or a file."""
    lines = [headers(result), *closing_rows(result)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    align: list[Callable[[str, int], str]] = [str.ljust, str.ljust, *[str.rjust] * (len(widths) - 2)]
    text = ["  ".join(pad(cell, width) for pad, cell, width in zip(align, line, widths, strict=True)) for line in lines]
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in [*text, "", caption(result)])


def closing_markdown(result: Result) -> str:
    """Return the closing table in Markdown, for a notebook or an issue."""
    columns = headers(result)
    lines = [columns, ["---", "---", *["---:"] * (len(columns) - 2)], *closing_rows(result)]
    return "\n".join("| " + " | ".join(map(in_markdown, line)) + " |" for line in lines)
