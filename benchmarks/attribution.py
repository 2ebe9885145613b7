"""Time of exact Shapley values of all kinds, relative to one plain evaluation per subset of kinds.

    python benchmarks/attribution.py data.root=/data

The two alternate. The network is AnaNN-LeNet with the half-plain arrangement, on MNIST's validation images; its weights
do not affect the time.
"""

import statistics
import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from acl.explain import attribute
from training.config import compose
from training.evaluate import evaluate
from training.settings import build_model, load_run_data, parse_run

ROUNDS = 5


def main() -> None:
    settings = parse_run(compose(["data=mnist", "arrangement=half_plain", *sys.argv[1:]]))
    data = load_run_data(settings)
    model = build_model(settings, data)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in data.eval_batches(data.val, max_size=500):
            yield batch.images, batch.labels

    ratios = []
    for _ in tqdm(range(ROUNDS), desc="rounds", disable=None):
        started = time.perf_counter()
        subsets = len(attribute(model, batches, progress=False).correct)
        attribution_seconds = time.perf_counter() - started
        started = time.perf_counter()
        for _ in range(subsets):
            evaluate(model, data, data.val)
        ratios.append(attribution_seconds / (time.perf_counter() - started))
    print(f"{ROUNDS} rounds, {torch.get_num_threads()} threads, {len(data.val)} images, {subsets} subsets")
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    print(f"  attribution / {subsets} evaluations: {spread}")


if __name__ == "__main__":
    main()
