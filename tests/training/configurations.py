"""Configurations of short runs."""

from pathlib import Path

from omegaconf import DictConfig

from training.config import compose


def compose_run(runs: Path, *overrides: str) -> DictConfig:
    """A run of two epochs on the CPU, of LeNet with the arrangement ``mosaic``, that writes to the folder ``runs``."""
    return compose(
        ["arrangement=mosaic", "trainer.epochs=2", "trainer.accelerator=cpu", f"paths.runs={runs}", *overrides]
    )


def compose_photo_run(folder: Path, root: Path, *overrides: str) -> DictConfig:
    """A run of one epoch of a plain LeNet on the image files in ``root``, which writes to ``folder``."""
    data = ["data=imagefolder", "data.title=photos", f"data.root={root}", f"data.cache={folder}/cache"]
    short = ["data.size=28", "data.crop=null", "trainer.batch_size=6", "trainer.epochs=1"]
    return compose_run(folder / "runs", "model=lenet", "arrangement=plain", *data, *short, *overrides)
