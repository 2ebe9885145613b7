"""Accuracy and loss over a split."""

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F

from training.data import Data
from training.distributed import all_reduce
from training.splits import Split


@torch.no_grad()
def predict(
    model: nn.Module, data: Data, split: Split, fabric: Fabric | None = None
) -> tuple[dict[str, float], Tensor]:
    """Predicts the classes of a split, divided among the processes. The model is left in eval mode.

    Returns:
        ``top1`` (percent) and ``loss`` (mean cross-entropy in nats); and the predicted labels (n,), in the order of the
        split, on the CPU.
    """
    model.eval()
    rank, world_size = (0, 1) if fabric is None else (fabric.global_rank, fabric.world_size)
    own_predictions = [torch.zeros(0, dtype=torch.long)]
    correct, loss = 0, 0.0  # summed in double precision on the CPU, since Apple's GPUs have none
    for batch in data.eval_batches(split[rank::world_size]):
        logits = model(batch.images)
        predicted = logits.argmax(1)
        own_predictions.append(predicted.cpu())
        correct += int((predicted == batch.labels).sum())
        loss += float(F.cross_entropy(logits, batch.labels, reduction="sum"))
    predictions = torch.zeros(len(split), dtype=torch.long)
    predictions[rank::world_size] = torch.cat(own_predictions)
    if fabric is not None and world_size > 1:
        correct, loss = all_reduce(fabric, torch.tensor([correct, loss], dtype=torch.double), "sum").tolist()
        predictions = all_reduce(fabric, predictions, "sum").cpu()
    return {"top1": 100 * int(correct) / len(split), "loss": loss / len(split)}, predictions
