"""Overhead of checkpoints, records, locks, metrics and progress bars: time of a run relative to a bare loop.

    python benchmarks/overhead.py data.root=/data

Both load the same data, train the same network on the same number of batches and evaluate the validation and test
splits; the bare loop writes no files. The two alternate. Each pair gives a ratio of wall time and a ratio of processor
time, which is less affected by other work on the machine.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F
from tqdm import tqdm

from training.config import compose
from training.evaluate import evaluate
from training.loop import run
from training.optim import build_optimizer, build_schedule
from training.settings import RunSettings, build_model, load_run_data, parse_run

PAIRS = 7


def main() -> None:
    wall: dict[str, list[float]] = {"bare": [], "run": []}
    processor: dict[str, list[float]] = {"bare": [], "run": []}
    with tempfile.TemporaryDirectory() as folder:
        defaults = ["data=mnist", "model=lenet", "trainer.epochs=3", "trainer.accelerator=cpu", f"paths.runs={folder}"]
        for pair in tqdm(range(PAIRS + 1), desc="pairs", disable=None):
            settings = parse_run(compose([*defaults, *sys.argv[1:], f"seed={pair}"]))
            tasks: list[tuple[str, Callable[[RunSettings], object]]] = [("bare", run_bare), ("run", run)]
            if pair % 2:  # alternate the order
                tasks.reverse()
            for name, task in tasks:
                started = time.perf_counter(), time.process_time()
                task(settings)
                wall[name].append(time.perf_counter() - started[0])
                processor[name].append(time.process_time() - started[1])
    epochs = settings.trainer.epochs
    print(f"{PAIRS} pairs of runs of {epochs} epochs, {torch.get_num_threads()} threads; run / bare loop:")
    for kind, seconds in (("wall time", wall), ("processor time", processor)):
        # The first pair is a warm-up.
        ratios = [a / b for a, b in zip(seconds["run"][1:], seconds["bare"][1:], strict=True)]
        print(f"  {kind:14} median {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


def run_bare(settings: RunSettings) -> None:
    torch.manual_seed(settings.seed)
    data = load_run_data(settings)
    model = build_model(settings, data).to(memory_format=data.memory_format)
    size, epochs = settings.trainer.batch_size, settings.trainer.epochs
    steps = len(data.train) // size
    optimizer = build_optimizer(model, settings.optim)
    schedule = build_schedule(optimizer, settings.optim, steps * epochs)
    for _ in range(epochs):
        model.train()
        order = torch.randperm(len(data.train))
        for step in range(steps):
            batch = data.train[order[step * size : (step + 1) * size]]
            loss = F.cross_entropy(model(data.normalize(batch.images)), batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        evaluate(model, data, data.val)
    evaluate(model, data, data.test)


if __name__ == "__main__":
    main()
