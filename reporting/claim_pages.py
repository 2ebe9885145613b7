"""The pages of the claims, results/CLAIMS.md and results/claims/, and their figures."""

import itertools
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from reporting.claims import Claim
from reporting.effects import Effect
from reporting.render import format_interval
from reporting.statistics import SIMILAR_ERRORS, SIMILAR_P_VALUE, Interval, Verdict

STYLES: dict[Verdict, tuple[str, str]] = {
    "equivalent": ("o", "tab:blue"),
    "better": ("^", "tab:green"),
    "worse": ("v", "tab:red"),
    "undecided": ("d", "tab:gray"),
}
"""The marker and the color of each verdict."""
MAX_DRAWN = 10

OVERVIEW = """\
# Claims and verdicts

Written by `make claims` from the records in this folder. Each claim lists its decisive comparisons; its page has its
rule and all comparisons. Decisive ones are chosen for what the claim says: on the largest data or the paper's own,
with the longest training. They change when runs with more data or longer training come in. An accuracy is *equivalent*
to another if they differ by less than 1 point and by less than 10% of the other's errors (two one-sided tests at 5%);
otherwise it is *better* or *worse* if the 95% interval excludes 0, and *undecided* if not. **Bold** verdicts survive
Holm's correction for all comparisons of their claim. C1 asks for *equivalent* or *better*, as C3 does of approximations
against originals; the others ask for *better*. Intervals cover seeds alone, for these images, unless they name images.
Epochs and learning rates were chosen by validation accuracy, which is therefore optimistic."""

LEGEND = f"""\
[CLAIMS.md](../CLAIMS.md) defines the verdicts. *n* says what a 95% interval covers: seeds or images alone (t-interval
of paired differences), both (crossed random effects), or filters (bootstrap). A *shared variance* over seeds is the
residual mean square of rows x seeds, over a table's rows with the same reference and 1/{SIMILAR_ERRORS:g} to
{SIMILAR_ERRORS:g} times its errors, unless Bartlett's test finds their variances to differ (p < {SIMILAR_P_VALUE:g}).
With few seeds, this test misses many a row that varies more than the others: if its standard deviation is 2.5 times
theirs, its interval covers the truth in about 86% of all cases, not 95%.
Intervals are not adjusted for the number of comparisons. **Bold** verdicts survive Holm's correction: *better* and
*worse* for all tests of a difference on this page, *equivalent* for all tests of equivalence on it; a bootstrap has no
such test."""


def render_overview(evidence: Sequence[tuple[Claim, Sequence[Effect]]], untested: Mapping[str, str]) -> str:
    """Renders the page of all claims.

    Args:
        evidence: the claims and their effects.
        untested: what was not tested -> the command that would test it.
    """
    lines = [OVERVIEW]
    for claim, effects in evidence:
        by_key = {effect.key: effect for effect in effects}
        lines += ["", f"## [{claim.name}](claims/{claim.name}.md): {claim.text}", ""]
        lines += [
            f"- {name}: {_describe(by_key[key]) if key in by_key else 'not run'}"
            for key, name in claim.decisive.items()
        ]
        counts = Counter(effect.verdict for effect in effects)
        total = ", ".join(f"{counts[verdict]} {verdict}" for verdict in STYLES if counts[verdict])
        lines.append(f"- *{claim.caveat}* [All comparisons](claims/{claim.name}.md): {total or 'not run'}.")
    if untested:
        lines += ["", "## Not tested", "", *(f"- {what}: `{command}`" for what, command in untested.items())]
    return "\n".join(lines) + "\n"


def _describe(effect: Effect) -> str:
    parts = [_format_verdict(effect), _format_estimate(effect, effect.interval)]
    parts.append(f"{effect.interval.n:,} {effect.interval.sampled}")
    if effect.ratio is not None and effect.ratio >= 1.05:
        parts.append(f"{effect.ratio:.1f} times fewer parameters")
    if effect.on_validation is not None and "images" not in effect.interval.sampled:
        parts.append(f"on validation images {_format_estimate(effect, effect.on_validation)}")
    return ", ".join(filter(None, parts))


def render_claim(
    claim: Claim, effects: Sequence[Effect], missing: Sequence[str], approximations: Sequence[str] = ()
) -> str:
    """Renders the page of one claim: all of its effects, the decisive ones first, and what is missing.

    Args:
        approximations: the names of files with figures of approximations without training.
    """
    lines = [f"# {claim.name}: {claim.text}", "", f"Source: {claim.source}. {claim.rule}", "", LEGEND, ""]
    if effects:
        lines += [
            "| data | effect | reference / row | estimate | n | verdict |",
            "|---|---|---:|---:|---:|---|",
            *map(_format_row, _sort(claim, effects)),
            "",
        ]
    if _select_drawn(claim, effects):
        lines += [
            f"The figure shows the decisive comparisons and, up to {MAX_DRAWN} in all, those with the narrowest "
            "intervals in units of their margins of equivalence.",
            "",
            f"![Effects with their 95% intervals]({claim.name}.png)",
            "",
        ]
    for name in approximations:
        lines += [f"![Accuracy without training against numbers per kernel]({name})", ""]
    lines += [f"- Not run: {item}." for item in missing]
    return "\n".join(lines).rstrip() + "\n"


def _format_row(effect: Effect) -> str:
    ratio = "" if effect.ratio is None else f"{effect.ratio:.2f}"
    return (
        f"| [{effect.data}](../{effect.source}) | {effect.what} | {ratio} "
        f"| {_format_estimate(effect, effect.interval)} | {effect.interval.n:,} {effect.interval.sampled} "
        f"| {_format_verdict(effect)} |"
    )


def _format_verdict(effect: Effect) -> str:
    return f"**{effect.verdict}**" if effect.survives_correction else effect.verdict or ""


def _format_estimate(effect: Effect, interval: Interval) -> str:
    number = "+.2f" if effect.unit == "points" else ".3g"
    return f"{format_interval(interval.mean, interval.low, interval.high, number)} {effect.unit}"


def _sort(claim: Claim, effects: Sequence[Effect]) -> list[Effect]:
    """Sorts the decisive effects to the front."""
    return sorted(effects, key=lambda effect: (*claim.decisive, effect.key).index(effect.key))


def _select_drawn(claim: Claim, effects: Sequence[Effect]) -> list[Effect]:
    """Selects the decisive effects, then those with the narrowest interval in units of the margin of equivalence."""

    def compute_rank(effect: Effect) -> tuple[bool, float]:
        assert effect.margin is not None
        return effect.key not in claim.decisive, (effect.interval.high - effect.interval.low) / effect.margin

    candidates = [effect for effect in effects if effect.margin and effect.interval.standard_error is not None]
    return _sort(claim, sorted(candidates, key=compute_rank)[:MAX_DRAWN])


def draw_effects(claim: Claim, effects: Sequence[Effect]) -> Figure | None:
    """Draws up to ``MAX_DRAWN`` of a claim's differences in accuracy; None if there are none."""
    drawn = _select_drawn(claim, effects)
    if not drawn:
        return None
    labels = [textwrap.fill(claim.decisive.get(effect.key, effect.key), 88) for effect in drawn]
    tops = list(itertools.accumulate([0.3 + 0.15 * (label.count("\n") + 1) for label in labels], initial=0.0))  # inches
    figure = Figure(figsize=(6, tops[-1] + 1.3), layout="constrained")
    axes = figure.subplots()
    for effect, label, top, bottom in zip(drawn, labels, tops, tops[1:], strict=False):
        assert effect.margin is not None and effect.verdict is not None
        interval, position = effect.interval, 0.15 - bottom
        error = [[interval.mean - interval.low], [interval.high - interval.mean]]
        marker, color = STYLES[effect.verdict]
        axes.barh(position, 2 * effect.margin, left=-effect.margin, height=0.2, color="0.88")
        axes.plot([0, 0], [position - 0.1, position + 0.1], color="black", linewidth=0.8)
        axes.errorbar(interval.mean, position, xerr=error, marker=marker, markersize=5, color=color, capsize=2)
        axes.text(0.01, -top - 0.02, label, va="top", fontsize=8, transform=axes.get_yaxis_transform())
    axes.set_ylim(-tops[-1], 0)
    axes.set_yticks([])
    axes.set_xscale("symlog", linthresh=1.0)
    limit = max(1.5, *(abs(bound) * 1.3 for effect in drawn for bound in (effect.interval.low, effect.interval.high)))
    ticks = [sign * tick for tick in (1, 2, 5, 10, 20, 50, 100) for sign in (-1, 1) if tick < limit]
    axes.set_xticks([0, *ticks], [f"{tick:g}" for tick in (0, *ticks)], fontsize=8)
    axes.tick_params(axis="x", which="minor", bottom=False)
    axes.set_xlabel(
        "points of accuracy (linear up to 1), 95% intervals; gray: margin, equivalent if the 90% interval is inside",
        fontsize=8,
    )
    for verdict, (marker, color) in STYLES.items():
        axes.plot([], [], marker, color=color, markersize=5, label=verdict)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.suptitle(textwrap.fill(f"{claim.name}: {claim.text}", 75), fontsize=9)
    return figure
