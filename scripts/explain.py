"""Explains the network of a finished run, in one HTML page: python scripts/explain.py run=runs/<id> data.root=/data"""

import json
from collections.abc import Iterator
from typing import Literal

from lightning_fabric.utilities.seed import seed_everything
from pydantic import Field
from pydantic.dataclasses import dataclass as validated_dataclass
from safetensors.torch import load_file
from torch import Tensor

from acl.explain import Attribution, attribute, leave_one_out
from reporting.run_page import render_run_page
from training.config import run_script
from training.errors import UsageError
from training.run_directory import write_atomic
from training.runs import DataLocation, build_model, load_finished_run
from training.validation import STRICT, FilePath


@validated_dataclass(frozen=True, kw_only=True, config=STRICT)
class ExplainSettings:
    run: FilePath
    split: Literal["train", "val", "test"]
    replace: list[Literal["zero", "mean"]]
    single: bool
    data: DataLocation
    images: int | None = Field(ge=1)
    file: FilePath | None


def main(settings: ExplainSettings) -> None:
    run = load_finished_run(settings.run, settings.data)
    split = getattr(run.data, settings.split)[: settings.images]

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        # An attribution keeps 16 outputs of a layer per batch, so batches are small.
        for batch in run.data.eval_batches(split, max_pixels=2**20, max_size=500):
            yield batch.images, batch.labels

    try:
        attributions: dict[str, Attribution] = {mode: attribute(run.model, batches, mode) for mode in settings.replace}
        lost = leave_one_out(run.model, batches) if settings.single else None
    except ValueError as error:
        raise UsageError(f"{run.path}: {error}") from error
    seed_everything(run.settings.seed, verbose=False)
    try:
        initial_model = build_model(run.settings, run.data)
    except UsageError:  # its pretrained weights are no longer available
        initial_model = None
    history_file = run.path / "akps.safetensors"
    akp_history = load_file(history_file) if history_file.exists() else {}
    page_file = settings.file or run.path / "report.html"
    results = {
        "split": settings.split,
        "kinds": {mode: summarize_attribution(attribution) for mode, attribution in attributions.items()},
        "kernels": None if lost is None else {name: values.tolist() for name, values in lost.items()},
    }
    page = render_run_page(
        run.record, run.model, initial_model, akp_history, attributions, lost, f"{len(split):,} {settings.split}"
    )
    write_atomic(page_file.with_suffix(".json"), json.dumps(results) + "\n")
    write_atomic(page_file, page)
    for mode, attribution in attributions.items():
        values = ", ".join(
            f"{kind} {value:+.2f}" for kind, value in attribution.shapley().items() if kind in attribution.kinds
        )
        print(f"{mode}: {attribution.drop:.2f} points = {values}")
    print(page_file)


def summarize_attribution(attribution: Attribution) -> dict[str, object]:
    """Collects the numbers for the JSON file next to the page."""
    return {
        "shapley": attribution.shapley(),
        "drop": attribution.drop,
        "top1_with": {" ".join(sorted(kept)): attribution.accuracy(kept) for kept in attribution.correct},
        "images": attribution.images,
    }


if __name__ == "__main__":
    run_script(main, "explain", ExplainSettings, text_keys=("run",))
