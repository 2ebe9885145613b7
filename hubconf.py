"""Entry points of torch.hub, such as torch.hub.load("<owner>/<repository>", "analenet", weights="mnist_gabor")."""

from pathlib import Path

from torch import nn

import acl
from models.lenet import LeNet

dependencies = ["safetensors", "torch", "torchvision", "tqdm"]


def analenet(weights: str | None = "mnist_gabor") -> nn.Module:
    """LeNet-5 for images (N, 1, 28, 28), analytic or plain, with the weights of a file of results/weights.

    Args:
        weights: the file's name without its extension, such as ``mnist_gabor``, ``mnist_plain`` or ``digits_gabor``;
            None: a plain network with random weights.

    Returns:
        The network in eval mode. It expects images that are normalized as in training; ``acl.read_info`` of the file
        has the mean and standard deviation.

    Raises:
        ValueError: for an unknown name.
    """
    if weights is None:
        return LeNet().eval()
    folder = Path(__file__).parent / "results/weights"
    known = sorted(file.stem for file in folder.glob("*.safetensors"))
    if weights not in known:
        raise ValueError(f"no weights '{weights}'; known: {', '.join(known)}")
    return acl.load(LeNet(), folder / f"{weights}.safetensors").eval()
