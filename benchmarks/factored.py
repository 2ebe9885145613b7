"""Time of filter mosaics computed as two convolutions, relative to one dense convolution, from layer to layer.

    python benchmarks/factored.py [folder=results/benchmarks] [rounds=7]

``acl.factored`` takes its rule from this. Writes factored.md, on a GPU factored_cuda.md.
"""

import statistics
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from timing import compute_ratios, parse_arguments, time_alternately
from torch import Tensor

from acl import AnalyticConv2d
from training.files import write_atomic
from training.provenance import describe_environment

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH = 64
SHAPES = [(3, 32, 32), (8, 32, 32), (16, 32, 32), (32, 64, 16), (64, 128, 8), (128, 128, 4), (256, 256, 8)]
"""(input channels, output channels, height and width)"""
MODES = [
    (kernel_size, mode, dtype)
    for kernel_size in (3, 5)
    for mode in ("training", "evaluation")
    for dtype in ("float32", "bf16")
]


def main() -> None:
    options = parse_arguments(folder="results/benchmarks", rounds="7")
    folder, rounds = Path(options["folder"]), int(options["rounds"])
    environment = describe_environment(DEVICE)
    lines = [
        "# Filter mosaics as two convolutions",
        "",
        "Time of a Gabor filter mosaic computed as a 1 x 1 and a depthwise convolution, relative to a dense one: the "
        f"median of {rounds} alternating rounds, batch {BATCH}, channels_last; training includes synthesis.",
        "",
        "| layer | " + " | ".join(f"{mode} {dtype}, {k} x {k}" for k, mode, dtype in MODES) + " |",
        "|---|" + "---:|" * len(MODES),
    ]
    for in_channels, out_channels, size in SHAPES:
        ratios = [compare(in_channels, out_channels, size, *mode, rounds) for mode in MODES]
        cells = " | ".join(f"{ratio:.2f}" for ratio in ratios)
        lines.append(f"| {in_channels} -> {out_channels}, {size} x {size} | {cells} |")
    lines += [
        "",
        f"{environment['machine']['device']}, {environment['machine']['threads']} threads; commit "
        f"{environment['commit']}; torch {environment['versions']['torch']}.",
    ]
    text = "\n".join(lines) + "\n"
    write_atomic(folder / ("factored.md" if DEVICE.type == "cpu" else f"factored_{DEVICE.type}.md"), text)
    print(text)


def compare(
    in_channels: int, out_channels: int, size: int, kernel_size: int, mode: str, dtype: str, rounds: int
) -> float:
    """The median ratio of the times of a layer that is computed factored and of one that is computed dense."""
    x = torch.randn(BATCH, in_channels, size, size, device=DEVICE).contiguous(memory_format=torch.channels_last)

    def make_task(compute: str) -> Callable[[int], None]:
        layer = AnalyticConv2d(
            in_channels,
            out_channels,
            kernel_size,
            padding=kernel_size // 2,
            bias=False,
            arrangement="G100%",
            per="filter",
            compute=compute,  # type: ignore[arg-type]
        ).to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]
        inputs = x.clone().requires_grad_(mode == "training" and in_channels > 3)
        return lambda _: run(layer.train(mode == "training"), inputs, dtype)

    tasks = {compute: make_task(compute) for compute in ("factored", "dense")}
    time_alternately(tasks, 2)
    seconds, _ = time_alternately(tasks, rounds)
    return statistics.median(compute_ratios(seconds["factored"], seconds["dense"]))


def run(layer: AnalyticConv2d, x: Tensor, dtype: str) -> None:
    """Performs a forward pass, and in training mode a backward pass."""
    with (
        torch.autocast(DEVICE.type, torch.bfloat16) if dtype == "bf16" else nullcontext(),
        torch.set_grad_enabled(layer.training),
    ):
        output = layer(x)
    if layer.training:
        output.float().sum().backward()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
