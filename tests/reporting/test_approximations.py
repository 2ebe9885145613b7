from pathlib import Path

import pytest

from reporting.approximations import draw_approximations, read_approximations

EVIDENCE = Path(__file__).parents[2] / "results/evidence"


def test_figure_shows_accuracy_of_every_approximation_at_its_numbers_per_kernel() -> None:
    lines = read_approximations(EVIDENCE / "imagenette_squeezenet_approximations.jsonl")
    figure = draw_approximations(lines)
    assert figure is not None
    (axes,) = figure.axes
    drawn = sorted((x, y) for container in axes.containers for x, y in container[0].get_xydata())
    expected = sorted((line.numbers_per_kernel, 100 * sum(line.correct or []) / 3925) for line in lines[1:])
    assert drawn == [pytest.approx(point) for point in expected]
    assert draw_approximations(read_approximations(EVIDENCE / "flowers17_approximations_images.jsonl")) is None
