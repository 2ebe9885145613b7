from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from evaluation.attacks import attack, measure_attacks
from evaluation.finished_run import evaluate_run, load_finished_run
from tests.training.configurations import compose_photo_run
from tests.training.test_data import make_augmentation
from tests.training.trees import write_imagefolder
from training.data import Data
from training.loop import run
from training.settings import load_run_data, parse_run
from training.splits import Split


def test_attack_increases_loss_within_its_size() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)).eval()
    images, labels = torch.rand(20, 1, 8, 8), torch.randint(3, (20,))
    split = Split(images, labels)
    data = Data(split, split, split, ["a", "b", "c"], "", torch.tensor(100.0), torch.tensor(50.0), make_augmentation())

    attacked = attack(model, data, images, labels, images, 2 / 255)

    assert (attacked - images).abs().max() <= 2 / 255 + 1e-6 and attacked.min() >= 0 and attacked.max() <= 1
    losses = [F.cross_entropy(model(data.normalize(255 * x)), labels) for x in (images, attacked)]
    assert losses[1] > losses[0]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_photographs_are_attacked_in_the_crops_that_are_tested(tmp_path: Path) -> None:
    images = write_imagefolder(tmp_path / "images", train=8, val=1, test=4)
    settings = parse_run(compose_photo_run(tmp_path, images, "data.size=36", "data.crop=28", "data.min_area=0.9"))
    run(settings)
    finished = load_finished_run(settings.directory.path)
    data = load_run_data(finished.settings)
    data = replace(data, test=data.test.sample(12))
    accuracies = measure_attacks(finished, data)
    assert accuracies["0"] == pytest.approx(evaluate_run(finished, data, "test")["top1"])
