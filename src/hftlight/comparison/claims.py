"""Sentences about the result of a comparison. They claim only differences beyond the noise."""

from hftlight.comparison.read import LOWER_IS_BETTER, Comparison, Place
from hftlight.folders import UNDEFENDED, arm_word

COSTS = {"finetune_accuracy": "accuracy", "over_refusal": "over-refusal"}
CLAIMS = {
    "lower": "Lower beyond the noise",
    "higher": "Higher beyond the noise",
    "same": "No difference beyond the noise",
}


def claims(comparison: Comparison) -> list[str]:
    """Return one text per task, attack and harmful ratio: which defenses change harm, and at which cost.

    A defense changes harm if the 95 % interval of its difference to the undefended arm excludes 0.
    """
    sentences = []
    for scene in comparison.scenes:
        for ratio in comparison.ratios(scene):
            plain = comparison.place(UNDEFENDED, scene, ratio)
            harm = comparison.spread(plain, "harmful_score")
            if harm is None:
                continue
            groups: dict[str, list[str]] = {name: [] for name in CLAIMS}
            # Sort the defenses by the interval of their difference. Without an interval nothing is claimed.
            for place in comparison.column(scene, ratio):
                mean, ends = comparison.spread(place, "harmful_score"), comparison.difference(place, plain)
                if place == plain or mean is None:
                    continue
                details = f"{_costs(comparison, place, plain)}{_collapse(comparison, place)}"
                group = "same" if ends is None else "lower" if ends[1] < 0 else "higher" if ends[0] > 0 else "same"
                groups[group].append(f"{arm_word(place.arm)} ({mean.mean:.0f} %{details})")
            told = "".join(f" {CLAIMS[name]}: {', '.join(words)}." for name, words in groups.items() if words)
            parts = comparison.outcomes(plain)
            also = f" ({parts['refused']:.0f} % refused, {parts['broken']:.0f} % broken)" if parts else ""
            undefended = f"undefended {harm.mean:.0f} % harmful{also}{_collapse(comparison, plain)}"
            sentences.append(f"{scene}, p = {ratio:g}: {undefended}.{told}")
    return sentences or ["No undefended cell is finished yet, so no defense can be compared with it."]


def _costs(comparison: Comparison, place: Place, plain: Place) -> str:
    """Return a defense's loss of accuracy and rise of over-refusal, in points, if they are beyond the noise."""
    costs = ""
    for metric, word in COSTS.items():
        ends = comparison.difference(place, plain, metric)
        mine, other = (comparison.spread(p, metric) for p in (place, plain))
        if ends is None or mine is None or other is None:
            continue
        if ends[0] > 0 if LOWER_IS_BETTER[metric] else ends[1] < 0:
            costs += f", {word} {mine.mean - other.mean:+.0f} points"
    return costs


def _collapse(comparison: Comparison, place: Place) -> str:
    """Return a note if the harmful score is low because answers collapsed, not because the model refuses."""
    count, seeds = comparison.collapsed(place), len(comparison.cells[place])
    return f", low because answers collapsed{f' in {count} of {seeds} seeds' if seeds > 1 else ''}" if count else ""
