"""Configurations of short runs."""

from pathlib import Path

from omegaconf import DictConfig

from training.config import compose


def compose_run(runs: Path, *overrides: str) -> DictConfig:
    """A run of two epochs on the CPU, of LeNet with the arrangement ``mosaic``, that writes to the folder ``runs``."""
    return compose(
        ["arrangement=mosaic", "trainer.epochs=2", "trainer.accelerator=cpu", f"paths.runs={runs}", *overrides]
    )
