"""Analytic networks export with torch.export and run in ONNX Runtime."""

import onnxruntime
import pytest
import torch
from torch import nn

import acl
from tests.arrangements import arrange_all_kinds


@pytest.mark.parametrize("folded", [False, True])
def test_exported_network_matches_eager_output(folded: bool) -> None:
    conv = nn.Conv2d(3, 32, 5, stride=2, padding_mode="reflect", padding=2)
    convs = [conv, nn.ReLU(), nn.Conv2d(32, 8, 3), nn.Conv2d(8, 8, 3, groups=2)]
    model = nn.Sequential(*convs, nn.Flatten(), nn.LazyLinear(5)).eval()
    x = torch.randn(4, 3, 16, 16)
    model(x)
    acl.convert(model, ["0", "3"], arrange_all_kinds(), amplitude=True, family="extended")
    acl.convert(model, "2", "G50% Ts50%", per="filter")  # computed as two convolutions
    if folded:
        acl.fold(model, factored=True)
    expected = model(x).detach()
    shapes = ({0: torch.export.Dim("n")},)
    program = torch.export.export(model, (x,), dynamic_shapes=shapes)
    torch.testing.assert_close(program.module()(x[:3]), expected[:3])
    exported = torch.onnx.export(program, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(exported.model_proto.SerializeToString())
    (logits,) = session.run(None, {session.get_inputs()[0].name: x[:3].numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), expected[:3], rtol=0, atol=1e-4)
