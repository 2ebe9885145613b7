"""Explains the network of a finished run, in one HTML page: python scripts/explain.py run=runs/<id> data.root=/data"""

import json
from functools import partial
from typing import Literal

from lightning_fabric.utilities.seed import seed_everything
from pydantic import Field
from torch import Tensor, nn

from acl.explain import Attribution, Replacement, attribute, leave_one_out
from evaluation.finished_run import DataLocation, FinishedRun, load_akp_history, load_data_as_trained, load_finished_run
from evaluation.removal import iterate_pairs
from evaluation.run_page import render_run_page
from training.cli import run_script
from training.errors import UsageError
from training.files import write_together
from training.settings import create_network
from training.validation import FilePath, OutputFile, is_file_of_run, strict_dataclass

REPLACED_BY: dict[Replacement, str] = {
    "zero": "set to zero",
    "mean": "replaced by their mean outputs",
    "constant": "replaced by constant kernels of the same sums",
}
"""What stands for a removed kernel, in words; see ``acl.explain.attribute``."""


@strict_dataclass
class ExplainSettings:
    run: FilePath
    split: Literal["train", "val", "test"] | None
    replace: list[Replacement]
    single: bool
    data: DataLocation
    images: int | None = Field(ge=1)
    file: OutputFile | None


def main(settings: ExplainSettings) -> None:
    run = load_finished_run(settings.run, settings.data)
    page_file = settings.file or run.path / "report.html"
    if run.record is None:
        raise UsageError(f"run={run.path} is invalid: a page needs the folder of a run, with its record and history")
    numbers_file = page_file.with_suffix(".json")
    if page_file == numbers_file or is_file_of_run(numbers_file):
        reason = "it should end in .html" if page_file == numbers_file else "record.json of the run would be lost"
        raise UsageError(f"file={page_file} is invalid: {reason}; the numbers are written to {numbers_file.name}")
    attributions: dict[Replacement, Attribution] = {}
    lost: dict[str, Tensor] | None = None
    images = None
    if settings.split is not None:
        data = load_data_as_trained(run)
        split = getattr(data, settings.split)
        split = split if settings.images is None else split.sample(settings.images)
        images = f"{len(split):,} {settings.split}"
        batches = partial(iterate_pairs, data, split)
        try:
            attributions = {mode: attribute(run.model, batches, mode) for mode in settings.replace}
            lost = leave_one_out(run.model, batches) if settings.single else None
        except ValueError as error:
            raise UsageError(f"{run.path}: {error}") from error
    page = render_run_page(
        run.record, run.model, create_initial_model(run), load_akp_history(run), attributions, lost, images
    )
    results = {
        "split": settings.split,
        "kinds": {mode: summarize_attribution(attribution) for mode, attribution in attributions.items()},
        "kernels": None if lost is None else {name: values.tolist() for name, values in lost.items()},
    }
    write_together({numbers_file: json.dumps(results) + "\n", page_file: page})
    for mode, attribution in attributions.items():
        values = ", ".join(
            f"{kind} {value:+.2f}" for kind, value in attribution.shapley().items() if kind in attribution.kinds
        )
        effect = f"accuracy falls by {attribution.drop:.2f} points"
        print(f"all kernels of the analytic layers {REPLACED_BY[mode]}: {effect} (Shapley values: {values})")
    print(page_file)


def create_initial_model(run: FinishedRun) -> nn.Module | None:
    """The network before training; None if the pretrained weights that it started from are not available."""
    seed_everything(run.settings.seed, verbose=False)
    try:
        return create_network(run.settings, run.input_format.channels, run.input_format.classes)
    except UsageError:
        return None


def summarize_attribution(attribution: Attribution) -> dict[str, object]:
    """Collects the numbers for the JSON file next to the page."""
    return {
        "shapley": attribution.shapley(),
        "drop": attribution.drop,
        "top1_with": {" ".join(sorted(kept)): attribution.accuracy(kept) for kept in attribution.correct},
        "images": attribution.images,
    }


if __name__ == "__main__":
    run_script(main, "explain", ExplainSettings)
