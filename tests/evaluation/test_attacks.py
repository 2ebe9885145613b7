import torch
from torch import nn
from torch.nn import functional as F

from evaluation.attacks import attack
from tests.training.test_data import make_augmentation
from training.data import Data
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
