"""The resumable state of a run."""

import time
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from lightning_fabric import Fabric

from training.distributed import all_reduce, gather_random_states, set_random_state
from training.run_directory import RunDirectory


@dataclass
class TrainState:
    """The progress of a run, besides the states of model, optimizer and schedule.

    A checkpoint holds every field by name. A new field needs a default, so that old checkpoints still load.
    """

    losses: torch.Tensor  # (steps,) of the current epoch; each process holds its share of the mean
    hits: torch.Tensor  # () correctly classified training images of the current epoch; each process counts its own
    epoch: int = 0  # completed
    step: int = 0  # completed in the current epoch
    history: list[dict[str, float]] = field(default_factory=list)  # metrics of each epoch
    best: dict[str, float] = field(default_factory=dict)  # metrics of the best epoch on the validation split
    akps: list[dict[str, torch.Tensor]] = field(default_factory=list)  # before training and after each epoch
    seconds: float = 0.0  # spent on the run
    generator: torch.Tensor | None = None  # state of the random generator for order and augmentation


class Checkpointer:
    """Saves and restores a run.

    Args:
        fabric: the processes of the run; the main one writes.
        directory: of the run.
        minutes: between checkpoints within an epoch.
        parts: model, optimizer and schedule by name.
    """

    def __init__(self, fabric: Fabric, directory: RunDirectory, minutes: float, **parts: Any) -> None:
        self.fabric, self.directory, self.minutes, self.parts = fabric, directory, minutes, parts
        self.generator = torch.Generator()  # for order and augmentation
        self._started = self._last_saved = time.monotonic()

    def restore(self, state: TrainState) -> bool:
        """Restores the last checkpoint, if there is one, into ``state`` and the parts; returns whether there is."""
        saved = self.directory.load_checkpoint()
        if saved is None:
            return False
        for name in (f.name for f in fields(state) if f.name in saved):
            setattr(state, name, saved[name] if name == "generator" else self.fabric.to_device(saved[name]))
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        set_random_state(self.fabric, saved["random"])
        if not self.fabric.is_global_zero:
            state.hits.zero_()  # the checkpoint has the sum over all processes
        self._last_saved = time.monotonic()
        self._started = self._last_saved - state.seconds
        return True

    def save(self, state: TrainState) -> None:
        state.seconds = self.elapsed
        state.generator = self.generator.get_state()
        saved = vars(state) | {name: part.state_dict() for name, part in self.parts.items()}
        saved["config"] = dict(self.directory.identity)
        saved["random"] = gather_random_states(self.fabric)
        saved["losses"] = all_reduce(self.fabric, state.losses, "mean")
        saved["hits"] = all_reduce(self.fabric, state.hits, "sum")
        if self.fabric.is_global_zero:
            self.directory.save_checkpoint(saved)
        self._last_saved = time.monotonic()

    def save_if_due(self, state: TrainState) -> None:
        """Saves if the last checkpoint of any process is older than ``minutes``."""
        due = torch.tensor(float(time.monotonic() - self._last_saved > 60 * self.minutes))
        if float(all_reduce(self.fabric, due, "max")):
            self.save(state)

    @property
    def elapsed(self) -> float:
        """Seconds spent on the run, including the time before an interruption."""
        return time.monotonic() - self._started
