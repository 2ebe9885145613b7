"""Our kernels against those of the TGD authors' own package.

tgd_reference.npz holds numbers computed by THU-CVlab/TGD 0.9.1 (MIT license) with the kernel functions Gaussian
(delta = 2, which is our s) and Exp (k = 1, delta = 0.56, which is our 1 / s).
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from acl.kernels import lot, tgd1, tgd2

REFERENCES: dict[str, np.ndarray[Any, Any]] = dict(np.load(Path(__file__).with_name("tgd_reference.npz")))
PROFILES = {"Gaussian": ("gaussian", 2.0), "Exp": ("exponential", 1 / 0.56)}


def compute_cosine(kernel: torch.Tensor, reference: np.ndarray[Any, Any]) -> float:
    ours = kernel.numpy().ravel()
    return float(abs(ours @ reference.ravel()) / np.linalg.norm(ours) / np.linalg.norm(reference))


def select(prefix: str, part: str) -> list[str]:
    names = [name for name in REFERENCES if name.startswith(prefix) and part in name]
    assert names
    return names


@pytest.mark.parametrize("name", select("1d", "order"))
def test_kernels_along_their_direction_equal_reference(name: str) -> None:
    profile, s = PROFILES[name.split("/")[1]]
    function = tgd1 if "order1" in name else tgd2
    theta, width, sigma = torch.tensor([0.0, s, 1.0], dtype=torch.float64)
    kernel = function(theta, width, sigma, size=(1, len(REFERENCES[name])), profile=profile)
    assert compute_cosine(kernel, REFERENCES[name]) > 1 - 1e-9


@pytest.mark.parametrize("name", select("2d", "rotational/order2"))
def test_lot_is_isotropic_second_order_of_reference(name: str) -> None:
    """But for the sampling of the ring around the center, which matters less on larger grids."""
    profile, s = PROFILES[name.split("/")[1]]
    width = torch.tensor(s, dtype=torch.float64)
    cosine = compute_cosine(lot(width, size=REFERENCES[name].shape, profile=profile), REFERENCES[name])
    assert cosine > (0.9999 if "size11" in name else 0.9997)


@pytest.mark.parametrize("name", select("2d", "directional/order1"))
def test_first_order_differs_from_reference_by_smoothing_across(name: str) -> None:
    """The package smooths across with the running integral of w, we with a Gaussian of its own width."""
    profile, s = PROFILES[name.split("/")[1]]
    theta = torch.tensor(float(name.rpartition("theta")[2]), dtype=torch.float64).deg2rad()

    def compute_loss(log_widths: np.ndarray[Any, Any]) -> float:
        width, sigma = torch.from_numpy(np.exp(log_widths))
        return -compute_cosine(
            tgd1(theta, width, sigma, size=REFERENCES[name].shape, profile=profile), REFERENCES[name]
        )

    best = -minimize(compute_loss, np.log([s, 1.5]), method="Nelder-Mead", options={"fatol": 1e-6}).fun
    assert 0.97 < best < 0.996
