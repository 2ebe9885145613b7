"""Models a layer's kernels by formulas: python scripts/approximate.py source=resnet18 (or source=conv1.npy)

Writes a table (.md, .csv) of R^2 against the numbers a kernel is given by, the kernels' formulas (.json) and a picture.
"""

import re
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from tqdm import tqdm

import acl
import models
from acl.plot import approximation, to_png
from models.library import read_kernels
from training.config import entry
from training.errors import UsageError
from training.files import write_atomic
from training.records import environment

SETTINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("Gabor, paper: shape alone", {"kinds": ["G"], "signed": True}),
    ("Gabor, amplitude", {"kinds": ["G"]}),
    ("Gabor, amplitude and offset", {"kinds": ["G"], "family": "extended", "fixed": {"gamma": 1.0}}),
    ("Gabor, extended and amplitude", {"kinds": ["G"], "family": "extended"}),
    ("five kinds, paper: shape alone", {"signed": True}),
    ("five kinds, amplitude", {}),
    ("five kinds, extended and amplitude", {"family": "extended"}),
)


def main(cfg: DictConfig) -> None:
    try:
        weight, name = kernels(cfg)
        rows, fits = [], {}
        for setting, options in tqdm(SETTINGS, desc="settings", disable=None):
            started = time.perf_counter()
            fit = acl.fit_kernels(weight, profile=cfg.profile, seed=cfg.seed, **options)
            if fit.r2 is None:
                raise UsageError(
                    f"all {len(fit.kernels)} kernels of {name} are zero or constant: there is nothing to fit"
                )
            fits[setting] = fit
            given = len(options.get("fixed", {})) + options.get("signed", False)  # AKPs and gains that are no numbers
            given *= sum(bool(kernel.akps) for kernel in fit.kernels)
            rows.append(row(setting, fit, fit.numbers - given, time.perf_counter() - started))
        for setting in ("five kinds, amplitude", "five kinds, extended and amplitude"):
            for tolerance in cfg.tolerances:
                chosen = fits[setting].choose(tolerance, weight)
                rows.append(
                    row(f"auto, {setting.split(', ')[1]}, tolerance {tolerance:g}", chosen, chosen.numbers, None)
                )
    except ValueError as error:
        raise UsageError(str(error)) from error
    frame = pd.DataFrame(rows)
    best = fits["five kinds, extended and amplitude"]
    path = Path(cfg.folder) / name
    write_atomic(path.with_suffix(".csv"), frame.to_csv(index=False, float_format="%.6g"))
    write_atomic(path.with_suffix(".json"), best.to_json() + "\n")
    write_atomic(path.with_suffix(".png"), to_png(approximation(weight, best.weight(), f"{name}, {SETTINGS[-1][0]}")))
    write_atomic(path.with_suffix(".md"), markdown(name, weight, frame, best))
    print(path.with_suffix(".md").read_text())


def kernels(cfg: DictConfig) -> tuple[Tensor, str]:
    """(out, in / groups, kh, kw), and what to call them. Raises ValueError for what is not there."""
    if str(cfg.source).endswith(".npy"):
        return read_kernels(Path(cfg.source)), Path(cfg.source).stem
    if cfg.source not in models.TORCHVISION and not cfg.source.startswith("timm/"):
        known = ", ".join(models.TORCHVISION)
        raise ValueError(f"source={cfg.source} is neither a network ({known}, timm/<name>) nor a .npy file")
    model = models.build(cfg.source, 3, 1000, {}, pretrained=cfg.weights)
    convolutions = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    layer = next(iter(convolutions)) if cfg.layer == "first" else cfg.layer
    if layer not in convolutions:
        raise ValueError(f"no convolution is named '{layer}'; there are: {', '.join(convolutions)}")
    return convolutions[layer].weight.detach(), re.sub("[/.]", "-", f"{cfg.source}-{layer}")


def row(setting: str, fit: acl.Fit, numbers: int, seconds: float | None) -> dict[str, object]:
    kinds = [kernel.kind for kernel in fit.kernels]
    return {
        "setting": setting,
        "numbers_per_kernel": numbers / len(kinds),
        "numbers": numbers,
        "r2": fit.r2,
        "worst_r2": min(kernel.r2 for kernel in fit.kernels if kernel.r2 is not None),
        "kinds": " ".join(f"{symbol}{kinds.count(symbol)}" for symbol in acl.kernels.KINDS if symbol in kinds),
        "seconds": seconds,
    }


def markdown(name: str, weight: Tensor, frame: pd.DataFrame, fit: acl.Fit) -> str:
    out, inside, *size = weight.shape
    lines = [
        f"# Kernels of {name} as formulas",
        "",
        f"{out * inside} kernels of {size[0]} x {size[1]}, {weight.numel():,} numbers as they are. R² is "
        "energy-weighted; "
        "the shape alone leaves each kernel's size, and for kinds other than Gabor its sign, out of account.",
        "",
        "| setting | numbers a kernel | numbers | R² | worst kernel | kinds |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for line in frame.itertuples():
        lines.append(
            f"| {line.setting} | {line.numbers_per_kernel:.2f} | {line.numbers:,} | {line.r2:.4f} | "
            f"{line.worst_r2:.3f} | {line.kinds} |"
        )
    where = environment()
    lines += [
        "",
        *([f"{len(fit.unfit)} kernels are zero or constant and stay plain.", ""] if fit.unfit else []),
        f"{frame['seconds'].max():.1f} s for the longest setting on {where['machine']['device']}, "
        f"{torch.get_num_threads()} threads; commit {where['commit']}; torch {where['versions']['torch']}.",
        "",
        f"![Kernels, formulas and residuals]({name}.png)",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    entry(main, "approximate")
