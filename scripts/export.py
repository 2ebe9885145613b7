"""Exports a finished run's network to ONNX: python scripts/export.py run=runs/<id> data.root=/data"""

import numpy as np
import onnxruntime
import torch

import acl
from evaluation.finished_run import DataLocation, load_finished_run
from training.cli import run_script
from training.config import format_error
from training.errors import UsageError
from training.files import write_atomic
from training.validation import FilePath, OutputFile, strict_dataclass


@strict_dataclass
class ExportSettings:
    run: FilePath
    file: OutputFile
    fold: bool
    data: DataLocation


def main(settings: ExportSettings) -> None:
    run = load_finished_run(settings.run, settings.data)
    if settings.fold:
        acl.fold(run.model)
    expected = run.input_format
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, expected.channels, expected.height, expected.width, generator=generator)
    try:
        with torch.no_grad():
            logits = run.model(images).numpy()
    except Exception as error:
        size = " x ".join(map(str, images.shape[1:]))
        raise UsageError(f"{run.path}: its network does not accept images of {size}: {format_error(error)}") from error
    exported = torch.onnx.export(
        run.model.float(), (images,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("n")},), verbose=False
    )
    assert exported is not None
    content = exported.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content)
    difference = float(np.abs(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0] - logits).max())
    if not difference <= 1e-4:  # nan, too
        raise UsageError(f"ONNX Runtime's logits differ from torch's by {difference:.2g}; nothing was written")
    write_atomic(settings.file, content)
    print(
        f"{settings.file}: expects images (n, {', '.join(map(str, images.shape[1:]))}) of 0 to 255, normalized with "
        f"mean {expected.mean} and standard deviation {expected.std}; "
        f"ONNX Runtime's logits differ from torch's by up to {difference:.1g}"
    )


if __name__ == "__main__":
    run_script(main, "export", ExportSettings)
