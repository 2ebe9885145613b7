"""Replaces a pretrained layer's kernels by approximations, without training: python scripts/compare_approximations.py

Compares Gabor fits with a truncated SVD and a codebook of at least as many numbers: the layer's outputs, and the
accuracy of linear probes on the features of a later layer. Writes a line per approximation, with values per test image.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor
from tqdm import tqdm

import acl
from models.rivals import quantize, truncate_svd
from training.cli import run_script
from training.config import compose
from training.data import Data
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


@strict_dataclass
class CompareSettings:
    overrides: list[str]
    layer: str
    features: str
    file: OutputFile


def fit_gabor(weight: Tensor, numbers: int) -> tuple[Tensor, float]:
    return acl.fit_kernels(weight, ["G"], **GABOR_OPTIONS[numbers]).weight(), numbers


METHODS: dict[str, Callable[[Tensor, int], tuple[Tensor, float]]] = {
    "Gabor fit": fit_gabor,
    "truncated SVD": truncate_svd,
    "codebook": quantize,
}
"""Each takes and returns what the functions of ``models.rivals`` do."""


def main(settings: CompareSettings) -> None:
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
    lines = list(compare(extractor, conv, data, settings))
    environment = describe_environment(torch.device("cpu"))
    setting = {"overrides": settings.overrides, "layer": settings.layer, "features": settings.features}
    write_atomic(settings.file, to_json_lines([{**setting, **line, **environment} for line in lines]))
    for line in lines:
        means = {key: sum(values) / len(values) for key, values in line.items() if isinstance(values, list)}
        print(
            f"{line['method']:14} {line['numbers_per_kernel']:5.2f} numbers per kernel, "
            f"{line['explained_percent']:.2f}% of the energy, output error {means['output_error_percent']:.2f}%, "
            f"probe {100 * means['probe_correct']:.2f}%, refitted {100 * means['refitted_probe_correct']:.2f}%"
        )
    print(settings.file)


def compare(extractor: nn.Module, conv: nn.Conv2d, data: Data, settings: CompareSettings) -> Iterator[dict[str, Any]]:
    """Yields a line for the original kernels, and one for each approximation.

    The probe is trained on the features of the original network, the refitted probe on those of each approximation.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    original = copy.deepcopy(conv)
    weight = original.weight.detach()
    tasks = [("original", weight[0, 0].numel()), *((method, n) for n in GABOR_OPTIONS for method in METHODS)]
    probe = None
    for method, numbers in tqdm(tasks, desc="approximations", disable=None):
        approximation, used = METHODS[method](weight, numbers) if method in METHODS else (weight, numbers)
        with torch.no_grad():
            conv.weight.copy_(approximation)
        features, _ = extract_features(extractor, conv, original, data.eval_batches(data.train), settings)
        refitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
        refitted.fit(features.numpy(), data.train.labels.numpy())
        probe = probe or refitted
        features, errors = extract_features(extractor, conv, original, data.eval_batches(data.test), settings)
        labels = data.test.labels.numpy()
        yield {
            "method": method,
            "numbers": numbers,
            "numbers_per_kernel": used,
            "explained_percent": 100 * (1 - float((approximation - weight).square().sum() / weight.square().sum())),
            "output_error_percent": (100 * errors).tolist(),
            "probe_correct": (probe.predict(features.numpy()) == labels).tolist(),
            "refitted_probe_correct": (refitted.predict(features.numpy()) == labels).tolist(),
        }


@torch.no_grad()
def extract_features(
    extractor: nn.Module, conv: nn.Conv2d, original: nn.Conv2d, batches: Iterable[Split], settings: CompareSettings
) -> tuple[Tensor, Tensor]:
    """Extracts the features of images, and the error of the replaced layer.

    Returns:
        The means of the feature maps (images, channels), and the squared error of the layer's outputs relative to the
        original outputs (images,).

    Raises:
        UsageError: unless the features are maps that depend on the convolution.
    """
    errors: list[Tensor] = []

    def compare_outputs(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        expected = original(*inputs)
        errors.append((output - expected).square().sum((1, 2, 3)) / expected.square().sum((1, 2, 3)))

    handle = conv.register_forward_hook(compare_outputs)
    means = []
    for batch in batches:
        features = extractor(batch.images)["features"]
        if features.ndim != 4:
            raise UsageError(f"features={settings.features} is invalid: its output has no height and width")
        if not errors:
            raise UsageError(f"features={settings.features} is invalid: it should come after layer={settings.layer}")
        means.append(features.mean((-2, -1)))
    handle.remove()
    return torch.cat(means), torch.cat(errors)


if __name__ == "__main__":
    run_script(main, "compare_approximations", CompareSettings)
