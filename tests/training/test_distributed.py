from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import models
from training.distributed import synchronize_batch_norm
from training.errors import UsageError


def make_processes(device: str, count: int) -> Any:
    return SimpleNamespace(world_size=count, device=torch.device(device))


def test_batch_norm_of_several_processes_is_synchronized_under_same_names() -> None:
    network = models.create_model("four_layer", 3, 10, {})
    names = list(network.state_dict())
    assert not isinstance(synchronize_batch_norm(network, make_processes("cuda", 1)).norm1, nn.SyncBatchNorm)
    synchronized = synchronize_batch_norm(network, make_processes("cuda", 2))
    assert isinstance(synchronized.norm1, nn.SyncBatchNorm) and list(synchronized.state_dict()) == names


def test_batch_norm_of_several_processes_on_cpu_is_refused() -> None:
    with pytest.raises(UsageError, match="batch normalization over 2 processes needs GPUs; use one device"):
        synchronize_batch_norm(models.create_model("four_layer", 3, 10, {}), make_processes("cpu", 2))
    lenet = models.create_model("lenet", 1, 10, {})
    assert synchronize_batch_norm(lenet, make_processes("cpu", 2)) is lenet
