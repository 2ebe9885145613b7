"""Explains a finished run by its kernels, in one HTML page: python scripts/explain.py run=runs/<id> data.root=/data"""

import json
from collections.abc import Iterator
from pathlib import Path

from lightning_fabric.utilities.seed import seed_everything
from omegaconf import DictConfig
from safetensors.torch import load_file
from torch import Tensor

from acl.explain import REPLACEMENTS, Attribution, analytic_layers, attribute, leave_one_out
from training.config import entry
from training.data import batches, centre
from training.errors import UsageError
from training.files import write_atomic
from training.loop import build, finished, prepare, run_of
from training.report import report
from training.sets import Split


def main(cfg: DictConfig) -> None:
    for name, value, known in (
        ("split", cfg.split, ("train", "val", "test")),
        *(("replace", how, REPLACEMENTS) for how in cfg.replace),
    ):
        if value not in known:
            raise UsageError(f"{name}={value} is none of {', '.join(known)}")
    if cfg.images is not None and cfg.images < 1:
        raise UsageError(f"images={cfg.images} is not a whole number of at least 1")
    folder = run_of(Path(cfg.run))
    run, data, model = finished(folder, **cfg.data)
    split: Split = getattr(data, cfg.split)
    split = Split(split.images[: cfg.images], split.labels[: cfg.images])

    pixels = centre(split.images[:1], run.data)[0, 0].numel()
    size = max(1, min(500, 2**20 // pixels))  # an attribution holds 16 answers of a layer to a batch

    def feed() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches(split, size):
            yield prepare(centre(batch.images, run.data), data, run), batch.labels

    try:
        analytic_layers(model)
        attributions = {how: attribute(model, feed, how) for how in cfg.replace}
        lost = leave_one_out(model, feed) if cfg.single else None
    except ValueError as error:
        raise UsageError(f"{folder}: {error}") from error
    seed_everything(run.seed, verbose=False)
    try:
        start = build(run, data)  # as the run itself began
    except UsageError:  # its pretrained weights are not there any more
        start = None
    paths = load_file(folder / "akps.safetensors") if (folder / "akps.safetensors").exists() else {}
    record = json.loads((folder / "record.json").read_text())
    file = Path(cfg.file or folder / "report.html")
    numbers = {how: figures(attribution) for how, attribution in attributions.items()}
    singles = None if lost is None else {name: values.tolist() for name, values in lost.items()}
    write_atomic(
        file.with_suffix(".json"), json.dumps({"split": cfg.split, "kinds": numbers, "kernels": singles}) + "\n"
    )
    write_atomic(file, report(record, model, start, paths, attributions, lost, f"{len(split):,} {cfg.split}"))
    for how, attribution in attributions.items():
        values = ", ".join(
            f"{kind} {value:+.2f}" for kind, value in attribution.shapley().items() if kind in attribution.kinds
        )
        print(f"{how}: {attribution.drop:.2f} points = {values}")
    print(file)


def figures(attribution: Attribution) -> dict[str, object]:
    accuracies = {" ".join(sorted(kept)): attribution.accuracy(kept) for kept in attribution.correct}
    return {
        "shapley": attribution.shapley(),
        "drop": attribution.drop,
        "top1_with": accuracies,
        "images": attribution.images,
    }


if __name__ == "__main__":
    entry(main, "explain")
