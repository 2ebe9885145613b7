"""Converts a timm network, fits its first layer, trains for three steps, saves and folds it.

    python examples/convert_timm.py

pretrained=True downloads timm's weights; without a network, "--random" runs the same on random weights.
"""

import sys
import tempfile
from pathlib import Path

import timm
import torch
from torch.nn import functional as F

import acl

torch.manual_seed(0)
try:
    net = timm.create_model("resnet10t", pretrained="--random" not in sys.argv, num_classes=10)
except OSError:
    sys.exit("cannot download the weights of resnet10t; --random needs no network")
acl.convert(net, "first", "G100%", init="fit", amplitude=True)  # all kernels of the first layer become formulas
acl.convert(net, {"layer1.*.conv2": "G50% P50%"})  # half of the kernels of these layers: Gabor, at random
print(acl.summary(net, torch.randn(1, 3, 224, 224)))

optimizer = torch.optim.AdamW(acl.param_groups(net, lr=1e-3, akp_lr_scale=5.0, weight_decay=0.01))
images, labels = torch.randn(8, 3, 64, 64), torch.randint(10, (8,))
for _ in range(3):
    loss = F.cross_entropy(net(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"loss {loss.item():.3f}")

with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "net.safetensors"
    acl.save(net, file, info={"source": "examples/convert_timm.py"})
    restored = acl.load(timm.create_model("resnet10t", num_classes=10), file)
net.eval(), restored.eval()
with torch.no_grad():
    assert torch.equal(net(images), restored(images))
    folded = acl.fold(restored)  # plain convolutions again, for deployment
    print(f"largest change by folding: {(folded(images) - net(images)).abs().max():.1e}")
