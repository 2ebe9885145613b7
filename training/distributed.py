"""The processes and devices of a run."""

import logging
import os
import warnings

import torch
from lightning_fabric import Fabric
from lightning_fabric.utilities.rank_zero import rank_zero_only
from torch import nn

from training.errors import UsageError
from training.settings import TrainerSettings

warnings.filterwarnings("ignore", message="The `srun` command is available")  # a single process needs no srun
logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it would log the precision of every run


CUDA_STATE_BYTES = 16
"""The size of the state of a random number generator on a CUDA device; that of a CPU is larger."""


def build_fabric(settings: TrainerSettings) -> Fabric:
    """Builds Fabric for the devices of a run.

    Raises:
        UsageError: for options that Fabric rejects, more devices than the machine has, or several nodes without a
            launcher.
    """
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        fabric = Fabric(
            accelerator=settings.accelerator,
            strategy=settings.strategy,
            devices=settings.devices,
            num_nodes=settings.nodes,
            precision=settings.precision,
        )
    except Exception as error:  # of any type, such as an ImportError for a precision that needs another package
        raise UsageError(f"trainer: {' '.join(str(error).split())}") from error
    if settings.nodes > 1 and "LOCAL_RANK" not in os.environ and "SLURM_JOB_ID" not in os.environ:
        raise UsageError(f"trainer.nodes={settings.nodes} needs srun or torchrun, which start a process on every node")
    if fabric.device.type == "cpu" and settings.devices > (os.cpu_count() or 1):
        raise UsageError(f"trainer.devices={settings.devices} exceeds the {os.cpu_count()} cores of this machine")
    return fabric


def synchronize_batch_norm(model: nn.Module, fabric: Fabric) -> nn.Module:
    """Lets batch normalization use the statistics of the whole batch instead of a process's share of it.

    Raises:
        UsageError: for a network with batch normalization on several processes that do not use CUDA.
    """
    batch_norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    if fabric.world_size == 1 or not any(isinstance(module, batch_norms) for module in model.modules()):
        return model
    if fabric.device.type != "cuda":
        raise UsageError(
            f"trainer.devices: batch normalization over {fabric.world_size} processes needs GPUs; use one device"
        )
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def is_main_process() -> bool:
    """Whether this process writes files; also valid before Fabric launches the others."""
    return getattr(rank_zero_only, "rank", 0) == 0


def all_reduce(fabric: Fabric, tensor: torch.Tensor, operation: str) -> torch.Tensor:
    """The "sum", "mean" or "max" of a tensor over the processes of a run."""
    reduced = fabric.all_reduce(fabric.to_device(tensor).clone(), reduce_op=operation)  # all_reduce works in place
    assert isinstance(reduced, torch.Tensor)
    return reduced


def gather_random_states(fabric: Fabric) -> torch.Tensor:
    """Gathers the random number generator states of all processes (for dropout, for example): (processes, n)."""
    state = torch.cuda.get_rng_state(fabric.device) if fabric.device.type == "cuda" else torch.get_rng_state()
    gathered = fabric.all_gather(state)
    assert isinstance(gathered, torch.Tensor)
    return gathered.reshape(fabric.world_size, -1).cpu()


def set_random_state(fabric: Fabric, states: torch.Tensor) -> None:
    """Restores this process's random number generator from ``gather_random_states``.

    Raises:
        UsageError: if the states are those of another kind of device.
    """
    state = states[fabric.global_rank % len(states)].clone()  # a run may be resumed with more processes
    if (len(state) == CUDA_STATE_BYTES) != (fabric.device.type == "cuda"):
        started_on = "a GPU" if len(state) == CUDA_STATE_BYTES else "a CPU"
        raise UsageError(f"the checkpoint was written on {started_on}; resume the run on {started_on}")
    if fabric.device.type == "cuda":
        torch.cuda.set_rng_state(state, fabric.device)
    else:
        torch.set_rng_state(state)
