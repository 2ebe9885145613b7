"""Time of exact Shapley values of all kinds, relative to one plain evaluation per subset of kinds.

    python benchmarks/attribution.py data.root=/data

The two alternate. The network is AnaNN-LeNet with the half-plain arrangement, on MNIST's validation images; its weights
do not affect the time.
"""

import sys
from collections.abc import Iterator

import torch
from timing import print_ratios, time_alternately
from torch import Tensor

from acl.explain import attribute
from training.config import compose
from training.evaluate import predict
from training.settings import build_model, load_run_data, parse_run

ROUNDS = 5


def main() -> None:
    settings = parse_run(compose(["data=mnist", "arrangement=half_plain", *sys.argv[1:]]))
    data = load_run_data(settings)
    model = build_model(settings, data)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in data.eval_batches(data.val, max_size=500):
            yield batch.images, batch.labels

    subsets = len(attribute(model, batches, progress=False).correct)
    tasks = {
        "attribution": lambda _: attribute(model, batches, progress=False),
        "evaluations": lambda _: [predict(model, data, data.val) for _ in range(subsets)],
    }
    seconds, _ = time_alternately(tasks, ROUNDS)
    print(f"{ROUNDS} rounds, {torch.get_num_threads()} threads, {len(data.val)} images, {subsets} subsets")
    print_ratios(f"attribution / {subsets} evaluations", seconds["attribution"], seconds["evaluations"])


if __name__ == "__main__":
    main()
