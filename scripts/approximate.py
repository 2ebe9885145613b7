"""Approximates a layer's kernels by formulas: python scripts/approximate.py source=resnet18 (or source=conv1.npy)

Writes a table (.md, .csv) of R^2 against the number of parameters per kernel, the formulas (.json) and a figure
(.png, .pdf).
"""

import hashlib
import itertools
import re
import time
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
from omegaconf import OmegaConf
from pydantic import BeforeValidator, Field
from torch import Tensor, nn
from tqdm import tqdm

import acl
import models
from acl.kernels import Profile
from acl.plot import approximation, to_pdf, to_png
from models.library import read_kernels
from reporting.render import describe_machine
from training.cli import run_script
from training.config import CONFIGS
from training.errors import UsageError
from training.files import write_together
from training.provenance import describe_environment
from training.record import Machine
from training.validation import FilePath, Seed, strict_dataclass

_GABOR: dict[str, Any] = {"kinds": ["G"]}
_EXTENDED: dict[str, Any] = {"kinds": ["G"], "family": "extended"}
_OFFSET: dict[str, Any] = {**_EXTENDED, "fixed": {"gamma": 1.0}}
FITS: dict[str, dict[str, Any]] = {
    **{
        title: {**options, "metric": "pixels"}
        for title, options in {
            "Gabor, paper: shape alone": {**_GABOR, "signed": True},
            "Gabor, amplitude": _GABOR,
            "Gabor, amplitude and offset": _OFFSET,
            "Gabor, extended and amplitude": _EXTENDED,
            "all kinds, paper: shape alone": {"signed": True},
            "all kinds, amplitude": {},
            "all kinds, extended and amplitude": {"family": "extended"},
            "Gabor per filter": {**_GABOR, "per": "filter"},
            "Gabor per filter, offset": {**_OFFSET, "per": "filter"},
            "Gabor per filter, extended": {**_EXTENDED, "per": "filter"},
        }.items()
    },
    "images: Gabor, amplitude": _GABOR,
    "images: Gabor, extended and amplitude": _EXTENDED,
    "images: Gabor per filter": {**_GABOR, "per": "filter"},
    "images: Gabor per filter, extended": {**_EXTENDED, "per": "filter"},
}
"""The options of ``acl.fit_kernels`` for each line of the table."""
PAPER, BEST = "all kinds, amplitude", "all kinds, extended and amplitude"
SOURCE = "Source: "


@strict_dataclass
class ApproximateSettings:
    source: str
    weights: bool | str
    layer: str
    tolerances: Annotated[
        list[Annotated[float, Field(ge=0, le=1)]],
        BeforeValidator(lambda value: value if isinstance(value, list) else [value]),
    ]
    profile: Profile
    seed: Seed
    folder: FilePath


def main(settings: ApproximateSettings) -> None:
    try:
        weight, name = load_target(settings.source, settings.weights, settings.layer)
        source = describe_source(settings, weight)
        check_outputs(settings.folder / f"{name}.md", source)
        lines, fits = [], {}
        for title, options in tqdm(FITS.items(), desc="settings", disable=None):
            started = time.perf_counter()
            fits[title] = acl.fit_kernels(weight, profile=settings.profile, seed=settings.seed, **options)
            seconds = time.perf_counter() - started
            if fits[title].r2 is None:
                raise UsageError(
                    f"all {len(fits[title].kernels)} kernels of {name} are zero or constant: there is nothing to fit"
                )
            # Fixed AKPs do not count as parameters, nor do the gains if only the shape is fitted.
            num_uncounted = len(options.get("fixed", {})) + (1 if options.get("signed") else 0)
            lines.append(describe_fit(title, fits[title], weight, num_uncounted, seconds))
        for title, tolerance in itertools.product((PAPER, BEST), settings.tolerances):
            auto_title = f"auto, {title.split(', ')[1]}, tolerance {tolerance:g}"
            lines.append(describe_fit(auto_title, fits[title].choose(tolerance, weight), weight))
    except ValueError as error:
        raise UsageError(str(error)) from error
    frame, best = pd.DataFrame(lines), fits[BEST]
    figure = approximation(weight, best.weight(), f"{name}, {BEST}")
    text = render_markdown(name, source, weight, frame, len(best.degenerate_slots))
    contents: dict[str, str | bytes] = {
        ".csv": frame.to_csv(index=False, float_format="%.6g"),
        ".json": best.to_json() + "\n",
        "_paper.json": fits[PAPER].to_json() + "\n",
        ".png": to_png(figure),
        ".pdf": to_pdf(figure),
        ".md": text,
    }
    write_together({settings.folder / f"{name}{suffix}": content for suffix, content in contents.items()})
    print(text)


def describe_source(settings: ApproximateSettings, weight: Tensor) -> str:
    """Names the kernels, with a digest, and the options that are not the default ones and change the report."""
    defaults: Any = OmegaConf.load(CONFIGS / "approximate.yaml")
    options = {name: getattr(settings, name) for name in ("weights", "profile", "tolerances", "seed")}
    changed = [f"{name}={value}" for name, value in options.items() if value != defaults[name]]
    digest = hashlib.sha256(weight.contiguous().numpy().tobytes()).hexdigest()[:12]
    return ", ".join([settings.source, f"SHA-256 {digest}", *changed])


def check_outputs(report: Path, source: str) -> None:
    """Raises UsageError if the existing report describes other kernels, such as of a file of the same name."""
    lines = report.read_text("utf-8").splitlines() if report.exists() else []
    described = next((line.removeprefix(SOURCE) for line in lines if line.startswith(SOURCE)), source)
    if described.partition(", ")[2] != source.partition(", ")[2]:
        raise UsageError(f"{report} describes {described}; set folder=<another folder>, or move the file away")


def load_target(source: str, weights: bool | str, layer: str) -> tuple[Tensor, str]:
    """Loads kernels (out, in / groups, kh, kw) and names them. Raises ValueError for an unknown source or layer."""
    if source.endswith(".npy"):
        return read_kernels(Path(source)), Path(source).stem
    if source not in models.TORCHVISION and not source.startswith("timm/"):
        known = ", ".join(models.TORCHVISION)
        raise ValueError(f"source={source} is neither a network ({known}, timm/<name>) nor a .npy file")
    model = models.create_model(source, 3, 1000, {}, pretrained=weights)
    convolutions = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    name = next(iter(convolutions)) if layer == "first" else layer
    if name not in convolutions:
        raise ValueError(f"no convolution is named '{name}'; the model has: {', '.join(convolutions)}")
    return convolutions[name].weight.detach(), re.sub("[/.]", "-", f"{source}-{name}")


def describe_fit(
    title: str, fit: acl.Fit, weight: Tensor, num_uncounted: int = 0, seconds: float | None = None
) -> dict[str, object]:
    """Describes a fit to a weight; ``num_uncounted`` values of each analytic kernel are no parameters of it."""
    kinds = [kernel.kind for kernel in fit.kernels]
    energies, errors = ((kernels**2).sum((2, 3)) for kernels in (weight, weight - fit.weight()))
    parameters = fit.num_parameters - num_uncounted * sum(bool(kernel.akps) for kernel in fit.kernels)
    return {
        "setting": title,
        "numbers_per_kernel": parameters / (weight.shape[0] * weight.shape[1]),
        "numbers": parameters,
        "r2": 1 - acl.output_error(weight, fit.weight(), "pixels"),
        "output_error": acl.output_error(weight, fit.weight()),
        "worst_r2": 1 - float((errors / energies)[energies > 0].max()),
        "kinds": " ".join(f"{symbol}{kinds.count(symbol)}" for symbol in acl.kernels.KINDS if symbol in kinds),
        "seconds": seconds,
    }


def render_markdown(name: str, source: str, weight: Tensor, frame: pd.DataFrame, degenerate: int) -> str:
    out_channels, in_channels, *size = weight.shape
    lines = [
        f"# Kernels of {name} as formulas",
        "",
        f"{out_channels * in_channels} kernels of size {size[0]} x {size[1]}, {weight.numel():,} weights. R² is the "
        "share of the kernels' energy over pixels that a fit explains. The output error is the energy of the error of "
        "the layer's outputs on images of power 1 / f², relative to that of the outputs. Fits labeled 'images' "
        "minimize it, all others the error over pixels. 'Shape alone' ignores each kernel's norm.",
        "",
        f"{SOURCE}{source}",
        "",
        "| setting | parameters per kernel | parameters | R² | output error | worst R² of a kernel | kinds |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    lines += [
        f"| {line.setting} | {line.numbers_per_kernel:.2f} | {line.numbers:,} | {line.r2:.4f} | "
        f"{line.output_error:.2%} | {line.worst_r2:.3f} | {line.kinds} |"
        for line in frame.itertuples()
    ]
    environment = describe_environment(torch.device("cpu"))  # where fit_kernels computes
    if degenerate:
        lines += ["", f"Zero or constant kernels, which stay plain: {degenerate}."]
    lines += [
        "",
        f"The slowest setting took {frame['seconds'].max():.1f} s on "
        f"{describe_machine(Machine(**environment['machine']))}; commit {environment['commit']}; "
        f"torch {environment['versions']['torch']}.",
        "",
        f"![Kernels, formulas and residuals]({name}.png)",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_script(main, "approximate", ApproximateSettings)
