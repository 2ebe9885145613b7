"""A network of analytic layers, trained by a plain torch loop on scikit-learn's digits: python examples/minimal.py"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import acl

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16  # (1797, 1, 8, 8)
labels = torch.tensor(digits.target)
order = torch.randperm(len(images))
train, test = order[:1400], order[1400:]

net = nn.Sequential(
    acl.AnalyticConv2d(1, 16, 5, padding=2, arrangement="G8 Lg2 Lt2 Tf2 P2"),  # counts of 2-D kernels
    nn.ReLU(),
    nn.MaxPool2d(2),
    acl.AnalyticConv2d(16, 32, 3, padding=1, arrangement="G100%", per="filter"),  # a shape per output channel
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(32 * 4 * 4, 10),
)
print(acl.summary(net, images[:1]))
optimizer = torch.optim.AdamW(acl.param_groups(net, lr=3e-3, akp_lr_scale=5.0, weight_decay=0.01))
for _ in range(15):
    for batch in train[torch.randperm(len(train))].split(50):
        loss = F.cross_entropy(net(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

net.eval()
with torch.no_grad():
    accuracy = (net(images[test]).argmax(1) == labels[test]).float().mean()
print(f"test accuracy {accuracy:.1%}")
print("the first kernel:", net[0].formula(0))
