"""Draws the mosaic of a layer with random AKPs: python scripts/mosaic.py mosaic=G50%_P50% file=mosaic.png"""

from typing import Annotated

import torch
from pydantic import Field

from acl import AnalyticConv2d
from acl.plot import mosaic, to_png
from training.cli import run_script
from training.errors import UsageError
from training.files import write_atomic
from training.validation import OutputFile, Seed, strict_dataclass

MAX_WEIGHTS = 10**7
Size = Annotated[int, Field(ge=1, le=2**12)]


@strict_dataclass
class MosaicSettings:
    in_channels: Size
    out_channels: Size
    kernel_size: Size
    mosaic: str
    seed: Seed
    file: OutputFile


def main(settings: MosaicSettings) -> None:
    if (num_weights := settings.in_channels * settings.out_channels * settings.kernel_size**2) > MAX_WEIGHTS:
        raise UsageError(f"a layer of {num_weights:,} weights is too large for a figure; at most {MAX_WEIGHTS:,}")
    torch.manual_seed(settings.seed)
    try:
        layer = AnalyticConv2d(
            settings.in_channels, settings.out_channels, settings.kernel_size, bias=False, arrangement=settings.mosaic
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    write_atomic(settings.file, to_png(mosaic(layer)))
    print(settings.file)


if __name__ == "__main__":
    run_script(main, "mosaic", MosaicSettings)
