"""Overhead of checkpoints, records, locks, metrics and progress bars: time of a run relative to a bare loop.

    python benchmarks/overhead.py data.root=/data

Both load the same data, train the same network on the same number of batches and evaluate the validation and test
splits; the bare loop writes no files. The two alternate. Each pair gives a ratio of wall time and a ratio of processor
time, which is less affected by other work on the machine.
"""

import sys
import tempfile

import torch
from timing import print_ratios, time_alternately
from torch.nn import functional as F

from training.config import compose
from training.evaluate import predict
from training.loop import run
from training.optim import build_optimizer, build_schedule
from training.settings import RunSettings, build_model, load_run_data, parse_run

PAIRS = 7


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        defaults = ["data=mnist", "model=lenet", "trainer.epochs=3", "trainer.accelerator=cpu", f"paths.runs={folder}"]
        overrides = [*defaults, *sys.argv[1:]]
        settings = [parse_run(compose([*overrides, f"seed={pair}"])) for pair in range(PAIRS + 1)]
        tasks = {"bare": lambda pair: run_bare(settings[pair]), "run": lambda pair: run(settings[pair])}
        wall, processor = time_alternately(tasks, PAIRS + 1, "pairs")
    epochs = settings[0].trainer.epochs
    print(f"{PAIRS} pairs of runs of {epochs} epochs, {torch.get_num_threads()} threads; run / bare loop:")
    for kind, seconds in (("wall time", wall), ("processor time", processor)):
        print_ratios(kind, seconds["run"][1:], seconds["bare"][1:])  # the first pair is a warm-up


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
        predict(model, data, data.val)
    predict(model, data, data.test)


if __name__ == "__main__":
    main()
