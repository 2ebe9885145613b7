from pathlib import Path
from typing import Any

import pytest

from reporting.claims import CLAIMS, Claim, Comparison, Effect, collect_effects, draw_effects, render_claims
from reporting.table import to_json_lines
from tests.reporting.helpers import load_settings, make_record
from training.errors import UsageError

ROOT = Path(__file__).parents[2]


def make_effect(low: float, high: float, threshold: float | None = -1.0, n: int = 5) -> Effect:
    return Effect("mnist", "a row", "points", (low + high) / 2, low, high, n, threshold, "tables/mnist.md")


def write_table(folder: Path, **accuracies: list[float]) -> None:
    """Writes records of a table ``toy``, whose row names and accuracies by seed are given."""
    records = [
        {"row": row, **make_record(seed, top1, conv=len(row))}
        for row, values in accuracies.items()
        for seed, top1 in enumerate(values)
    ]
    (folder / "tables").mkdir(parents=True)
    (folder / "tables/toy.jsonl").write_text(to_json_lines(records))


def write_measurements(folder: Path, name: str, values: dict[str, list[dict[str, Any]]]) -> None:
    lines = [
        {"row": row, "id": f"{row}{seed}", "seed": seed, "values": value}
        for row, by_seed in values.items()
        for seed, value in enumerate(by_seed)
    ]
    (folder / "evidence").mkdir(parents=True, exist_ok=True)
    (folder / f"evidence/toy_{name}.jsonl").write_text(to_json_lines(lines))


def make_claim(*comparisons: Comparison, **options: Any) -> Claim:
    return Claim("C0", "A claim.", "a test", "A rule.", comparisons, **options)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(-0.9, 2.0, "holds"), (-3.0, -1.1, "does not hold"), (-1.5, 0.0, "undecided"), (-1.0, 0.0, "undecided")],
)
def test_verdict_holds_only_if_whole_interval_is_beyond_threshold(low: float, high: float, verdict: str) -> None:
    assert make_effect(low, high).verdict == verdict


def test_seeds_to_decide_grow_with_square_of_interval() -> None:
    assert make_effect(-2.0, 2.0, threshold=-1.0, n=5).seeds_to_decide == 20
    assert make_effect(-0.5, 2.0).seeds_to_decide is None
    assert make_effect(-1.0, 1.0, threshold=0.0).seeds_to_decide is None  # its mean is the threshold
    assert make_effect(-1.0, 1.0, threshold=None).seeds_to_decide is None


def test_single_seed_is_undecided(tmp_path: Path) -> None:
    write_table(tmp_path, plain=[90.0], analytic=[95.0])
    (effect,), _ = collect_effects(make_claim(Comparison("toy", "analytic", "plain")), tmp_path)
    assert (effect.mean, effect.verdict, effect.seeds_to_decide) == (5.0, "undecided", None)


def test_comparison_is_paired_by_seed(tmp_path: Path) -> None:
    write_table(tmp_path, plain=[90.0, 80.0, 70.0], analytic=[91.0, 81.0, 71.5])
    (effect,), missing = collect_effects(make_claim(Comparison("toy", "analytic", "plain")), tmp_path)
    assert effect.mean == pytest.approx(3.5 / 3)
    assert effect.high - effect.low < 2  # far less than the spread of a row
    assert (effect.n, effect.ratio, effect.verdict, missing) == (3, 5 / 8, "holds", [])


def test_missing_records_are_listed_with_their_command(tmp_path: Path) -> None:
    write_table(tmp_path, plain=[90.0, 80.0])
    claim = make_claim(
        Comparison("toy", "analytic", "plain"),
        Comparison("other", "analytic", "plain"),
        measurements={"shapley": ("toy",)},
        not_run=("something else",),
    )
    effects, missing = collect_effects(claim, tmp_path)
    assert effects == []
    assert missing == [
        "'analytic' against 'plain' in table toy",
        "`make reproduce-table TABLE=other`",
        "`scripts/measure.py table=toy measurement=shapley`",
    ]


def test_shapley_and_travel_are_averaged_over_seeds(tmp_path: Path) -> None:
    write_measurements(tmp_path, "shapley", {"mosaic": [{"G": 1.0, "P": 4.0}, {"G": 3.0, "P": 4.0}], "plain": [{}]})
    write_measurements(tmp_path, "akp_travel", {"mosaic": [{"G/theta": 10.0, "G/sigma": 0.1}]})
    claim = make_claim(measurements={"shapley": ("toy",), "akp_travel": ("toy",)})
    effects, _ = collect_effects(claim, tmp_path)
    assert [(e.what, e.mean, e.unit, e.n) for e in effects] == [
        ("Gabor in mosaic", 2.0, "points", 2),
        ("Plain in mosaic", 4.0, "points", 2),
        ("distance traveled by theta of Gabor in mosaic", 10.0, "degrees", 1),
        ("distance traveled by sigma of Gabor in mosaic", 0.1, "px", 1),
    ]
    assert effects[2].verdict == "" and effects[1].low == effects[1].high == 4.0


def test_corruptions_compare_mean_accuracy_by_seed(tmp_path: Path) -> None:
    plain, exp1 = "plain, pretrained", "exp1: Gabor, pretrained"
    corrupted = {plain: [(80.0, 60.0), (70.0, 50.0)], exp1: [(82.0, 64.0), (71.0, 55.0)]}
    values = {
        row: [{"none": 99.0, "noise": [noise, noise], "blur": [blur]} for noise, blur in by_seed]
        for row, by_seed in corrupted.items()
    }
    write_measurements(tmp_path, "corruptions", values)
    (effect,), _ = collect_effects(make_claim(measurements={"corruptions": ("toy",)}), tmp_path)
    assert (effect.mean, effect.low, effect.high) == (3.0, 3.0, 3.0)


@pytest.mark.parametrize("line", ["{", "[]", '{"row": "plain"}'])
def test_corrupt_measurement_is_one_line(tmp_path: Path, line: str) -> None:
    write_measurements(tmp_path, "shapley", {})
    (tmp_path / "evidence/toy_shapley.jsonl").write_text(line)
    with pytest.raises(UsageError, match=r"toy_shapley.jsonl, line 1, is not [^\n]*$"):
        collect_effects(make_claim(measurements={"shapley": ("toy",)}), tmp_path)


def test_committed_page_equals_page_from_committed_records() -> None:
    effects_of = {claim.name: collect_effects(claim, ROOT / "results") for claim in CLAIMS}
    assert render_claims(effects_of) == (ROOT / "results/CLAIMS.md").read_text("utf-8")
    assert sum(len(axes.get_yticks()) for axes in draw_effects(effects_of).axes) == sum(
        effect.unit == "points" and effect.threshold is not None
        for effects, _ in effects_of.values()
        for effect in effects
    )


def test_every_comparison_names_rows_of_its_table() -> None:
    for claim in CLAIMS:
        for comparison in claim.comparisons:
            rows = [row["name"] for row in load_settings(comparison.table).rows]
            assert comparison.row in rows and comparison.against in rows
