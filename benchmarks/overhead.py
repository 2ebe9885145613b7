"""What checkpoints, records, locks, metrics and progress cost: a whole run against a bare loop of the same steps.

    python benchmarks/overhead.py data.root=/data

Both load the same data, train the same network for the same batches and read validation and test set alike; the bare
loop keeps nothing. The runs alternate, and each pair gives one ratio of wall time and one of processor time, which
other work on the machine disturbs less.
"""

import statistics
import sys
import tempfile
import time

import torch
from omegaconf import DictConfig
from torch.nn import functional as F
from tqdm import tqdm

from training import data as datasets
from training.config import compose
from training.loop import build, build_optimizer, build_schedule, evaluate, prepare, run

ROUNDS = 7


def main() -> None:
    wall: dict[str, list[float]] = {"bare": [], "run": []}
    processor: dict[str, list[float]] = {"bare": [], "run": []}
    with tempfile.TemporaryDirectory() as folder:
        base = ["data=mnist", "model=lenet", "trainer.epochs=3", "trainer.accelerator=cpu", f"paths.runs={folder}"]
        for number in tqdm(range(ROUNDS + 1), desc="rounds", disable=None):
            cfg = compose([*base, *sys.argv[1:], f"seed={number}"])
            for name, task in (("bare", bare), ("run", run))[:: 1 if number % 2 else -1]:
                started = time.perf_counter(), time.process_time()
                task(cfg)
                wall[name].append(time.perf_counter() - started[0])
                processor[name].append(time.process_time() - started[1])
    print(f"{ROUNDS} pairs of runs of {cfg.trainer.epochs} epochs, {torch.get_num_threads()} threads; run / bare loop:")
    for kind, seconds in (("wall time", wall), ("processor time", processor)):
        # The first round warms up.
        ratios = [a / b for a, b in zip(seconds["run"][1:], seconds["bare"][1:], strict=True)]
        print(f"  {kind:14} median {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


def bare(cfg: DictConfig) -> None:
    torch.manual_seed(cfg.seed)
    data = datasets.load(cfg.data)
    model = build(cfg, data)
    if cfg.trainer.channels_last:
        model.to(memory_format=torch.channels_last)
    size, steps = cfg.trainer.batch_size, len(data.train) // cfg.trainer.batch_size
    optimizer = build_optimizer(model, cfg)
    schedule = build_schedule(optimizer, cfg, steps * cfg.trainer.epochs)
    for _ in range(cfg.trainer.epochs):
        model.train()
        order = torch.randperm(len(data.train))
        for step in range(steps):
            batch = data.train[order[step * size : (step + 1) * size]]
            loss = F.cross_entropy(model(prepare(batch.images, data, cfg)), batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        evaluate(model, data.val, data, cfg)
    evaluate(model, data.test, data, cfg)


if __name__ == "__main__":
    main()
