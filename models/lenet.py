"""LeNet-5."""

from torch import Tensor, nn

from models.convolutions import Convolution, create_convolution, scale_channels


class LeNet(nn.Module):
    """LeNet-5: two 5 x 5 convolutions (6 and 16 channels) and three linear layers.

    Source: LeCun et al., 1998, in its common modern form (ReLU, max-pooling, and padding 2 for 28 x 28 images).

    Args:
        channels, classes: the numbers of image channels and classes.
        convolution: replaces the convolutions by ones with fewer parameters (see ``models.convolutions``).
        width: multiplies the numbers of channels of the convolutions; 1 if None.

    Raises:
        ValueError: for a width that leaves no channel, or above 100.

    Shape:
        Input (N, channels, 28, 28), output (N, classes).
    """

    def __init__(
        self,
        channels: int = 1,
        classes: int = 10,
        convolution: Convolution | None = None,
        width: float | None = None,
    ) -> None:
        super().__init__()
        first, second = scale_channels((6, 16), width)
        self.conv1 = create_convolution(convolution, channels, first, 5, padding=2, bias=True)
        self.conv2 = create_convolution(convolution, first, second, 5, padding=0, bias=True)
        self.fc1 = nn.Linear(second * 5 * 5, 120)
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
