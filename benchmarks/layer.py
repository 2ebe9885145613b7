"""Cost of analytic layers relative to plain convolutions and to GaborNet: time, memory and operations.

    python benchmarks/layer.py [folder=results/benchmarks] [rounds=15]

The tasks of a pair alternate in short blocks within one process, and every block gives one ratio: the table shows the
median ratio and its quartiles. Writes layer.md and layer.csv, on a GPU layer_cuda.md and layer_cuda.csv.
"""

import copy
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
import torchvision
from timing import Seconds, compute_ratios, parse_arguments, time_alternately
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from acl import AnalyticConv2d, convert, fold, param_groups
from models.four_layer import FourLayer
from models.lenet import LeNet
from training.files import write_atomic
from training.provenance import describe_environment

MOSAIC = {"conv1": "G2 Lg1 Lt1 Tf1 Ts1", "conv2": "G32 Lg16 Lt8 Tf32 Ts8"}
FIVE_KINDS = "G35% Lg15% Lt10% Tf30% Ts10%"
EXP3 = "G30 Lg15 Lt15 Tf30 Ts6 P96"
BLOCK_SECONDS = 0.15

Task = Callable[[], object]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class Ratio:
    """One line of the table: a cost relative to that of a reference."""

    work: str
    median: float
    low: float
    high: float
    limit: float | None  # the largest ratio that we accept; None: no limit
    milliseconds: str = ""  # medians


def main() -> None:
    options = parse_arguments(folder="results/benchmarks", rounds="15")
    folder, rounds = Path(options["folder"]), int(options["rounds"])
    ratios = [*compare_training(rounds), *compare_evaluation(rounds), *compare_synthesis(rounds)]
    frame = pd.DataFrame([asdict(ratio) for ratio in ratios])
    name = "layer" if DEVICE.type == "cpu" else f"layer_{DEVICE.type}"
    write_atomic(folder / f"{name}.csv", frame.to_csv(index=False, float_format="%.4g"))
    text = render(ratios, rounds, count_operations())
    write_atomic(folder / f"{name}.md", text)
    print(text)


def time_tasks(tasks: Mapping[str, Task], rounds: int, title: str) -> Seconds:
    """The seconds of a call of each task in each round, in alternating blocks of equal numbers of calls."""
    for task in [*tasks.values()] * 2:
        task()

    def time_blocks(calls: int, rounds: int) -> Seconds:
        blocks = {name: partial(run_block, task, calls) for name, task in tasks.items()}
        seconds, _ = time_alternately(blocks, rounds, title)
        return {name: [value / calls for value in values] for name, values in seconds.items()}

    slowest = max(seconds[0] for seconds in time_blocks(1, 1).values())
    return time_blocks(max(1, math.ceil(BLOCK_SECONDS / slowest)), rounds)


def compare(work: str, seconds: Seconds, task: str, reference: str, limit: float | None) -> Ratio:
    values = compute_ratios(seconds[task], seconds[reference])
    low, median, high = statistics.quantiles(values, n=4)
    medians = ", ".join(f"{name} {1000 * statistics.median(values):.3g}" for name, values in seconds.items())
    return Ratio(work, median, low, high, limit, medians)


def measure(work: str, tasks: tuple[Task, Task], rounds: int, limit: float | None) -> Ratio:
    """Measures the time of the first task relative to the second."""
    return compare(work, time_tasks({"first": tasks[0], "second": tasks[1]}, rounds, work), "first", "second", limit)


def run_block(task: Task, calls: int, _: int) -> None:
    for _ in range(calls):
        task()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def make_step(model: nn.Module, images: Tensor, autocast: bool = False) -> Task:
    """A training step as in ``training.loop``: forward pass, cross-entropy, backward pass, fused AdamW."""
    model.to(DEVICE).to(memory_format=torch.channels_last).train()
    images = images.to(DEVICE).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(len(images), device=DEVICE) % 10
    optimizer = torch.optim.AdamW(param_groups(model, 1e-5, weight_decay=0.01), fused=True)

    def step() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16) if autocast else nullcontext():
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def compare_training(rounds: int) -> list[Ratio]:
    """Training steps, eager and compiled, each against the faster of the plain network eager and compiled."""
    digits, colors, photos = torch.randn(128, 1, 28, 28), torch.randn(128, 3, 32, 32), torch.randn(16, 3, 224, 224)
    gabor = convert(FourLayer(), "all", "G100%")
    filters = convert(FourLayer(), "all", "G100%", per="filter")
    resnet, exp3 = torchvision.models.resnet18(), convert(torchvision.models.resnet18(), "first", EXP3)
    cases: list[tuple[str, nn.Module, nn.Module, Tensor, float]] = [
        ("four layers, Gabor per filter", filters, FourLayer(), colors, 0.65),
        ("four layers, Gabor per filter, bf16", filters, FourLayer(), colors, 0.85),
        ("four layers, Gabor", gabor, FourLayer(), colors, 1.08),
        ("four layers, Gabor, bf16", gabor, FourLayer(), colors, 1.15),
        ("four layers, five kinds with amplitude", make_five_kinds(), FourLayer(), colors, 1.08),
        ("four layers, five kinds with amplitude, bf16", make_five_kinds(), FourLayer(), colors, 1.15),
        ("LeNet, five kinds", convert(LeNet(), MOSAIC), LeNet(), digits, 1.20),
        ("ResNet-18, exp3, 224 px, batch 16", exp3, resnet, photos, 1.02),
    ]
    ratios = []
    for title, analytic, plain, images, limit in cases:
        networks = {"analytic": analytic, "plain": plain}
        networks |= {f"{name} compiled": compiled(network) for name, network in networks.items()}
        steps = {name: make_step(network, images, "bf16" in title) for name, network in networks.items()}
        seconds = time_tasks(steps, rounds, title)
        reference = min(("plain", "plain compiled"), key=lambda name: statistics.median(seconds[name]))
        for name, suffix in (("analytic", ""), ("analytic compiled", ", compiled")):
            ratios.append(compare(f"training step: {title}{suffix}", seconds, name, reference, limit))
        if DEVICE.type == "cpu":
            ratio = measure_peak_memory(steps["analytic"]) / measure_peak_memory(steps["plain"])
            ratios.append(Ratio(f"peak memory of the training step: {title}", ratio, ratio, ratio, 1.05))
    steps = {"spread": make_step(spread_kernels(gabor), colors), "in order": make_step(gabor, colors)}
    title = "training step: four layers, Gabor, with a placement, against in order"
    ratios.append(compare(title, time_tasks(steps, rounds, title), "spread", "in order", 1.02))
    return ratios


def make_five_kinds() -> nn.Module:
    return convert(FourLayer(), "all", FIVE_KINDS, amplitude=True)


def compiled(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    model.compile()
    return model


def spread_kernels(model: nn.Module) -> nn.Module:
    """A copy whose analytic layers have their kernels in a random order of slots."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, AnalyticConv2d):
            module.placement = torch.randperm(module.out_channels * module.in_channels, device=DEVICE)
    return model


def measure_peak_memory(step: Task) -> int:
    """The largest sum of bytes that a step has allocated on the CPU at any one time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def compare_evaluation(rounds: int) -> list[Ratio]:
    """Evaluation against the folded network, which has the same weights: other activations take other time."""
    colors = torch.randn(128, 3, 32, 32)
    cases: list[tuple[str, nn.Module, Tensor, float]] = [
        ("LeNet, five kinds", convert(LeNet(), MOSAIC), torch.randn(128, 1, 28, 28), 1.01),
        ("four layers, Gabor", convert(FourLayer(), "all", "G100%"), colors, 1.01),
        ("four layers, Gabor per filter", convert(FourLayer(), "all", "G100%", per="filter"), colors, 0.5),
    ]
    ratios = []
    for title, model, images, limit in cases:
        model.to(DEVICE).to(memory_format=torch.channels_last).eval()
        batch = images.to(DEVICE).contiguous(memory_format=torch.channels_last)
        networks = {"analytic": model, "folded": fold(copy.deepcopy(model))}
        if limit < 1:
            networks["folded factored"] = fold(copy.deepcopy(model), factored=True)
        evaluate = torch.no_grad()(lambda network, batch=batch: network(batch))
        tasks = {name: partial(evaluate, network) for name, network in networks.items()}
        seconds = time_tasks(tasks, rounds, title)
        for name in (name for name in networks if name != "folded"):
            suffix = "" if name == "analytic" else f", {name}"
            ratios.append(compare(f"evaluation: {title}{suffix}, against folded", seconds, name, "folded", limit))
    return ratios


def compare_synthesis(rounds: int) -> list[Ratio]:
    def synthesize(kernels: int, is_compiled: bool = False) -> Task:
        layer = AnalyticConv2d(1, kernels, 7, bias=False, arrangement="G100%").to(DEVICE)

        def sum_weight() -> Tensor:
            return layer.weight.sum()

        total = torch.compile(sum_weight) if is_compiled else sum_weight
        return lambda: total().backward()

    ratios = []
    try:
        from GaborNet import GaborConv2d
    except ImportError:
        print("GaborNet is not installed: pip install --no-deps gabornet==0.2.0", file=sys.stderr)
    else:
        peer = GaborConv2d(3, 64, 7).to(DEVICE)
        for suffix in ("", ", compiled"):
            tasks = synthesize(192, is_compiled=bool(suffix)), peer.calculate_weights
            title = f"synthesis: 192 Gabor kernels 7 x 7, forward and backward, against GaborNet's forward{suffix}"
            ratios.append(measure(title, tasks, rounds, 0.01))
    for small, large in itertools.pairwise((192, 1024, 4096, 16384, 65536)):
        title = f"synthesis: a kernel of {large:,} against one of {small:,}"
        tasks = synthesize(large), synthesize(small)
        ratio, scale = measure(title, tasks, rounds, 1.0), small / large
        ratios.append(Ratio(title, ratio.median * scale, ratio.low * scale, ratio.high * scale, ratio.limit))
    return ratios


def count_operations() -> str:
    """Counts the aten calls of the synthesis of a small layer, nested ones included."""
    layer = AnalyticConv2d(6, 16, 5, arrangement="G20% Lg20% Lt20% Tf20% Ts20%", bias=False).to(DEVICE)
    gradient = torch.randn(16, 6, 5, 5, device=DEVICE)
    layer.weight.backward(gradient)  # makes the grid
    with profile(activities=[ProfilerActivity.CPU]) as forward:
        weight = layer.weight
    with profile(activities=[ProfilerActivity.CPU]) as backward:
        weight.backward(gradient)
    counts = [
        sum(event.count for event in profiler.key_averages() if event.key.startswith("aten::"))
        for profiler in (forward, backward)
    ]
    return f"aten calls of the synthesis of a five-kind 16 x 6 layer: {counts[0]} forward, {counts[1]} backward."


def render(ratios: list[Ratio], rounds: int, operations: str) -> str:
    environment = describe_environment(DEVICE)
    lines = [
        "# Cost of analytic layers",
        "",
        "Against the same network with plain convolutions, unless the line says otherwise: median ratio of "
        f"{rounds} alternating blocks, and its quartiles. Training is compared with the faster of the plain network "
        "run eagerly and compiled.",
        "",
        "| work | ratio | quartiles | limit | met | milliseconds |",
        "|---|---:|---:|---:|---|---|",
    ]
    for ratio in ratios:
        limit = "" if ratio.limit is None else f"{ratio.limit:g}"
        is_met = "" if ratio.limit is None else "yes" if ratio.median <= ratio.limit else "no"
        spread = f"{ratio.low:.3g} to {ratio.high:.3g}"
        lines.append(f"| {ratio.work} | {ratio.median:.3g} | {spread} | {limit} | {is_met} | {ratio.milliseconds} |")
    lines += [
        "",
        operations,
        "",
        f"{environment['machine']['device']}, {environment['machine']['threads']} threads; commit "
        f"{environment['commit']}; torch {environment['versions']['torch']}.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
