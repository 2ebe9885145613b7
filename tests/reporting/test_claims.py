import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from evaluation.measurements import (
    MEASUREMENTS,
    Line,
    Measurement,
    Summary,
    read_measurements,
)
from reporting.claim_pages import MAX_DRAWN, draw_effects, render_claim, render_overview
from reporting.claims import Claim, collect_effects, load_claims
from reporting.effects import Effect
from reporting.statistics import interval_of_mean
from tests.reporting.helpers import load_settings, make_record
from training.errors import UsageError
from training.files import to_json_lines

ROOT = Path(__file__).parents[2]


def make_effect(what: str = "a row", mean: float = 0.5, half: float = 0.1, **changes: Any) -> Effect:
    """An effect with the values ``mean`` - ``half``, ``mean`` and ``mean`` + ``half``."""
    interval = interval_of_mean(pd.Series([mean - half, mean, mean + half]))
    return Effect("mnist", what, "points", interval, "tables/mnist.md", **{"margin": 1.0, **changes})


def write_table(folder: Path, **accuracies: list[float]) -> None:
    """Writes records of the table ``mnist`` with rows of its own, whose accuracies by seed are given."""
    records = [
        make_record(seed, top1, conv=len(row), row=row).to_dict()
        for row, values in accuracies.items()
        for seed, top1 in enumerate(values)
    ]
    (folder / "tables").mkdir(parents=True)
    (folder / "tables/mnist.jsonl").write_text(to_json_lines(records))


def write_measurements(folder: Path, name: str, values: dict[str, list[dict[str, Any]]], table: str = "mnist") -> None:
    lines = [
        {"row": row, "id": f"{row}{seed}", "seed": seed, "values": value}
        for row, by_seed in values.items()
        for seed, value in enumerate(by_seed)
    ]
    (folder / "evidence").mkdir(parents=True, exist_ok=True)
    (folder / f"evidence/{table}_{name}.jsonl").write_text(to_json_lines(lines))


def make_claim(*comparisons: dict[str, str], **options: Any) -> Claim:
    """A claim on rows, row -> the row that it is compared with, of the table ``mnist``."""
    compared = [{"tables": ["mnist"], "rows": rows} for rows in comparisons]
    texts = {"text": "A claim.", "source": "a test", "rule": "A rule.", "caveat": "A caveat."}
    return Claim(name="C0", **texts, comparisons=compared, **{"decisive": {}, **options})


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "equivalent"),  # although the interval is above 0
        ({"mean": -0.5}, "equivalent"),
        ({"mean": 1.5}, "better"),
        ({"mean": -1.5}, "worse"),
        ({"half": 1.0}, "undecided"),
        ({"margin": 0.4}, "better"),
        ({"margin": None}, "better"),
        ({"margin": None, "threshold": 1.0}, "worse"),
        ({"threshold": None}, None),
    ],
)
def test_verdict_is_equivalent_first(changes: dict[str, Any], verdict: str | None) -> None:
    assert make_effect(**changes).verdict == verdict


def test_margin_is_share_of_errors_of_accurate_reference(tmp_path: Path) -> None:
    write_table(tmp_path, plain=[99.4, 99.2, 99.3], analytic=[99.0, 98.9, 99.1], weak=[50.0, 51.0, 52.0])
    claim = make_claim({"analytic": "plain"}, {"analytic": "weak"})
    effects, _ = collect_effects(claim, tmp_path)
    assert [effect.margin for effect in effects] == pytest.approx([0.07, 1.0])
    assert effects[0].verdict == "worse"  # by less than a point


def test_verdicts_are_corrected_for_all_effects_of_a_claim(tmp_path: Path) -> None:
    write_table(tmp_path, plain=[50.0, 40.0, 30.0], clear=[53.0, 43.3, 32.8], vague=[53.0, 46.0, 33.2])
    pairs = [{row: "plain"} for row in ("clear", "vague")]
    together, _ = collect_effects(make_claim(*pairs), tmp_path)
    assert [effect.verdict for effect in together] == ["better", "undecided"]
    assert [effect.survives_correction for effect in together] == [True, False]
    alone, _ = collect_effects(make_claim(pairs[0]), tmp_path)
    many, _ = collect_effects(make_claim(pairs[0], *30 * [pairs[1]]), tmp_path)
    assert alone[0].survives_correction and many[0].verdict == "better" and not many[0].survives_correction


def test_single_seed_is_undecided(tmp_path: Path) -> None:
    write_table(tmp_path, plain=[90.0], analytic=[95.0])
    (effect,), _ = collect_effects(make_claim({"analytic": "plain"}), tmp_path)
    assert (effect.interval.mean, effect.verdict, effect.p_value_of_difference) == (5.0, "undecided", None)


def test_comparison_is_paired_by_seed(tmp_path: Path) -> None:
    write_table(tmp_path, plain=[50.0, 40.0, 30.0], analytic=[53.0, 43.0, 33.5])
    (effect,), missing = collect_effects(make_claim({"analytic": "plain"}), tmp_path)
    assert effect.interval.mean == pytest.approx(9.5 / 3)
    assert effect.interval.high - effect.interval.low < 2  # far less than the spread of a row
    assert (effect.interval.n, effect.ratio, effect.verdict, missing) == (3, 5 / 8, "better", [])


def test_table_without_test_results_gives_no_effect(tmp_path: Path) -> None:
    records = [make_record(0, 90.0, row=row, test=None).to_dict() for row in ("plain", "analytic")]
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables/mnist.jsonl").write_text(to_json_lines(records))
    effects, missing = collect_effects(make_claim({"analytic": "plain"}), tmp_path)
    assert effects == [] and missing == ["'analytic' against 'plain' in table mnist"]


def test_missing_records_are_listed_with_their_command(tmp_path: Path) -> None:
    write_table(tmp_path, plain=[90.0, 80.0])
    comparisons = [{"tables": ["mnist", "other"], "rows": {"analytic": "plain"}}]
    claim = replace(make_claim(measurements={"shapley": ["mnist"]}), comparisons=comparisons)
    effects, missing = collect_effects(claim, tmp_path)
    assert effects == []
    assert missing == [
        "'analytic' against 'plain' in table mnist",
        "`make reproduce-table TABLE=other`",
        "`scripts/measure.py table=mnist measurement=shapley`",
    ]


def test_shapley_and_travel_are_averaged_over_seeds(tmp_path: Path) -> None:
    write_measurements(tmp_path, "shapley", {"mosaic": [{"G": 1.0, "P": 4.0}, {"G": 3.0, "P": 4.0}], "plain": [{}]})
    write_measurements(tmp_path, "akp_travel", {"mosaic": [{"G/theta": 10.0, "G/sigma": 0.1}]})
    claim = make_claim(measurements={"shapley": ["mnist"], "akp_travel": ["mnist"]})
    effects, _ = collect_effects(claim, tmp_path)
    assert [(e.what, e.interval.mean, e.unit, e.interval.n) for e in effects] == [
        ("Shapley value of Gabor in mosaic", 2.0, "points", 2),
        ("Shapley value of Plain in mosaic", 4.0, "points", 2),
        ("distance traveled by theta of Gabor in mosaic, not modulo its period", 10.0, "degrees", 1),
        ("distance traveled by sigma of Gabor in mosaic", 0.1, "px", 1),
    ]
    assert effects[2].verdict is None and effects[1].interval.low == effects[1].interval.high == 4.0


def test_replaced_akps_are_compared_with_trained_ones_by_seed(tmp_path: Path) -> None:
    trained = [{"trained": 90.0, "initial": 80.0, "redrawn": 10.0}, {"trained": 92.0, "initial": 92.0, "redrawn": 14.0}]
    write_measurements(tmp_path, "replaced_akps", {"plain": [{}], "mosaic": trained})
    effects, _ = collect_effects(make_claim(measurements={"replaced_akps": ["mnist"]}), tmp_path)
    assert [(e.what, e.interval.mean, e.interval.n, e.threshold) for e in effects] == [
        ("mosaic: AKPs trained, against initial ones", 5.0, 2, 0.0),
        ("mosaic: AKPs trained, against redrawn ones", 79.0, 2, None),
    ]


def test_corruptions_and_attacks_compare_mean_accuracy_by_seed(tmp_path: Path) -> None:
    plain, gabor = "LeNet-5 plain", "all Gabor"
    lowered = {plain: [(80.0, 60.0), (70.0, 50.0)], gabor: [(82.0, 64.0), (71.0, 55.0)]}
    corrupted, attacked = (
        {row: [make(*values) for values in by_seed] for row, by_seed in lowered.items()}
        for make in (
            lambda noise, blur: {"none": 99.0, "noise": [noise, noise], "blur": [blur]},
            lambda small, large: {"0": 99.0, "1": small, "2": large},
        )
    )
    write_measurements(tmp_path, "corruptions", corrupted, "mnist")
    write_measurements(tmp_path, "attacks", attacked, "mnist")
    effects, _ = collect_effects(make_claim(measurements={"corruptions": ["mnist"], "attacks": ["mnist"]}), tmp_path)
    assert [(e.what, e.interval.mean, e.verdict) for e in effects] == [
        ("all Gabor, under corruptions, against LeNet-5 plain", 3.0, "better"),
        ("all Gabor, under noise, against LeNet-5 plain", 1.5, None),
        ("all Gabor, under blur, against LeNet-5 plain", 4.5, None),
        ("all Gabor, under attacks, against LeNet-5 plain", 3.0, "better"),
    ]


def test_control_of_measured_table_is_described_without_verdict(tmp_path: Path) -> None:
    accuracies = {"LeNet-5 plain": 70.0, "plain, zero-sum conv1": 72.0, "all Gabor": 75.0}
    values = {row: [{"0": 90.0, "0.1": value + seed} for seed in range(3)] for row, value in accuracies.items()}
    write_measurements(tmp_path, "attacks", values, table="fashion_mnist_robust")
    effects, _ = collect_effects(make_claim(measurements={"attacks": ["fashion_mnist_robust"]}), tmp_path)
    assert {effect.what: (effect.interval.mean, effect.verdict) for effect in effects} == {
        "plain, zero-sum conv1, under attacks, against LeNet-5 plain": (2.0, None),
        "all Gabor, under attacks, against LeNet-5 plain": (5.0, "better"),
        "all Gabor, under attacks, against plain, zero-sum conv1": (3.0, "better"),
    }


def test_transforms_compare_closed_form_with_other_ways(tmp_path: Path) -> None:
    def make_ways(closed: float, resampled: float, unchanged: float) -> dict[str, dict[str, float]]:
        ways = {"closed form": closed, "resampled": resampled, "unchanged": unchanged}
        return {way: {"top1": top1, "error": 100 - top1} for way, top1 in ways.items()}

    values = [
        {
            "rotation": {
                "15": make_ways(80, 70, 60 - seed),
                "45": make_ways(90, 80, 50 - seed),
                "90": make_ways(0, 9, 9),
            },
            "scale": {"2": make_ways(50, 60, 10)},
        }
        for seed in range(3)
    ]
    write_measurements(tmp_path, "transforms", {"plain": [{}], "all Gabor": values})
    effects, _ = collect_effects(make_claim(measurements={"transforms": ["mnist"]}), tmp_path)
    assert [(e.interval.mean, e.unit, e.verdict) for e in effects] == [
        (10.0, "points", "better"),
        (31.0, "points", "better"),
        (10.0, "%", "better"),
        (-10.0, "points", "worse"),
        (40.0, "points", "better"),
        (-10.0, "%", "worse"),
    ]


def test_approximations_are_compared_over_images(tmp_path: Path) -> None:
    def make_line(method: str, correct: list[bool]) -> dict[str, Any]:
        probes = {"probe_correct": correct, "refitted_probe_correct": correct}
        errors = {"output_error_percent": [1.0, 2.0, 3.0, 4.0]}
        setting = {
            "method": method,
            "numbers": 5,
            "numbers_per_kernel": 5.0,
            "overrides": ["data=mnist"],
            "layer": "conv1",
        }
        return {**setting, **probes, **errors}

    lines = [
        make_line("original", [True] * 4),
        make_line("Gabor fit", [True, True, True, False]),
        make_line("codebook", [True, False, False, False]),
    ]
    (tmp_path / "evidence").mkdir()
    (tmp_path / "evidence/flowers17_approximations.jsonl").write_text(to_json_lines(lines))
    claim = next(claim for claim in load_claims() if claim.name == "C3")
    effects = [effect for effect in collect_effects(claim, tmp_path)[0] if effect.interval.sampled == "images"]
    assert [(e.what, e.interval.mean, e.interval.n) for e in effects[:4]] == [
        ("error of conv1's outputs, Gabor fit, 5.0 numbers per kernel", 2.5, 4),
        ("error of conv1's outputs, codebook, 5.0 numbers per kernel", 2.5, 4),
        ("linear probe, Gabor fit with 5 numbers per kernel, against the original", -25.0, 4),
        ("linear probe, Gabor fit with 5 numbers per kernel, against codebook", 50.0, 4),
    ]


INVALID = r", line 1, is not a measurement of {name}: "


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("shapley", [], INVALID),
        ("shapley", {"G": math.nan}, INVALID + "values.G=nan is invalid: it should be a finite number"),
        ("shapley", {"X": 1.0}, " is corrupt: 'X'"),
        ("akp_travel", {"G/x": 1.0}, " is corrupt: "),
        ("akp_travel", {"G/theta": math.inf}, INVALID),
        ("replaced_akps", {"initial": 1.0}, " is corrupt: "),
        ("replaced_akps", {"trained": 250.0, "initial": 1.0}, INVALID + "values.trained=250.0 is invalid"),
        ("corruptions", {"none": 1.0}, " is corrupt: division by zero"),
        ("corruptions", {"none": 1.0, "noise": []}, INVALID),
        ("attacks", {"0": 1.0}, " is corrupt: division by zero"),
        ("transforms", {"scale": {"2": {"closed form": {"top1": 1.0}}}}, INVALID),
    ],
)
def test_invalid_values_raise_one_line_error(tmp_path: Path, name: str, values: Any, message: str) -> None:
    write_measurements(tmp_path, name, {"LeNet-5 plain": [values], "all Gabor": [values]}, "mnist")
    with pytest.raises(UsageError, match=rf"mnist_{name}\.jsonl{message.format(name=name)}[^\n]*$"):
        collect_effects(make_claim(measurements={name: ["mnist"]}), tmp_path)


def test_repeated_measurement_raises_one_line_error(tmp_path: Path) -> None:
    write_measurements(tmp_path, "shapley", {"mosaic": [{"G": 1.0}, {"G": 2.0}]})
    file = tmp_path / "evidence/mnist_shapley.jsonl"
    file.write_text(2 * file.read_text())
    with pytest.raises(
        UsageError, match=r"mnist_shapley\.jsonl, line 3, repeats line 1: row 'mosaic', seed 0; delete one"
    ):
        collect_effects(make_claim(measurements={"shapley": ["mnist"]}), tmp_path)


OTHER_RUN = r", was not measured on a run in .*measure\.py"


@pytest.mark.parametrize(
    ("record", "line", "problem"),
    [
        ({}, {}, None),
        ({}, {"weights": "a"}, None),  # the record is older than digests
        ({"weights": "a"}, {"weights": "a"}, None),
        ({"weights": "a"}, {"weights": "b"}, OTHER_RUN),
        ({"weights": "a"}, {}, OTHER_RUN),  # only an earlier version writes no digest, so the run was trained again
        ({}, {"id": "0" * 12}, OTHER_RUN),
        ({}, {"row": "renamed"}, r": .*mnist\.jsonl has no row 'renamed' with seed 0; delete the line$"),
        ({}, {"seed": 1}, r": .*mnist\.jsonl has no row 'mosaic' with seed 1; delete the line$"),
    ],
)
def test_measurement_of_other_weights_than_those_of_table_is_refused(
    tmp_path: Path, record: dict[str, str], line: dict[str, Any], problem: str | None
) -> None:
    run = make_record(0, 90.0, row="mosaic", **record)
    for folder, name, values in (
        ("tables", "mnist", run.to_dict()),
        ("evidence", "mnist_shapley", {"row": "mosaic", "id": run.id, "seed": 0, "values": {"G": 1.0}, **line}),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{name}.jsonl").write_text(to_json_lines([values]))
    claim = make_claim(measurements={"shapley": ["mnist"]})
    if problem is not None:
        with pytest.raises(UsageError, match=r"mnist_shapley\.jsonl, line 1" + problem):
            collect_effects(claim, tmp_path)
    else:
        assert len(collect_effects(claim, tmp_path)[0]) == 1


def test_unknown_decisive_comparison_is_refused_unless_something_is_missing(tmp_path: Path) -> None:
    write_table(tmp_path, plain=[90.0, 91.0], gabor=[90.0, 91.0])
    options: dict[str, Any] = {"decisive": {"mnist: Gabor, against plain": "a typo"}}
    with pytest.raises(UsageError, match="claim C0: its decisive 'mnist: Gabor, against plain' is none of its"):
        collect_effects(make_claim({"gabor": "plain"}, **options), tmp_path)
    assert len(collect_effects(make_claim({"gabor": "plain", "other": "plain"}, **options), tmp_path)[1]) == 1


def test_rows_without_common_seed_give_no_effect(tmp_path: Path) -> None:
    records = [make_record(seed, 90.0, row=row) for row, seed in (("plain", 0), ("plain", 1), ("analytic", 2))]
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables/mnist.jsonl").write_text(to_json_lines(record.to_dict() for record in records))
    write_measurements(tmp_path, "attacks", {"all Gabor": [{"0": 99.0, "1": 50.0}]}, "fashion_mnist")
    claim = make_claim({"analytic": "plain"}, measurements={"attacks": ["fashion_mnist"]})
    assert collect_effects(claim, tmp_path) == (
        [],
        [
            "analytic, against plain (mnist): no seed in common",
            "all Gabor, under attacks, against LeNet-5 plain (fashion_mnist): no seed in common",
        ],
    )


def test_page_of_single_seed_and_network_without_convolutions_has_no_nan(tmp_path: Path) -> None:
    records = [make_record(0, 90.0, conv=conv, row=row) for row, conv in (("plain", 9), ("none", 0))]
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables/mnist.jsonl").write_text(to_json_lines(record.to_dict() for record in records))
    claim = make_claim({"none": "plain"}, decisive={"mnist: none, against plain": "nothing"})
    effects, missing = collect_effects(claim, tmp_path)
    page, overview = render_claim(claim, effects, missing), render_overview([(claim, effects)], {})
    assert "| none, against plain |  | +0.00 points | 1 seeds | undecided |" in page
    assert "- nothing: undecided, +0.00 points, 1 seeds" in overview
    assert "nan" not in page + overview


def test_ratio_of_parameters_is_of_means_over_seeds(tmp_path: Path) -> None:
    rows = {"plain": (100, 100), "auto": (20, 30)}
    records = [make_record(s, 90.0, conv, row=row) for row, counts in rows.items() for s, conv in enumerate(counts)]
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables/mnist.jsonl").write_text(to_json_lines(record.to_dict() for record in records))
    (effect,), _ = collect_effects(make_claim({"auto": "plain"}), tmp_path)
    assert effect.ratio == 4.0


def test_new_measurement_is_one_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Sharpness(Measurement):
        name = "sharpness"
        values = dict[str, float]

        @staticmethod
        def summarize(lines: Sequence[Line]) -> Iterable[Summary]:
            yield Summary("mosaic", "sharpness", pd.Series({line.seed: line.values["x"] for line in lines}), None)

    monkeypatch.setitem(MEASUREMENTS, Sharpness.name, Sharpness)
    write_measurements(tmp_path, "sharpness", {"mosaic": [{"x": 1.0}, {"x": 2.0}]})
    (effect,), missing = collect_effects(make_claim(measurements={"sharpness": ["mnist", "other"]}), tmp_path)
    assert (effect.what, effect.interval.mean, effect.interval.n) == ("sharpness", 1.5, 2)
    assert missing == ["`scripts/measure.py table=other measurement=sharpness`"]


@pytest.mark.parametrize("line", ["{", "[]", '{"row": "plain"}'])
def test_corrupt_measurement_raises_one_line_error(tmp_path: Path, line: str) -> None:
    write_measurements(tmp_path, "shapley", {})
    (tmp_path / "evidence/mnist_shapley.jsonl").write_text(line)
    with pytest.raises(UsageError, match=r"mnist_shapley.jsonl, line 1, is not [^\n]*$"):
        collect_effects(make_claim(measurements={"shapley": ["mnist"]}), tmp_path)


def test_committed_measurements_are_rewritten_byte_by_byte() -> None:
    for name, measurement in MEASUREMENTS.items():
        for file in (ROOT / "results/evidence").glob(f"*_{name}.jsonl"):
            lines = read_measurements(file, measurement)
            assert to_json_lines(line.to_dict() for line in lines) == file.read_text()


def test_overview_prints_verdicts_that_survive_correction_in_bold() -> None:
    effects = [make_effect(name, 1.5, survives_correction=name == "bold") for name in ("bold", "pale")]
    claim = make_claim(decisive={"mnist: bold": "first", "mnist: pale": "second"})
    overview = render_overview([(claim, effects)], {})
    assert "- first: **better**, +1.50" in overview and "- second: better, +1.50" in overview


def test_decisive_effects_come_first_on_page_and_figure() -> None:
    narrow = [make_effect(f"narrow {i}", half=0.01 * (i + 1)) for i in range(MAX_DRAWN)]
    wide, text = make_effect("wide", half=9.0), make_effect("description", threshold=None, margin=None)
    claim = make_claim(decisive={"mnist: wide": "the point", "mnist: absent": "another"})
    effects = [*narrow, text, wide]
    figure = draw_effects(claim, effects)
    assert figure is not None
    labels = [label.get_text() for label in figure.axes[0].texts]
    assert labels == ["the point", *(f"mnist: narrow {i}" for i in range(MAX_DRAWN - 1))]
    assert draw_effects(claim, [text]) is None
    page = render_claim(claim, effects, ["a table"])
    assert page.index("| wide |") < page.index("| narrow 0 |") and page.endswith("- Not run: a table.\n")
    overview = render_overview([(claim, effects)], {"a network": "a command"})
    assert "- the point: undecided, +0.50 [" in overview and "- another: not run\n" in overview
    assert "[All comparisons](claims/C0.md): 10 equivalent, 1 undecided." in overview
    assert overview.endswith("## Not tested\n\n- a network: `a command`\n")


def test_committed_overview_fits_on_one_screen() -> None:
    page = (ROOT / "results/CLAIMS.md").read_text()
    assert len(page.splitlines()) <= 60 and ": not run" not in page
    assert all(1 <= len(claim.decisive) <= 3 for claim in load_claims())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measurements": {"speed": ["mnist"]}}, "claim C0 names the measurement 'speed'; known: akp_travel, "),
        ({"files": {"a.json": "train"}}, "claim C0 names the script 'train'; known: approximate, "),
    ],
)
def test_claim_on_unknown_records_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_claim(**options)


def test_every_pair_names_rows_of_its_table() -> None:
    for claim in load_claims():
        for table, row, reference in claim.pairs:
            assert {row, reference} <= {settings["name"] for settings in load_settings(table).rows}
