"""What is measured on the trained networks of a table, beyond the accuracy in their records."""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from acl.convert import analytic_layers
from acl.explain import attribute
from acl.kernels import KINDS
from reporting.json_lines import read_json_lines
from reporting.transforms import measure_transforms
from training.corruptions import CORRUPTIONS, SEVERITIES
from training.data import Data
from training.datasets import Split
from training.finished_run import FinishedRun, evaluate_run, load_akp_history

ATTACK_SIZES = (0.5, 1.0, 2.0, 4.0)
"""The largest change of a pixel by an attack, of 255."""
MAX_ATTACKED = 1000
"""Images to attack."""


def iterate_pairs(data: Data, split: Split) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the images and labels of a split for ``acl.explain``, which keeps up to 16 outputs per batch."""
    for batch in data.eval_batches(split, max_pixels=2**20, max_size=500):
        yield batch.images, batch.labels


def measure_akp_travel(run: FinishedRun, _: Data) -> dict[str, Any]:
    """The mean distance between the AKPs' values before training and at the best epoch.

    Returns:
        ``<kind>/<akp>`` -> mean over all kernels of the network, in px or degrees (or without a unit, as the AKP).
    """
    assert run.record is not None
    distances: dict[str, list[Tensor]] = {}
    for name, history in load_akp_history(run).items():
        symbol, akp = name.split("/")[-2:]
        factor = 180 / math.pi if KINDS[symbol].get_unit(akp) == "rad" else 1.0
        distance = (history[run.record["best_epoch"]] - history[0]).abs() * factor
        distances.setdefault(f"{symbol}/{akp}", []).append(distance)
    return {name: float(torch.cat(parts).mean()) for name, parts in distances.items()}


def measure_replaced_akps(run: FinishedRun, data: Data) -> dict[str, Any]:
    """Validation accuracy (percent) with all AKPs of the network replaced, and everything else as trained.

    Source: Zhang, Bengio and Singer, Are All Layers Created Equal?, JMLR 2022.

    Returns:
        ``trained``, ``initial`` (the AKPs before training) and ``redrawn`` (new random AKPs) -> accuracy. Empty for a
        network without analytic layers.
    """
    history = load_akp_history(run)
    if not history:
        return {}
    initial, redrawn = copy.deepcopy(run.model), copy.deepcopy(run.model)
    for name, layer in analytic_layers(initial).items():
        for symbol, akps in layer.akps().items():
            layer.set_akps(symbol, {akp: history[f"{name}/{symbol}/{akp}"][0] for akp in akps})
    torch.manual_seed(int(run.settings.directory.id, 16))  # not the seed that the initial AKPs were drawn with
    for layer in analytic_layers(redrawn).values():
        layer.sample_akps()
    models = {"trained": run.model, "initial": initial, "redrawn": redrawn}
    return {akps: evaluate_run(replace(run, model=model), data, "val")["top1"] for akps, model in models.items()}


def measure_shapley(run: FinishedRun, data: Data) -> dict[str, Any]:
    """The Shapley value of each kind of kernel in points of validation accuracy, with removed kernels set to zero.

    Empty for a network without analytic layers.
    """
    if not analytic_layers(run.model):
        return {}
    attribution = attribute(run.model, partial(iterate_pairs, data, data.val))
    values = attribution.shapley()
    return {symbol: values[symbol] for symbol in attribution.kinds}


def measure_corruptions(run: FinishedRun, data: Data) -> dict[str, Any]:
    """Test accuracy (percent) for every corruption at every severity.

    Returns:
        Corruption -> list of accuracies, from severity 1 to 5; ``none`` -> accuracy on the images as they are.
    """

    def compute_accuracy(images: Tensor) -> float:
        return evaluate_run(run, replace(data, test=Split(images, data.test.labels)), "test")["top1"]

    accuracies: dict[str, Any] = {"none": compute_accuracy(data.test.images)}
    for name, corrupt in CORRUPTIONS.items():
        accuracies[name] = [compute_accuracy(corrupt(data.test.images, severity)) for severity in SEVERITIES]
    return accuracies


def measure_attacks(run: FinishedRun, data: Data) -> dict[str, Any]:
    """Test accuracy (percent) under projected gradient descent: L-infinity, 10 steps from a random start.

    Source: Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018.

    Returns:
        The largest change of a pixel, of 255 -> accuracy on ``MAX_ATTACKED`` random test images. Once it is 0, it is
        taken to be 0 under larger changes too.
    """
    from art.attacks.evasion import ProjectedGradientDescentPyTorch  # imported here because it takes seconds
    from art.estimators.classification import PyTorchClassifier

    test = data.test.sample(MAX_ATTACKED)
    images = data.augmentation.center_crop(test.images).float().div(255).numpy()
    labels = test.labels.numpy()
    moments = tuple((moment / 255).flatten(1)[0].view(-1, 1, 1).numpy() for moment in (data.mean, data.std))
    classifier = PyTorchClassifier(
        run.model, nn.CrossEntropyLoss(), images.shape[1:], len(data.classes), clip_values=(0, 1), preprocessing=moments
    )
    accuracies = {"0": _compute_accuracy(classifier, images, labels)}
    for size in ATTACK_SIZES:
        if 0.0 in accuracies.values():
            accuracies[f"{size:g}"] = 0.0
            continue
        np.random.seed(run.settings.seed)  # the library draws the random starts from it
        step = size / 255 / 4
        attack = ProjectedGradientDescentPyTorch(
            classifier, eps=size / 255, eps_step=step, max_iter=10, num_random_init=1, batch_size=100, verbose=False
        )
        accuracies[f"{size:g}"] = _compute_accuracy(classifier, attack.generate(images, labels), labels)
    return accuracies


def _compute_accuracy(classifier: Any, images: np.ndarray, labels: np.ndarray) -> float:
    return 100 * float((classifier.predict(images).argmax(1) == labels).mean())


MEASUREMENTS: dict[str, Callable[[FinishedRun, Data], dict[str, Any]]] = {
    "akp_travel": measure_akp_travel,
    "replaced_akps": measure_replaced_akps,
    "shapley": measure_shapley,
    "corruptions": measure_corruptions,
    "attacks": measure_attacks,
    "transforms": measure_transforms,
}
"""Each takes a finished run and its data, and returns what is written to ``results/evidence``."""


def read_measurements(file: Path) -> list[dict[str, Any]]:
    """Reads a file that ``scripts/measure.py`` wrote: a row, the id of a run, its seed and the values in each line.

    Raises:
        UsageError: as ``read_json_lines`` does.
    """
    return read_json_lines(file, {"row", "id", "seed", "values"}, "a measurement")
