"""Predicts the classes of image files: python scripts/predict.py run=runs/<id> images=photos file=predictions.csv

Writes a line per image: its path, the predicted class, and the probability of each class. For a network with one
channel, images are converted to gray.
"""

import sys
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch
from tqdm import tqdm

from evaluation.finished_run import FinishedRun, load_finished_run, prepare_run
from training.cli import run_script
from training.data import Data
from training.errors import UsageError
from training.files import write_atomic
from training.image_cache import load_decoded_images
from training.image_folders import list_image_files, report_ignored
from training.splits import Split
from training.validation import FilePath, OutputFile, strict_dataclass


@strict_dataclass
class PredictSettings:
    run: FilePath
    images: FilePath
    file: OutputFile | None


def main(settings: PredictSettings) -> None:
    paths = list_images(settings.images)
    run = load_finished_run(settings.run)
    if run.input_format.channels == 1:
        name = run.settings.data["name"]
        print(f"images are converted to gray but not inverted; those of {name} are light on black", file=sys.stderr)
    if run.classes is None:
        print(f"{run.path} does not name its classes, so they are numbered", file=sys.stderr)
    with TemporaryDirectory() as cache:
        size = run.settings.data.get("size", run.input_format.height)
        root = settings.images if settings.images.is_dir() else settings.images.parent
        images, skipped = load_decoded_images(root, paths, size, Path(cache), "images", skip_undecodable=True)
        undecodable = set(skipped)
        kept = [path for i, path in enumerate(paths) if i not in undecodable]
        if not kept:
            raise UsageError(f"images={settings.images}: no image can be decoded")
        probabilities = predict_probabilities(run, images if run.input_format.channels == 3 else to_gray(images))
    classes = run.classes or [str(label) for label in range(run.input_format.classes)]
    frame = pd.DataFrame(probabilities.numpy(), columns=classes)
    frame.insert(0, "prediction", [classes[label] for label in probabilities.argmax(1)], allow_duplicates=True)
    frame.insert(0, "image", [str(path) for path in kept], allow_duplicates=True)
    text = frame.to_csv(index=False, float_format="%.6f")
    if settings.file is None:
        print(text, end="")
    else:
        write_atomic(settings.file, text)
        print(f"{settings.file}: {len(kept):,} images")


def list_images(path: Path) -> list[Path]:
    """Lists an image file, or all image files in a folder; reports on stderr how many other files are ignored."""
    if path.is_file():
        return [path]
    ignored: dict[str, list[Path]] = defaultdict(list)
    images = list_image_files(path, path, ignored) if path.is_dir() else []
    if not images:
        raise UsageError(f"images={path} is invalid: it should be an image file or a folder of image files")
    report_ignored(path, ignored)
    return images


def to_gray(images: torch.Tensor) -> torch.Tensor:
    """The luma of RGB images (n, 3, height, width) uint8 by ITU-R BT.601, (n, 1, height, width) uint8."""
    red, green, blue = images.int().unbind(1)
    return ((299 * red + 587 * green + 114 * blue + 500) // 1000).to(torch.uint8)[:, None]


@torch.no_grad()
def predict_probabilities(run: FinishedRun, images: torch.Tensor) -> torch.Tensor:
    """The probability of each class (n, classes), for images that are processed as those of an evaluation are."""
    split = Split(images, torch.zeros(len(images), dtype=torch.long))
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (run.input_format.mean, run.input_format.std))
    memory_format = torch.channels_last if run.settings.trainer.channels_last else torch.contiguous_format
    augmentation = run.settings.data["augmentation"]
    data = Data(split[:0], split[:0], split, run.classes or [], "", mean, std, augmentation, memory_format)
    model, data, _ = prepare_run(run, data)
    probabilities = []
    with tqdm(desc="predicting", total=len(images), unit="image", disable=None) as progress:
        for batch in data.eval_batches(data.test):
            probabilities.append(model(batch.images).float().softmax(1).cpu())
            progress.update(len(batch))
    return torch.cat(probabilities)


if __name__ == "__main__":
    run_script(main, "predict", PredictSettings)
