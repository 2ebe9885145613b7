import re
import shlex
import shutil
from pathlib import Path

import pytest

from reporting.render import describe_runs, draw_table, format_interval, render_latex, render_markdown
from reporting.rows import Row, summarize
from reporting.table import Table
from tests.reporting.helpers import forbid_calls, load_settings, make_record
from training.config import compose
from training.settings import parse_run

COMMITTED_TABLES = Path(__file__).parents[2] / "results" / "tables"


def make_row(name: str, *top1: float) -> Row:
    return Row(name, [], chosen=[], records=[make_record(seed, value) for seed, value in enumerate(top1)])


def test_markdown_shows_second_comparison() -> None:
    rows = [make_row("plain", 90.0, 92.0), make_row("Gabor", 91.0, 94.0)]
    lines = render_markdown("Title", rows, "Gabor", None, {"plain": [], "Gabor": []}).splitlines()
    assert lines[0] == "# Title"
    assert lines[2].endswith("| points against plain | points against Gabor |")
    assert lines[4].endswith("|  | -1.50 [-7.85, +4.85] |")
    assert lines[5].endswith("| +1.50 [-4.85, +7.85] |  |")


def test_markdown_says_what_intervals_cover() -> None:
    rows = [
        make_row(n, *v) for n, v in (("a", (90.0, 92.0)), ("b", (91.0, 94.0)), ("c", (90.0, 91.0)), ("d", (10, 60)))
    ]
    text = render_markdown("Title", rows, None, None, {row.name: [] for row in rows})
    assert (
        "95% t-intervals over seeds alone. The variance over seeds is the residual mean square of all similar rows "
        "with the same reference (for *d*: of the two rows alone)." in text
    )
    assert "95% t-intervals over seeds alone. " in render_markdown("Title", rows[:2], None, None, {"a": [], "b": []})
    text = render_markdown("Title", rows, "d", None, {row.name: [] for row in rows})
    assert "of the two rows alone); those against *d*, with 95% t-intervals over seeds alone. The epoch" in text


def test_markdown_lists_hyperparameters_chosen_by_search() -> None:
    row = make_row("plain", 90.0)
    row.chosen = ["optim.lr=2e-3", "optim.akp_lr_scale=15"]
    text = render_markdown("Title", [row], None, "Each row tries two candidates.", {"plain": []})
    assert "Each row tries two candidates." in text
    assert "| plain | `optim.lr=2e-3` `optim.akp_lr_scale=15` |" in text
    assert "| row | chosen |" not in render_markdown("Title", [row], None, None, {"plain": []})


def test_markdown_of_single_seed_has_no_spread_and_no_interval() -> None:
    rows = [make_row("plain", 90.0), make_row("Gabor", 91.5)]
    text = render_markdown("Title", rows, None, None, {"plain": [], "Gabor": []})
    assert "| 91.50 | +1.50 |" in text and "over 1 seed;" in text and "nan" not in text
    assert "paired by seed, without intervals." in text


def test_markdown_commands_are_quoted_for_shell() -> None:
    overrides = ["data=imagefolder", 'data.title="CIFAR-10 (JPEG)"', "arrangement.all=G25%_P75%", "seed=3"]
    text = render_markdown("Title", [make_row("plain", 90.0)], None, None, {"plain": overrides})
    assert read_commands(text) == {"plain": overrides}
    assert compose(overrides).data.title == "CIFAR-10 (JPEG)"


def check_latex(text: str, num_columns: int, num_rows: int) -> list[list[str]]:
    """Checks the structure of a tabular; returns its cells, the heading first."""
    lines = [line for line in text.splitlines() if not line.startswith("%")]
    assert lines[0] == rf"\begin{{tabular}}{{ll{'r' * (num_columns - 2)}}}" and lines[-1] == r"\end{tabular}"
    assert [line for line in lines if line.endswith("rule")] == [r"\toprule", r"\midrule", r"\bottomrule"]
    rows = [line for line in lines[1:-1] if not line.endswith("rule")]
    assert len(rows) == num_rows + 1 and all(row.endswith(r" \\") for row in rows)
    cells = [re.split(r"(?<!\\)&", row.removesuffix(r" \\")) for row in rows]
    assert {len(line) for line in cells} == {num_columns}
    for cell in (cell for line in cells for cell in line):
        assert cell.count("{") == cell.count("}") and len(re.findall(r"(?<!\\)\$", cell)) % 2 == 0
        assert not re.search(r"(?<!\\)[%_#]", cell)
    return [[cell.strip() for cell in line] for line in cells]


def test_latex_shows_cells_of_markdown() -> None:
    rows = [make_row("plain", 90.0, 92.0), make_row("Gabor", 91.0, 94.0)]
    cells = check_latex(render_latex("Title", rows, "Gabor"), 7, 2)
    assert cells[0][4:] == [r"top-1 test \%", "points against plain", "points against Gabor"]
    assert cells[1][4:] == [r"$91.00 \pm 1.41$", "", r"$-1.50\ [-7.85, +4.85]$"]
    assert cells[2][:5] == ["Gabor", "plain", "100", "1.00", r"$92.50 \pm 2.12$"]


def test_latex_escapes_special_characters() -> None:
    name = r"50% of $x_1$ & {a}^#~\b"
    row = Row(name, [], records=[make_record(0, 90.0, config={"arrangement": {"conv_1": "G50%_P50%"}})])
    text = render_latex("100%\nof it", [row, make_row("b", 91.0)], None)
    escaped = r"50\% of \$x\_1\$ \& \{a\}\textasciicircum \#\textasciitilde \textbackslash b"
    cells = check_latex(text, 6, 2)
    assert cells[1] == [escaped, r"conv\_1: G50\%\_P50\%", "100", "1.00", "$90.00$", ""]
    assert cells[0][5] == f"points against {escaped}" and cells[2][5] == "$+1.00$"
    assert text.startswith("% 100% of it. Written by scripts/reproduce_table.py")


@pytest.mark.parametrize(
    ("low", "high", "text"), [(-0.105, 1.2, "+0.50 [-0.10, +1.20]"), (float("nan"), float("nan"), "+0.50")]
)
def test_format_interval_omits_missing_interval(low: float, high: float, text: str) -> None:
    assert format_interval(0.5, low, high) == text


def test_describe_runs_lists_machines_versions_and_short_commits_once() -> None:
    records = [
        make_record(0, 90.0, commit="0123456789abcdef"),
        make_record(1, 91.0, commit="0123456789abcdef-dirty"),
        make_record(
            2, 92.0, commit="0123456789abcdef", machine={"device": "GPU", "threads": 4}, versions={"torch": "2.11"}
        ),
        make_record(3, 93.0),
    ]
    assert describe_runs(records) == (
        "3 epochs per run; 6 minutes for these runs on CPU, 2 threads; GPU, 4 threads; "
        "commit 0123456789ab, 0123456789ab-dirty, none; torch 2.11 or 2.6."
    )


def test_row_whose_runs_differ_in_size_shows_range_and_mean() -> None:
    sizes = (2277, 2276, 2487)
    records = [make_record(seed, 90.0, conv) for seed, conv in enumerate(sizes)]
    rows = [make_row("plain", 90.0, 91.0, 92.0), Row("auto", [], records=records)]
    frame = summarize(rows)
    mean = sum(sizes) / 3
    assert tuple(frame.loc[1, ["conv_params", "params", "conv_ratio"]]) == (round(mean), round(2 * mean), 100 / mean)
    text = render_markdown("Title", rows, None, None, {"plain": [], "auto": []})
    assert "| plain | plain | 100 | 1.00 |" in text and "| auto | plain | 2,276 to 2,487 | 0.04 |" in text


def test_network_without_convolutions_has_no_ratio() -> None:
    rows = [make_row("plain", 90.0, 91.0), Row("none", [], records=[make_record(s, 90.0, 0) for s in (0, 1)])]
    assert "| none | plain | 0 |  | 90.00" in render_markdown("Title", rows, None, None, {"plain": [], "none": []})
    draw_table(summarize(rows), "Title", "test")


def test_figure_draws_difference_and_error_of_each_row() -> None:
    small = Row("Gabor", [], records=[make_record(seed, top1, conv=50) for seed, top1 in enumerate((91.0, 94.0))])
    frame = summarize([make_row("plain", 90.0, 92.0), small])
    figure = draw_table(frame, "Title", "test")
    differences, errors = figure.axes
    assert [label.get_text() for label in differences.get_yticklabels()] == ["plain", "Gabor"]
    points, bars = zip(*[(point, bar) for point, _, (bar,) in differences.containers], strict=True)
    assert [(float(p.get_xdata()[0]), float(p.get_ydata()[0])) for p in points] == [(0.0, 0.0), (1.5, -1.0)]
    (low, high) = bars[1].get_segments()[0][:, 0]
    assert (low, high) == pytest.approx(tuple(frame.loc[1, ["diff_ci95_low", "diff_ci95_high"]]))
    assert [float(point.get_ydata()[0]) for point, _, _ in errors.containers] == [9.0, 7.5]
    assert figure.get_suptitle() == "Title, 2\u00a0seeds"
    assert differences.get_xlabel() == "points against plain (95% interval)"


def test_row_far_off_leaves_room_for_the_others() -> None:
    rows = [make_row(f"row {i}", 90.0 + i / 10, 92.0) for i in range(4)] + [make_row("frozen", 50.0, 52.0)]
    (axes,) = draw_table(summarize(rows), "Title", "test").axes
    assert axes.get_xscale() == "symlog" and axes.get_xlim()[0] < -40
    (axes,) = draw_table(summarize(rows[:4]), "Title", "test").axes
    assert axes.get_xscale() == "linear"


def test_figure_of_rows_of_equal_size_draws_differences_alone() -> None:
    figure = draw_table(summarize([make_row("plain", 90.0, 92.0), make_row("Gabor", 91.0, 94.0)]), "Title", "test")
    assert len(figure.axes) == 1


def test_figure_of_single_seed_has_no_intervals() -> None:
    figure = draw_table(summarize([make_row("plain", 90.0), make_row("Gabor", 91.0)]), "Title", "val")
    assert figure.get_suptitle() == "Title, 1\u00a0seed"
    for axes in figure.axes:
        for _, _, (bar,) in axes.containers:
            assert bar.get_segments()[0][0].tolist() == bar.get_segments()[0][1].tolist()


@pytest.fixture(scope="module", params=sorted(path.stem for path in COMMITTED_TABLES.glob("*.csv")))
def rendered_table(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Table, Path]:
    """A committed table rendered from its records alone, and the folder of its files."""
    folder = tmp_path_factory.mktemp("rendered")
    (folder / "results/tables").mkdir(parents=True)
    shutil.copy(COMMITTED_TABLES / f"{request.param}.jsonl", folder / "results/tables")
    paths = [f"paths.runs={folder}/runs", f"paths.results={folder}/results"]
    table = Table(request.param, load_settings(request.param), paths)

    with pytest.MonkeyPatch.context() as patch:
        forbid_calls(patch, "run", "load_run_data", "build_model")
        patch.setattr("reporting.table.to_pdf", lambda _: b"")
        patch.setattr("reporting.table.to_png", lambda _: b"")
        table.load_results()
        table.write()
    assert not (folder / "runs").exists()
    return table, folder / "results/tables"


def test_rendered_csv_and_records_equal_committed_ones(rendered_table: tuple[Table, Path]) -> None:
    table, folder = rendered_table
    for suffix in (".csv", ".jsonl"):
        assert (folder / f"{table.name}{suffix}").read_bytes() == (
            COMMITTED_TABLES / f"{table.name}{suffix}"
        ).read_bytes()
    assert (folder / f"{table.name}.md").read_text().startswith(f"# {table.settings.title}\n")


def test_rendered_latex_equals_committed_one(rendered_table: tuple[Table, Path]) -> None:
    table, folder = rendered_table
    text = (folder / f"{table.name}.tex").read_text()
    assert text == (COMMITTED_TABLES / f"{table.name}.tex").read_text()
    check_latex(text, 7 if table.settings.also_against else 6, len(table.rows))


def test_markdown_command_gives_run_id_of_record(rendered_table: tuple[Table, Path]) -> None:
    table, folder = rendered_table
    commands = read_commands((folder / f"{table.name}.md").read_text())
    assert list(commands) == [row.name for row in table.rows]
    seed = table.settings.seeds[0]
    for row in table.rows:  # the records were found by the ids of these overrides
        overrides = [word for word in row.overrides if word not in table.user_overrides]
        assert commands[row.name] == [*overrides, *(row.chosen or []), f"seed={seed}"]
    for row in (table.rows[0], table.rows[-1]):
        cfg = compose(commands[row.name])
        ids = {record.seed: record.id for record in row.records}
        assert cfg.seed == seed
        assert parse_run(cfg).directory.id == ids[cfg.seed]


def read_commands(markdown: str) -> dict[str, list[str]]:
    """The overrides of each row's command, by the name of the row."""
    lines = markdown.partition("```sh\n")[2].partition("```")[0].splitlines()
    commands = {}
    for comment, command in zip(lines[::2], lines[1::2], strict=True):
        program, script, *overrides = shlex.split(command)
        assert (program, script) == (".venv/bin/python", "scripts/train.py")
        commands[comment.removeprefix("# ")] = overrides
    return commands
