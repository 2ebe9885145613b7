"""The resumable state of a run, and its file of weights."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn

import acl
from training.data import Data
from training.distributed import all_reduce, gather_random_states, set_random_state
from training.errors import UsageError
from training.provenance import find_changed_inputs
from training.run_directory import RunDirectory


@dataclass
class TrainState:
    """The progress of a run, apart from the states of its model, optimizer, schedule and precision.

    A checkpoint holds every field by name. A new field needs a default, so that old checkpoints still load.
    """

    losses: torch.Tensor  # (steps,) of the current epoch; the mean over processes is the loss of each batch
    hits: torch.Tensor  # () training images that this process has classified correctly in the current epoch
    epoch: int = 0  # completed epochs
    step: int = 0  # completed steps of the current epoch
    history: list[dict[str, float]] = field(default_factory=list)  # metrics of each epoch
    best: dict[str, float] = field(default_factory=dict)  # metrics of the epoch with the best validation score
    akps: list[dict[str, torch.Tensor]] = field(default_factory=list)  # snapshots before training and after each epoch
    best_files: dict[str, str] = field(default_factory=dict)  # file name -> SHA-256, of the files of that epoch
    seconds: float = 0.0  # spent on the run
    generator: torch.Tensor | None = None  # state of the generator that shuffles and augments the training images
    inputs: dict[str, Any] = field(default_factory=dict)  # what the run is trained on, as in its record
    sources: str | None = None  # the digest of the code; None if other code has resumed the run
    lr: float = 0.0  # of the first group, in the last step
    best_correct: str = ""  # which validation images were classified correctly in that epoch, as in the record


class Checkpointer:
    """Saves and restores a run.

    Args:
        fabric: the processes of the run; only the main process writes.
        directory: the folder of the run.
        minutes: the interval between checkpoints within an epoch.
        parts: model, optimizer, schedule and precision, which holds the loss scale of ``16-mixed``, by name.
    """

    def __init__(self, fabric: Fabric, directory: RunDirectory, minutes: float, **parts: Any) -> None:
        self.fabric, self.directory, self.minutes, self.parts = fabric, directory, minutes, parts
        self.generator = torch.Generator()  # shuffles and augments the training images
        self._started = self._last_saved = time.monotonic()

    def restore(self, state: TrainState) -> bool:
        """Restores ``state`` and the parts from the last checkpoint; returns False if there is none.

        Raises:
            UsageError: if the checkpoint was made on other data or pretrained weights than ``state.inputs``.
        """
        checkpoint = self.directory.load_checkpoint()
        if checkpoint is None:
            return False
        if changes := find_changed_inputs(checkpoint.get("inputs", {}), state.inputs):
            raise UsageError(
                f"the unfinished run in {self.directory.path} has used other {' and other '.join(changes)}; restore "
                "them to resume it, or delete this folder to train again"
            )
        for name in (f.name for f in fields(state) if f.name in checkpoint):
            value = checkpoint[name]
            setattr(state, name, self.fabric.to_device(value) if name in ("losses", "hits") else value)
        for name, part in self.parts.items():
            if name != "precision" or name in checkpoint:  # checkpoints of earlier versions lack it
                part.load_state_dict(checkpoint[name])
        set_random_state(self.fabric, checkpoint["random"])
        if not self.fabric.is_global_zero:
            state.hits.zero_()  # only the main process resumes with the sum over all processes
        self._last_saved = time.monotonic()
        self._started = self._last_saved - state.seconds
        return True

    def save(self, state: TrainState) -> None:
        state.seconds = self.elapsed
        state.generator = self.generator.get_state()
        checkpoint = vars(state) | {name: part.state_dict() for name, part in self.parts.items()}
        checkpoint["config"] = dict(self.directory.identity)
        checkpoint["random"] = gather_random_states(self.fabric)
        checkpoint["losses"] = all_reduce(self.fabric, state.losses, "mean")
        checkpoint["hits"] = all_reduce(self.fabric, state.hits, "sum")
        if self.fabric.is_global_zero:
            self.directory.save_checkpoint(checkpoint)
        self._last_saved = time.monotonic()

    def save_if_due(self, state: TrainState) -> None:
        """Saves if more than ``minutes`` have passed since the last checkpoint, by the clock of any process."""
        due = torch.tensor(float(time.monotonic() - self._last_saved > 60 * self.minutes))
        if float(all_reduce(self.fabric, due, "max")):
            self.save(state)

    @property
    def elapsed(self) -> float:
        """Seconds spent on the run, including the time before an interruption."""
        return time.monotonic() - self._started


def serialize_weights(model: nn.Module, run_identity: Mapping[str, Any], data: Data) -> bytes:
    """Serializes a network with everything that is needed to build it again."""
    info = {"config": dict(run_identity), "input_format": asdict(data.input_format), "classes": data.classes}
    return acl.serialize(model, info)
