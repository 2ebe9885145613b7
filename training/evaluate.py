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
    correct, loss = 0, 0.0  # summed in double precision on the CPU, since Apple's GPUs have none
    for batch in data.eval_batches(share):
        logits = model(batch.images)
        correct += int((logits.argmax(1) == batch.labels).sum())
        loss += float(F.cross_entropy(logits, batch.labels, reduction="sum"))
    if fabric is not None and fabric.world_size > 1:
        correct, loss = all_reduce(fabric, torch.tensor([correct, loss], dtype=torch.double), "sum").tolist()
    return {"top1": 100 * int(correct) / len(split), "loss": loss / len(split)}
