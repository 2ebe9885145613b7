"""Accuracy under adversarial attacks.

Source: Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evaluation.finished_run import FinishedRun, prepare_run
from training.data import Data, iterate_batches
from training.splits import Split

ATTACK_SIZES = (0.5, 1.0, 2.0, 4.0)
"""The largest change of a pixel by an attack, of 255."""
MAX_ATTACKED = 1000
"""Images to attack."""
STEPS = 10
BATCH_SIZE = 100


def measure_attacks(run: FinishedRun, data: Data) -> dict[str, Any]:
    """Returns the largest change of a pixel, of 255 -> accuracy on ``MAX_ATTACKED`` random test images.

    The attack is projected gradient descent: L-infinity, ``STEPS`` steps from a random start. Once the accuracy is 0,
    it is taken to be 0 under larger changes too.
    """
    model, data, _ = prepare_run(run, data)
    model.eval()
    test = data.test.sample(MAX_ATTACKED)
    test = Split(data.augmentation.center_crop(test.images).float() / 255, test.labels)
    accuracies: dict[str, float] = {}
    for size in (0.0, *ATTACK_SIZES):
        if 0.0 in accuracies.values():
            accuracies[f"{size:g}"] = 0.0
            continue
        changes = np.random.RandomState(run.settings.seed).uniform(-size / 255, size / 255, test.images.shape)
        starts = test.images + torch.from_numpy(changes).to(test.images)
        correct = 0
        for batch, start in zip(iterate_batches(test, BATCH_SIZE), starts.split(BATCH_SIZE), strict=True):
            images, labels = batch.images.to(data.mean.device), batch.labels.to(data.mean.device)
            attacked = attack(model, data, images, labels, start.to(images).clamp(0, 1), size / 255) if size else images
            with torch.no_grad():
                correct += int((model(data.normalize(255 * attacked)).argmax(1) == labels).sum())
        accuracies[f"{size:g}"] = 100 * (correct / len(test))
    return accuracies


def attack(model: nn.Module, data: Data, images: Tensor, labels: Tensor, start: Tensor, size: float) -> Tensor:
    """Changes images (from 0 to 1) by up to ``size``, so that the loss increases."""
    attacked = start
    for _ in range(STEPS):
        attacked = attacked.detach().requires_grad_()
        loss = F.cross_entropy(model(data.normalize(255 * attacked)), labels)
        (gradient,) = torch.autograd.grad(loss, attacked)
        moved = (attacked.detach() + size / 4 * gradient.sign()).clamp(0, 1)
        attacked = images + (moved - images).clamp(-size, size)
    return attacked
