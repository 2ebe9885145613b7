"""Writes a finished run's network as ONNX: python scripts/export.py run=runs/<id> data.root=/data"""

from pathlib import Path

import numpy as np
import onnxruntime
import torch
from omegaconf import DictConfig

import acl
from training.config import entry
from training.data import centre
from training.errors import UsageError
from training.files import write_atomic
from training.loop import finished


def main(cfg: DictConfig) -> None:
    run, data, model = finished(Path(cfg.run), **cfg.data)
    if cfg.fold:
        acl.fold(model)
    images = data.normalise(centre(data.val.images[:2], run.data))
    exported = torch.onnx.export(
        model, (images,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("n")},), verbose=False
    )
    assert exported is not None
    content = exported.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content)
    with torch.no_grad():
        logits = model(images).numpy()
    difference = float(np.abs(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0] - logits).max())
    if difference > 1e-4:
        raise UsageError(f"ONNX Runtime's logits differ from torch's by {difference:.2g}; nothing was written")
    file = Path(cfg.file)
    write_atomic(file, content)
    print(
        f"{file}: images (n, {', '.join(map(str, images.shape[1:]))}), normalised with mean "
        f"{data.mean.flatten().tolist()} and standard deviation {data.std.flatten().tolist()} of 0 to 255; "
        f"ONNX Runtime's logits are torch's to {difference:.1g}"
    )


if __name__ == "__main__":
    entry(main, "export")
