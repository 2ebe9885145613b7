"""The four-layer CNN for small color images."""

from torch import Tensor, nn

from models.convolutions import Convolution, create_convolution, scale_channels


class FourLayer(nn.Module):
    """Four convolutions (32, 64, 128 and 128 channels, batch norm, ReLU), global average pooling and a linear layer.

    Max-pooling halves the image size after each of the first three convolutions. Figure 5b of the paper only says
    "four-layer"; the widths, the normalization and the pooling are ours.

    Args:
        channels, classes: the numbers of image channels and classes.
        kernel_size: the kernel size of all four convolutions: an odd number between 1 and 99.
        convolution: replaces the convolutions by ones with fewer parameters (see ``models.convolutions``).
        width: multiplies the numbers of channels; 1 if None.

    Raises:
        ValueError: for any other kernel size, or a width that leaves no channel or is above 100.

    Shape:
        Input (N, channels, H, W) with H, W >= 8, output (N, classes).
    """

    def __init__(
        self,
        channels: int = 3,
        classes: int = 10,
        kernel_size: int = 5,
        convolution: Convolution | None = None,
        width: float | None = None,
    ) -> None:
        super().__init__()
        if kernel_size not in range(1, 100, 2):
            raise ValueError(
                f"model.kernel_size={kernel_size} must be odd, to preserve the image size, and between 1 and 99"
            )

        widths = scale_channels((32, 64, 128, 128), width)

        def make_conv(in_channels: int, out_channels: int) -> nn.Module:
            return create_convolution(
                convolution, in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False
            )

        self.conv1, self.norm1 = make_conv(channels, widths[0]), nn.BatchNorm2d(widths[0])
        self.conv2, self.norm2 = make_conv(widths[0], widths[1]), nn.BatchNorm2d(widths[1])
        self.conv3, self.norm3 = make_conv(widths[1], widths[2]), nn.BatchNorm2d(widths[2])
        self.conv4, self.norm4 = make_conv(widths[2], widths[3]), nn.BatchNorm2d(widths[3])
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(widths[3], classes)

    def forward(self, x: Tensor) -> Tensor:
        # ReLU and max-pooling commute; in this order ReLU processes a quarter of the values.
        x = self.relu(self.pool(self.norm1(self.conv1(x))))
        x = self.relu(self.pool(self.norm2(self.conv2(x))))
        x = self.relu(self.pool(self.norm3(self.conv3(x))))
        x = self.relu(self.norm4(self.conv4(x)))
        return self.fc(x.mean((-2, -1)))
