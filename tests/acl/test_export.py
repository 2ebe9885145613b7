"""An analytic network leaves torch as any other does."""

import onnxruntime
import pytest
import torch
from torch import nn

import acl


@pytest.mark.parametrize("folded", [False, True])
def test_torch_export_and_onnx_runtime(folded: bool) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 5, stride=2, padding_mode="reflect", padding=2)
    model = nn.Sequential(conv, nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.LazyLinear(5)).eval()
    x = torch.randn(4, 3, 16, 16)
    model(x)
    acl.convert(model, "all", "G25% Lg15% Lt15% Tf15% Ts15% P15%", amplitude=True, family="extended")
    if folded:
        acl.fold(model)
    wanted = model(x).detach()
    shapes = ({0: torch.export.Dim("n")},)
    program = torch.export.export(model, (x,), dynamic_shapes=shapes)
    torch.testing.assert_close(program.module()(x[:3]), wanted[:3])
    exported = torch.onnx.export(program, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(exported.model_proto.SerializeToString())
    (logits,) = session.run(None, {session.get_inputs()[0].name: x[:3].numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), wanted[:3], rtol=0, atol=1e-4)
