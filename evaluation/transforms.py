"""Measures what ``acl.rotate`` and ``acl.rescale`` achieve on a trained network, against resampled kernels."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize, rotate
from tqdm import tqdm

import acl
from acl.inspection import analytic_layers
from acl.transform import set_padding
from evaluation.finished_run import FinishedRun, evaluate_run
from evaluation.splines import rescale_by_splines, rotate_by_splines
from training.data import Data
from training.errors import UsageError
from training.splits import Split

ROTATIONS = (15.0, 30.0, 45.0, 60.0, 75.0, 90.0)
"""In degrees, counterclockwise."""
SCALES = (0.5, 1.5, 2.0)
MAX_CLASSIFIED = 2000
"""Images to classify."""
MAX_COMPARED = 50
"""Images whose outputs are compared."""
Moves = Mapping[str, Callable[[nn.Module], nn.Module]]
"""For each way, what moves a network or a layer."""


def measure_transforms(run: FinishedRun, data: Data) -> dict[str, Any]:
    """Measures a network on rotated and rescaled images, with its analytic layers rotated and rescaled alike.

    There are four ways: ``closed form`` moves the formulas (``acl.rotate``, ``acl.rescale``), and ``unchanged`` leaves
    them. ``resampled`` moves the same kernels by bicubic interpolation, with antialiasing for smaller images;
    ``splines`` by prefiltered cubic splines, which are more precise if kernels are smooth, but have no antialiasing, so
    that they are left out for smaller images. Plain layers are not moved. If there are some, the strides of rescaled
    layers are multiplied, so that plain layers see features of the size that they were trained on.

    Returns:
        ``rotation`` (degrees) and ``scale`` (factor) -> way -> ``top1``, the test accuracy in percent on
        ``MAX_CLASSIFIED`` random images, and ``error``, the squared error of the outputs of the first analytic layer,
        in percent of the transformed outputs on the images as they are. Formulas that ``acl.rescale`` refuses have no
        ``closed form``. Empty for a network without analytic layers.

    Raises:
        UsageError: for a network that takes images of one size only, such as LeNet-5.
    """
    layers = analytic_layers(run.model)
    if not layers:
        return {}
    data = replace(data, test=data.test.sample(MAX_CLASSIFIED))
    _check_accepts_any_size(run.model, data)
    resampled = acl.convert(acl.fold(copy.deepcopy(run.model)), dict.fromkeys(layers, "P100%"))
    networks = {"closed form": run.model, "resampled": resampled, "splines": resampled}
    features = _capture_input(run.model, next(iter(layers.values())), data)
    num_convolutions = sum(isinstance(module, nn.Conv2d) for module in run.model.modules())
    multiply_stride = len(layers) < num_convolutions

    values: dict[str, Any] = {"rotation": {}, "scale": {}}
    for degrees in ROTATIONS:
        images = rotate(data.test.images, degrees, InterpolationMode.BILINEAR)
        move = partial(acl.rotate, degrees=degrees)
        moves: Moves = {"closed form": move, "resampled": move, "splines": partial(rotate_by_splines, degrees=degrees)}
        errors = compare_outputs(networks, features, moves, partial(_rotate_features, degrees=degrees))
        rotated = replace(data, test=Split(images, data.test.labels))
        values["rotation"][f"{degrees:g}"] = _compare_ways(run, networks, moves, rotated, errors)
    for factor in SCALES:
        errors = compare_outputs(networks, features, _list_rescalings(factor, False), partial(resize_by, factor=factor))
        moves = _list_rescalings(factor, multiply_stride)
        resized = _resize_test_images(data, factor)
        values["scale"][f"{factor:g}"] = _compare_ways(run, networks, moves, resized, errors)
    return values


def _list_rescalings(factor: float, multiply_stride: bool) -> Moves:
    move = partial(acl.rescale, factor=factor, multiply_stride=multiply_stride)
    moves: dict[str, Callable[[nn.Module], nn.Module]] = {"closed form": move, "resampled": move}
    if factor >= 1:
        moves["splines"] = partial(rescale_by_splines, factor=factor, multiply_stride=multiply_stride)
    return moves


def _check_accepts_any_size(model: nn.Module, data: Data) -> None:
    resized = _resize_test_images(replace(data, test=data.test[:1]), max(SCALES))
    try:
        with torch.no_grad():
            model.eval()(next(resized.eval_batches(resized.test)).images)
    except RuntimeError as error:
        raise UsageError("the network takes images of one size only, so it cannot be measured at others") from error


def _compare_ways(
    run: FinishedRun,
    networks: Mapping[str, nn.Module],
    moves: Moves,
    data: Data,
    errors: Mapping[str, float],
) -> dict[str, dict[str, float]]:
    moved = _move_where_possible(networks, moves)
    return {
        way: {"top1": evaluate_run(replace(run, model=model), data, "test")["top1"], "error": errors[way]}
        for way, model in {**moved, "unchanged": run.model}.items()
        if way in errors
    }


def _move_where_possible(networks: Mapping[str, nn.Module], moves: Moves) -> dict[str, nn.Module]:
    """Copies networks and moves them, without those whose formulas ``acl.rescale`` refuses."""
    moved = {}
    for way, move in moves.items():
        try:
            moved[way] = move(copy.deepcopy(networks[way]))
        except acl.UnsuitableFormulasError as error:
            tqdm.write(str(error))
    return moved


def _resize_test_images(data: Data, factor: float) -> Data:
    images = data.test.images
    size = [round(factor * length) for length in images.shape[-2:]]
    images = resize(images, size, InterpolationMode.BICUBIC, antialias=True)
    crop = data.augmentation.crop
    augmentation = replace(data.augmentation, crop=None if crop is None else round(factor * crop))
    return replace(data, test=Split(images, data.test.labels), augmentation=augmentation)


@torch.no_grad()
def _capture_input(model: nn.Module, layer: nn.Module, data: Data) -> Tensor:
    """The input that a layer gets for ``MAX_COMPARED`` test images."""
    captured: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
    model.eval()(next(data.eval_batches(data.test[:MAX_COMPARED])).images)
    handle.remove()
    return captured[0]


@torch.no_grad()
def compare_outputs(
    networks: Mapping[str, nn.Module],
    features: Tensor,
    moves: Moves,
    move_features: Callable[[Tensor], Tensor],
) -> dict[str, float]:
    """Compares the first analytic layer's outputs on moved features with its moved outputs, per way.

    The layer has stride 1 here, so that no position is lost, and the margin that its window or the corners of rotated
    features reach is left out.
    """
    layers = {way: copy.deepcopy(next(iter(analytic_layers(model).values()))) for way, model in networks.items()}
    for layer in layers.values():
        layer.stride = (1, 1)
        set_padding(layer, (layer.kernel_size[0] // 2, layer.kernel_size[1] // 2))
    original = layers["closed form"]
    moved_features, expected = move_features(features), move_features(original(features))
    growth = max(moved_features.shape[-1] / features.shape[-1], 1.0)
    margin = math.ceil(max(original.kernel_size) * growth)
    errors = {}
    for way, moved_layer in {**_move_where_possible(layers, moves), "unchanged": original}.items():
        output = moved_layer(moved_features)
        rows, columns = (min(a, b) for a, b in zip(output.shape[-2:], expected.shape[-2:], strict=True))
        inside = _make_disk(rows, columns, min(rows, columns) / 2 - margin).to(output.device)
        kept, target = output[..., :rows, :columns][..., inside], expected[..., :rows, :columns][..., inside]
        errors[way] = 100 * float((kept - target).square().sum() / target.square().sum())
    return errors


def resize_by(features: Tensor, factor: float) -> Tensor:
    """Resizes features, or outputs of another size, by a factor, with bicubic interpolation."""
    size = [round(factor * length) for length in features.shape[-2:]]
    return resize(features, size, InterpolationMode.BICUBIC, antialias=factor < 1)


def _make_disk(height: int, width: int, radius: float) -> Tensor:
    """A mask (height, width) of the pixels within ``radius`` px of the center."""
    y, x = (torch.arange(n) - (n - 1) / 2 for n in (height, width))
    return y[:, None] ** 2 + x**2 <= radius**2


def _rotate_features(features: Tensor, degrees: float) -> Tensor:
    """Rotates features counterclockwise about their center, with bicubic interpolation."""
    angle = math.radians(degrees)
    matrix = features.new_tensor([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]])
    grid = F.affine_grid(matrix.expand(len(features), 2, 3), list(features.shape), align_corners=False)
    return F.grid_sample(features, grid, "bicubic", align_corners=False)
