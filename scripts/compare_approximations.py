"""Replaces a pretrained layer's kernels by approximations, without training: python scripts/compare_approximations.py

Compares Gabor fits with a truncated SVD and a codebook of at least as many numbers: the layer's outputs, and the
accuracy of linear probes on the features of a later layer. Writes a line per approximation, with values per test image.
"""

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.feature_extraction import create_feature_extractor
from tqdm import tqdm

import acl
from training.cli import run_script
from training.config import compose
from training.errors import UsageError
from training.files import to_json_lines, write_atomic
from training.provenance import describe_environment
from training.settings import create_network, load_run_data, parse_run
from training.splits import Split
from training.validation import OutputFile, strict_dataclass

GABOR_OPTIONS: dict[int, dict[str, Any]] = {
    5: {},
    7: {"family": "extended", "fixed": {"gamma": 1.0}},
    8: {"family": "extended"},
}
"""Numbers per kernel, including the gain -> options of ``acl.fit_kernels``."""
CODEBOOK_STARTS, CODEBOOK_STEPS = 10, 100
PROBES = ("probe_correct", "refitted_probe_correct")
"""The probe is trained on the features of the original network, or again on those of each approximation."""


@strict_dataclass
class CompareSettings:
    overrides: list[str]
    layer: str
    features: str
    file: OutputFile


def fit_gabor(weight: Tensor, numbers: int) -> tuple[Tensor, float]:
    return acl.fit_kernels(weight, ["G"], **GABOR_OPTIONS[numbers]).weight(), numbers


def truncate_svd(weight: Tensor, numbers: int) -> tuple[Tensor, float]:
    """Approximates the matrix whose rows are the kernels by the product of two thinner ones."""
    rows = weight.flatten(0, 1).flatten(1)
    rank = min(math.ceil(numbers * len(rows) / sum(rows.shape)), *rows.shape)
    u, s, vh = torch.linalg.svd(rows, full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ vh[:rank]).view_as(weight), rank * sum(rows.shape) / len(rows)


def quantize(weight: Tensor, numbers: int) -> tuple[Tensor, float]:
    """Replaces each kernel by an entry of a codebook times a gain of either sign, with the smallest squared error.

    This is k-means for lines through the origin instead of points, known as gain-shape vector quantization (Sabin and
    Gray, 1984). The index of the entry and the gain count as two numbers of the kernel.
    """
    rows = weight.flatten(0, 1).flatten(1)
    size = min(max(1, math.ceil((numbers - 2) * len(rows) / rows.shape[1])), len(rows))
    codebook = max(
        (_train_codebook(rows, size, seed) for seed in range(CODEBOOK_STARTS)),
        key=lambda codebook: (rows @ codebook.T).square().amax(1).sum(),
    )
    products = rows @ codebook.T
    index = products.abs().argmax(1, keepdim=True)
    return (products.gather(1, index) * codebook[index[:, 0]]).view_as(weight), 2 + codebook.numel() / len(rows)


def _train_codebook(rows: Tensor, size: int, seed: int) -> Tensor:
    """Finds ``size`` unit vectors, (size, pixels), starting from random kernels; those of more energy are likelier."""
    generator = torch.Generator().manual_seed(seed)
    codebook = F.normalize(rows[rows.square().sum(1).clamp(min=1e-12).multinomial(size, generator=generator)])
    index = None
    for _ in range(CODEBOOK_STEPS):
        previous, index = index, (rows @ codebook.T).abs().argmax(1)
        if previous is not None and torch.equal(index, previous):
            break
        for i in index.unique().tolist():
            codebook[i] = torch.linalg.svd(rows[index == i], full_matrices=False).Vh[0]
    return codebook


METHODS: dict[str, Callable[[Tensor, int], tuple[Tensor, float]]] = {
    "Gabor fit": fit_gabor,
    "truncated SVD": truncate_svd,
    "codebook": quantize,
}
"""Each takes kernels (out, in / groups, kh, kw) and how many numbers a kernel gets at least.

It returns the approximation and the numbers that a kernel got.
"""


def main(settings: CompareSettings) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    run = parse_run(compose(settings.overrides))
    data = load_run_data(run)
    model = create_network(run, data.channels, len(data.classes)).eval()
    conv = dict(model.named_modules()).get(settings.layer)
    if not isinstance(conv, nn.Conv2d) or isinstance(conv, acl.AnalyticConv2d):
        raise UsageError(f"layer={settings.layer} is invalid: it is not a plain convolution of the network")
    try:
        extractor = create_feature_extractor(model, {settings.features: "features"})
    except ValueError as error:
        raise UsageError(f"features={settings.features} is invalid: it is not a layer of the network") from error
    check_features(extractor, conv, settings, next(data.eval_batches(data.train[:1])).images)
    original = copy.deepcopy(conv)
    weight = original.weight.detach()
    tasks: list[tuple[str, int]] = [(method, numbers) for numbers in GABOR_OPTIONS for method in METHODS]
    num_weights = weight[0, 0].numel()
    lines: list[dict[str, Any]] = []
    probe = None
    for method, numbers in tqdm([("original", num_weights), *tasks], desc="approximations", disable=None):
        approximation, used = (weight, numbers) if method == "original" else METHODS[method](weight, numbers)
        with torch.no_grad():
            conv.weight.copy_(approximation)
        train_features, _ = extract_features(extractor, conv, original, data.eval_batches(data.train))
        test_features, errors = extract_features(extractor, conv, original, data.eval_batches(data.test))
        refitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
        refitted.fit(train_features.numpy(), data.train.labels.numpy())
        if probe is None:
            probe = refitted
        is_correct = [
            (fitted.predict(test_features.numpy()) == data.test.labels.numpy()).tolist() for fitted in (probe, refitted)
        ]
        lines.append(
            {
                "method": method,
                "numbers": numbers,
                "numbers_per_kernel": used,
                "explained_percent": 100 * (1 - float((approximation - weight).square().sum() / weight.square().sum())),
                "output_error_percent": (100 * errors).tolist(),
                **dict(zip(PROBES, is_correct, strict=True)),
            }
        )
    environment = describe_environment(torch.device("cpu"))
    setting = {"overrides": settings.overrides, "layer": settings.layer, "features": settings.features}
    write_atomic(settings.file, to_json_lines([{**setting, **line, **environment} for line in lines]))
    for line in lines:
        means = {key: sum(line[key]) / len(line[key]) for key in ("output_error_percent", *PROBES)}
        print(
            f"{line['method']:14} {line['numbers_per_kernel']:5.2f} numbers per kernel, "
            f"{line['explained_percent']:.2f}% of the energy, output error {means['output_error_percent']:.2f}%, "
            f"probe {100 * means['probe_correct']:.2f}%, refitted {100 * means['refitted_probe_correct']:.2f}%"
        )
    print(settings.file)


@torch.no_grad()
def check_features(extractor: nn.Module, conv: nn.Conv2d, settings: CompareSettings, image: Tensor) -> None:
    """Raises UsageError unless the features are maps that depend on the convolution."""
    outputs: list[Tensor] = []
    handle = conv.register_forward_hook(lambda *arguments: outputs.append(arguments[-1]))
    features = extractor(image)["features"]
    handle.remove()
    if features.ndim != 4:
        raise UsageError(f"features={settings.features} is invalid: its output has no height and width")
    if not outputs:
        raise UsageError(f"features={settings.features} is invalid: it should come after layer={settings.layer}")


@torch.no_grad()
def extract_features(
    extractor: nn.Module, conv: nn.Conv2d, original: nn.Conv2d, batches: Iterable[Split]
) -> tuple[Tensor, Tensor]:
    """Extracts the features of images, and the error of the replaced layer.

    Returns:
        The means of the feature maps (images, channels), and the squared error of the layer's outputs relative to the
        original outputs (images,).
    """
    errors: list[Tensor] = []

    def compare(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        expected = original(*inputs)
        errors.append((output - expected).square().sum((1, 2, 3)) / expected.square().sum((1, 2, 3)))

    handle = conv.register_forward_hook(compare)
    features = [extractor(batch.images)["features"].mean((-2, -1)) for batch in batches]
    handle.remove()
    return torch.cat(features), torch.cat(errors)


if __name__ == "__main__":
    run_script(main, "compare_approximations", CompareSettings)
