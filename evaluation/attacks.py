"""Accuracy under adversarial attacks.

Source: Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018.
"""

from typing import Any

import numpy as np
from torch import nn

from evaluation.finished_run import FinishedRun
from training.data import Data

ATTACK_SIZES = (0.5, 1.0, 2.0, 4.0)
"""The largest change of a pixel by an attack, of 255."""
MAX_ATTACKED = 1000
"""Images to attack."""


def measure_attacks(run: FinishedRun, data: Data) -> dict[str, Any]:
    """Returns the largest change of a pixel, of 255 -> accuracy on ``MAX_ATTACKED`` random test images.

    The attack is projected gradient descent: L-infinity, 10 steps from a random start. Once the accuracy is 0, it is
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
