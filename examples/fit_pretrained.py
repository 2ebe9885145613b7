"""Replaces the kernels of a trained network by formulas, without training: python examples/fit_pretrained.py

The network is the LeNet in results/weights that was trained on scikit-learn's digits; run it in a checkout.
"""

import copy
from pathlib import Path

import torch
from torch import nn

import acl
from models.lenet import LeNet
from training.datasets import read_digits

ROOT = Path(__file__).resolve().parents[1]

file = ROOT / "results/weights/digits_plain.safetensors"
input_format = acl.read_info(file)["info"]["input_format"]
_, _, test = read_digits(Path()).load()
images = (test.images - input_format["mean"][0]) / input_format["std"][0]


def report(title: str, net: nn.Module) -> None:
    with torch.no_grad():
        accuracy = (net(images).argmax(1) == test.labels).float().mean()
    weights = sum(p.numel() for name, p in net.named_parameters() if name.startswith("conv"))
    print(f"{title}: {weights:,} convolution parameters, test accuracy {accuracy:.1%}")


net = acl.load(LeNet(), file).eval()
report("as trained", net)
for metric in ("pixels", "images"):
    fitted = acl.convert(copy.deepcopy(net), "all", "G100%", init="fit", amplitude=True, metric=metric)
    report(f"a Gabor per kernel, fitted to {metric}", fitted)
fitted = acl.convert(copy.deepcopy(net), "all", "G100%", init="fit", per="filter", metric="images")
report("a Gabor per filter, fitted to images", fitted)
