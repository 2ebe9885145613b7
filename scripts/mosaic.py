"""Draws the mosaic of a layer at its random start: python scripts/mosaic.py mosaic=G50%_P50% file=mosaic.png"""

from pathlib import Path

import torch
from omegaconf import DictConfig

from acl import AnalyticConv2d
from acl.plot import mosaic, to_png
from training.config import entry
from training.errors import UsageError
from training.files import write_atomic


def main(cfg: DictConfig) -> None:
    torch.manual_seed(cfg.seed)
    try:
        layer = AnalyticConv2d(cfg.in_channels, cfg.out_channels, cfg.kernel_size, bias=False, arrangement=cfg.mosaic)
    except ValueError as error:
        raise UsageError(str(error)) from error
    write_atomic(Path(cfg.file), to_png(mosaic(layer)))
    print(cfg.file)


if __name__ == "__main__":
    entry(main, "mosaic")
