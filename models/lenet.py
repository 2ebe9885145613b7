"""LeNet-5."""

from torch import Tensor, nn


class LeNet(nn.Module):
    """LeNet-5: two 5 x 5 convolutions (6 and 16 channels) and three linear layers.

    Source: LeCun et al., 1998, in its common modern form (ReLU, max-pooling, and padding 2 for 28 x 28 images).

    Shape:
        Input (N, channels, 28, 28), output (N, classes).
    """

    def __init__(self, channels: int = 1, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, classes)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        # ReLU and max-pooling commute; in this order ReLU processes a quarter of the values.
        x = self.relu(self.pool(self.conv1(x)))
        x = self.relu(self.pool(self.conv2(x)))
        x = self.relu(self.fc1(x.flatten(1)))
        return self.fc3(self.relu(self.fc2(x)))
