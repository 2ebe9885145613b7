"""Rotates and rescales plain kernels by interpolation with cubic splines.

Source: Thevenaz, Blu and Unser, Interpolation Revisited, IEEE Transactions on Medical Imaging, 2000: prefiltered
B-splines are more precise than other interpolation of the same cost, such as cubic convolution.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.ndimage import affine_transform
from torch import Tensor, nn

import acl
from acl.inspection import analytic_layers
from acl.transform import rescale_axes


def rotate_by_splines(model: nn.Module, degrees: float) -> nn.Module:
    """Rotates the kernels of all analytic layers in place, as ``acl.rotate`` does; all kernels are plain."""
    angle = math.radians(degrees)
    matrix = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    for layer in analytic_layers(model).values():
        assert layer.plain is not None
        layer.plain.data = _interpolate(layer.plain.data, matrix, layer.kernel_size)
    return model


def rescale_by_splines(model: nn.Module, factor: float, multiply_stride: bool = False) -> nn.Module:
    """Rescales all analytic layers, as ``acl.rescale`` does; all kernels are plain.

    There is no antialiasing, so the factor should be at least 1.
    """
    old_layers = analytic_layers(model)
    model = acl.rescale(model, factor, multiply_stride)
    for name, new in analytic_layers(model).items():
        old = old_layers[name]
        shifts = [axis.shift for axis in rescale_axes(old, factor, multiply_stride)]
        assert old.plain is not None and new.plain is not None
        new.plain.data = _interpolate(old.plain.data, np.eye(2) / factor, new.kernel_size, shifts) / factor**2
    return model


def _interpolate(
    kernels: Tensor, matrix: np.ndarray, size: tuple[int, int], shift: Sequence[float] = (0.0, 0.0)
) -> Tensor:
    """Samples kernels (n, kh, kw) at ``size`` points, which are 0 outside their window.

    Args:
        kernels: around the center of their window.
        matrix: maps the rows and columns of a new kernel to those of an old one, both relative to the center.
        size: of the new kernels.
        shift: of the new center, in rows and columns of the new kernels.
    """
    old_center, new_center = ((np.array(shape) - 1) / 2 for shape in (kernels.shape[-2:], size))
    offset = old_center - matrix @ (new_center + np.array(shift))
    basis = np.eye(math.prod(kernels.shape[-2:])).reshape(-1, *kernels.shape[-2:])  # interpolation is linear
    moved = [affine_transform(array, matrix, offset, size, order=3, mode="grid-constant") for array in basis]
    linear_map = torch.from_numpy(np.stack(moved)).flatten(1).to(kernels.device)
    return (kernels.double().flatten(1) @ linear_map).view(-1, *size).to(kernels)
