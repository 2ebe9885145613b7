"""Accuracy and loss over a split."""

import torch
from lightning_fabric import Fabric
from torch import nn
from torch.nn import functional as F

from training.data import Data
from training.datasets import Split
from training.distributed import all_reduce


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, split: Split, fabric: Fabric | None = None) -> dict[str, float]:
    """Computes top-1 accuracy (percent) and mean cross-entropy (nats) over a split, divided among the processes.

    The model is left in eval mode.
    """
    model.eval()
    share = split if fabric is None else split[fabric.global_rank :: fabric.world_size]
    sums = torch.zeros(2, dtype=torch.double, device=data.mean.device)
    for batch in data.eval_batches(share):
        logits = model(batch.images)
        sums[0] += (logits.argmax(1) == batch.labels).sum()
        sums[1] += F.cross_entropy(logits, batch.labels, reduction="sum")
    if fabric is not None:
        sums = all_reduce(fabric, sums, "sum")
    return {"top1": 100 * int(sums[0]) / len(split), "loss": float(sums[1]) / len(split)}
