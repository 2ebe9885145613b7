"""Replaces a pretrained layer's kernels by approximations, without training: python scripts/compare_approximations.py

Compares Gabor fits with a truncated SVD and a codebook of at least as many numbers, each with the smallest error in one
or more metrics: the layer's outputs, the network's accuracy if it has the classes of its pretrained weights, and the
accuracy of linear probes on the features of a later layer. Writes a line per approximation, with values per test image.
"""

import copy
import itertools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from lightning_fabric.utilities.seed import seed_everything
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from tqdm import tqdm

import acl
from models.library import find_imagenet_labels, find_random_layers
from models.rivals import quantize, truncate_svd
from training.cli import run_script
from training.config import compose
from training.data import Data
from training.errors import UsageError
from training.files import read_json_lines, to_json_lines, write_atomic
from training.provenance import describe_environment
from training.settings import RunSettings, create_network, load_run_data, parse_run
from training.splits import Split
from training.validation import OutputFile, strict_dataclass

GABOR_OPTIONS: dict[int, dict[str, Any]] = {
    4: {},
    6: {"family": "extended", "fixed": {"gamma": 1.0}},
    7: {"family": "extended"},
}
"""Free AKPs -> options of ``acl.fit_kernels``."""
FILTER_AKPS = (4, 7)
IMAGENET_CLASSES = 1000
PATCH_IMAGES, PATCH_BATCH = 1000, 16
"""The training images whose patches are measured, and how many at a time, to limit time and memory."""
MAX_PIXELS = 2**19  # of a batch of images; larger ones are slower on CPUs
RECORDED = ("overrides", "layer", "features", "classes")
"""The settings that each line states, unless they are null."""
PER_IMAGE = ("output_error_percent", "correct", "probe_correct", "refitted_probe_correct")

Method = Literal["Gabor fit", "Gabor fit per filter", "truncated SVD", "codebook"]
MetricName = Literal["pixels", "images", "patches"]


@strict_dataclass
class CompareSettings:
    overrides: list[str]
    layer: str
    features: str | None
    classes: Literal["imagenet"] | None
    methods: list[Method]
    metrics: list[MetricName]
    numbers: list[Literal[5, 7, 8]]
    resume: bool
    file: OutputFile

    @property
    def recorded(self) -> dict[str, Any]:
        """What each line states about the network."""
        return {name: value for name in RECORDED if (value := getattr(self, name)) is not None}


def fit_gabor(weight: Tensor, numbers: int, metric: acl.Metric) -> tuple[Tensor, float]:
    return acl.fit_kernels(weight, ["G"], metric=metric, **GABOR_OPTIONS[numbers - 1]).weight(), numbers


def fit_gabor_filters(weight: Tensor, numbers: int, metric: acl.Metric) -> tuple[Tensor, float]:
    """Here ``numbers`` are those of a filter: one set of AKPs, and a gain per kernel."""
    options = GABOR_OPTIONS[numbers - weight.shape[1]]
    return acl.fit_kernels(weight, ["G"], per="filter", metric=metric, **options).weight(), numbers / weight.shape[1]


METHODS: dict[str, Callable[[Tensor, int, acl.Metric], tuple[Tensor, float]]] = {
    "Gabor fit": fit_gabor,
    "Gabor fit per filter": fit_gabor_filters,
    "truncated SVD": truncate_svd,
    "codebook": quantize,
}
"""Each takes and returns what the functions of ``models.rivals`` do."""


def main(settings: CompareSettings) -> None:
    run = parse_run(compose(settings.overrides))
    data = load_run_data(run)
    seed_everything(run.seed, verbose=False)
    model, labels = create_classifier(run, data, settings)
    conv = dict(model.named_modules()).get(settings.layer)
    if not isinstance(conv, nn.Conv2d) or isinstance(conv, acl.AnalyticConv2d):
        raise UsageError(f"layer={settings.layer} is invalid: it is not a plain convolution of the network")
    comparison = ComparedNetwork(create_extractor(model, settings), conv, data, labels, settings)
    lines = load_lines(settings)
    in_channels, size = conv.weight.shape[1], (conv.kernel_size[0], conv.kernel_size[1])
    metrics = {
        name: acl.Metric.create(
            measure_patches(model, conv, data, settings) if name == "patches" else name, in_channels, size
        )
        for name in settings.metrics
    }
    environment = describe_environment(torch.device("cpu"))
    original = ("original", comparison.weight[0, 0].numel())
    tasks = {(name, numbers): (method, metric) for name, method, metric, numbers in list_tasks(settings, in_channels)}
    for key in tqdm([original, *tasks], "approximations", disable=None):
        trains_probe = key == original and settings.features is not None
        if key not in lines or trains_probe or not settings.resume:
            name, numbers = key
            approximation, used = comparison.weight, numbers
            if key != original:
                method, metric = tasks[key]
                approximation, used = METHODS[method](comparison.weight, numbers, metrics[metric])
            measured = comparison.measure(name, numbers, used, approximation)
            lines[key] = {**settings.recorded, **measured, **environment}
        ordered = dict.fromkeys([*lines, original, *tasks])
        write_atomic(settings.file, to_json_lines(lines[known] for known in ordered if known in lines))
    for key in ordered:
        print(describe(lines[key]))
    print(settings.file)


def create_classifier(run: RunSettings, data: Data, settings: CompareSettings) -> tuple[nn.Module, Tensor | None]:
    """Creates the network. If it has ImageNet's classes, also finds the labels of the data's classes among them.

    Raises:
        UsageError: for a class that ImageNet does not have, or weights without its 1,000 classes.
    """
    if settings.classes is None:
        return create_network(run, data.channels, len(data.classes)).eval(), None
    try:
        labels = find_imagenet_labels(data.classes)
    except ValueError as error:
        raise UsageError(f"classes={settings.classes} is invalid: {error}") from error
    model = create_network(run, data.channels, IMAGENET_CLASSES).eval()
    if (random_layers := find_random_layers(model)) != []:
        layers = "all layers are" if random_layers is None else f"{', '.join(random_layers)} would be"
        raise UsageError(
            f"classes={settings.classes} is invalid: it needs pretrained weights with ImageNet's {IMAGENET_CLASSES} "
            f"classes, but {layers} random"
        )
    return model, torch.tensor(labels)


def create_extractor(model: nn.Module, settings: CompareSettings) -> nn.Module:
    """The network up to the features, or to the replaced layer without; with ImageNet's classes, all of it."""
    nodes = {settings.features: "features"} if settings.features is not None else {}
    try:
        if settings.classes is not None:
            nodes[get_graph_node_names(model)[1][-1]] = "logits"
        return create_feature_extractor(model, nodes or {settings.layer: "outputs"})
    except ValueError as error:
        raise UsageError(f"features={settings.features} is invalid: it is not a layer of the network") from error


def load_lines(settings: CompareSettings) -> dict[tuple[Any, Any], Mapping[str, Any]]:
    """The approximations that the file already has. Raises UsageError if they are of another network or other data."""
    if not settings.file.exists():
        return {}
    lines = read_json_lines(settings.file, dict[str, Any], "an approximation", lambda line: str(to_key(line)))
    if others := [name for line in lines for name in RECORDED if line.get(name) != getattr(settings, name)]:
        raise UsageError(
            f"file={settings.file} is invalid: it has approximations with other {others[0]}; set file=<another file>, "
            "or move it away"
        )
    return {to_key(line): line for line in lines}


def to_key(line: Mapping[str, Any]) -> tuple[Any, Any]:
    return line.get("method"), line.get("numbers")


@torch.no_grad()
def measure_patches(model: nn.Module, conv: nn.Conv2d, data: Data, settings: CompareSettings) -> Tensor:
    """The second moments of the patches that a convolution sees, over random training images, (m, m) float64."""
    length = conv.weight[0].numel()
    reader = copy.deepcopy(conv)  # its outputs are the pixels of patches
    reader.bias = None
    reader.weight = nn.Parameter(torch.eye(length).repeat(conv.groups, 1).view(-1, *conv.weight.shape[1:]))
    total, count = torch.zeros(length, length, dtype=torch.float64), 0

    def add_patches(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal count
        patches = reader(*inputs).unflatten(1, (conv.groups, length)).movedim(2, 0).flatten(1)
        total.add_(patches @ patches.T)
        count += patches.shape[1]

    handle = conv.register_forward_pre_hook(add_patches)
    chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[:PATCH_IMAGES]
    extractor = create_feature_extractor(model, {settings.layer: "outputs"})
    batches = data.eval_batches(data.train[chosen.sort().values], MAX_PIXELS, PATCH_BATCH)
    for batch in tqdm(batches, "patches", -(-len(chosen) // PATCH_BATCH), disable=None):
        extractor(batch.images)
    handle.remove()
    return total / count


class ComparedNetwork:
    """The network whose layer is replaced, and its probe."""

    def __init__(
        self, extractor: nn.Module, conv: nn.Conv2d, data: Data, labels: Tensor | None, settings: CompareSettings
    ) -> None:
        self.extractor, self.conv, self.data, self.labels, self.settings = extractor, conv, data, labels, settings
        self.original = copy.deepcopy(conv)
        self.weight = self.original.weight.detach()
        self.probe: Any = None

    def measure(self, name: str, numbers: int, used: float, approximation: Tensor) -> dict[str, Any]:
        """Measures an approximation of the kernels; the original must be measured first.

        The probe is trained on the features of the original network, the refitted probe on those of the approximation.
        """
        with torch.no_grad():
            self.conv.weight.copy_(approximation)
        error = float((approximation - self.weight).square().sum() / self.weight.square().sum())
        refitted = self.fit_probe() if self.settings.features is not None else None
        self.probe = self.probe or refitted
        outputs, errors = self.extract(self.data.test)
        line = {
            "method": name,
            "numbers": numbers,
            "numbers_per_kernel": used,
            "explained_percent": 100 * (1 - error),
            "output_error_percent": [round(value, 4) for value in (100 * errors.double()).tolist()],
        }
        if self.labels is not None:
            line["correct"] = (outputs["predictions"] == self.labels[self.data.test.labels]).int().tolist()
        if refitted is not None:
            features, expected = outputs["features"].numpy(), self.data.test.labels.numpy()
            line["probe_correct"] = (self.probe.predict(features) == expected).tolist()
            line["refitted_probe_correct"] = (refitted.predict(features) == expected).tolist()
        return line

    def fit_probe(self) -> Any:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        outputs, _ = self.extract(self.data.train)
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
        return probe.fit(outputs["features"].numpy(), self.data.train.labels.numpy())

    @torch.no_grad()
    def extract(self, split: Split) -> tuple[dict[str, Tensor], Tensor]:
        """Extracts features and predictions of images, and the error of the replaced layer.

        Returns:
            The means of the feature maps (images, channels) if there are features, and the predicted labels (images,)
            if there are logits; the squared error of the layer's outputs relative to the original outputs (images,).

        Raises:
            UsageError: unless the features are maps that depend on the convolution.
        """
        errors: list[Tensor] = []

        def compare_outputs(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            expected = self.original(*inputs)
            errors.append((output - expected).square().sum((1, 2, 3)) / expected.square().sum((1, 2, 3)))

        handle = self.conv.register_forward_hook(compare_outputs)
        results: dict[str, list[Tensor]] = {}
        option = f"features={self.settings.features}"
        for batch in self.data.eval_batches(split, MAX_PIXELS):
            outputs = self.extractor(batch.images)
            if "logits" in outputs:
                results.setdefault("predictions", []).append(outputs["logits"].argmax(1))
            if "features" in outputs:
                if outputs["features"].ndim != 4:
                    raise UsageError(f"{option} is invalid: its output has no height and width")
                results.setdefault("features", []).append(outputs["features"].mean((-2, -1)))
            if not errors:
                raise UsageError(f"{option} is invalid: it should come after layer={self.settings.layer}")
        handle.remove()
        return {name: torch.cat(values) for name, values in results.items()}, torch.cat(errors)


def list_tasks(settings: CompareSettings, in_channels: int) -> list[tuple[str, Method, MetricName, int]]:
    """The approximations: name, method, metric and numbers of a kernel, or of a filter in a fit per filter."""
    tasks: list[tuple[str, Method, MetricName, int]] = []
    for numbers, metric, method in itertools.product(settings.numbers, settings.metrics, settings.methods):
        name = method if metric == "pixels" else f"{method}, {metric}"
        if method != "Gabor fit per filter":
            tasks.append((name, method, metric, numbers))
        elif numbers - 1 in FILTER_AKPS:
            tasks.append((name, method, metric, numbers - 1 + in_channels))
    return tasks


def describe(line: Mapping[str, Any]) -> str:
    means = {key: sum(values) / len(values) for key, values in line.items() if key in PER_IMAGE}
    titles = {"correct": "top-1", "probe_correct": "probe", "refitted_probe_correct": "refitted"}
    accuracies = "".join(f", {title} {100 * means[key]:.2f}%" for key, title in titles.items() if key in means)
    return (
        f"{line['method']:29} {line['numbers_per_kernel']:5.2f} numbers per kernel, "
        f"{line['explained_percent']:.2f}% of the energy, output error {means['output_error_percent']:.2f}%{accuracies}"
    )


if __name__ == "__main__":
    run_script(main, "compare_approximations", CompareSettings)
