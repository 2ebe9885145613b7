"""Exact Shapley values of the six kinds against 64 plain evaluations of the same network, in turn, as a ratio.

    python benchmarks/attribution.py data.root=/data

AnaNN-LeNet with the half-plain arrangement on MNIST's validation images; what it has learned makes no difference.
"""

import statistics
import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from acl.explain import attribute
from training import data as datasets
from training.config import compose
from training.loop import build, evaluate, prepare

ROUNDS = 5


def main() -> None:
    cfg = compose(["data=mnist", "arrangement=half_plain", *sys.argv[1:]])
    data = datasets.load(cfg.data)
    model = build(cfg, data)

    def feed() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in datasets.batches(data.val, 500):
            yield prepare(batch.images, data, cfg), batch.labels

    ratios = []
    for _ in tqdm(range(ROUNDS), desc="rounds", disable=None):
        started = time.perf_counter()
        subsets = len(attribute(model, feed, progress=False).correct)
        explained = time.perf_counter() - started
        started = time.perf_counter()
        for _ in range(subsets):
            evaluate(model, data.val, data, cfg)
        ratios.append(explained / (time.perf_counter() - started))
    print(f"{ROUNDS} rounds, {torch.get_num_threads()} threads, {len(data.val)} images, {subsets} subsets")
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    print(f"  attribution / {subsets} evaluations: {spread}")


if __name__ == "__main__":
    main()
