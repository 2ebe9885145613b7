"""The four-layer CNN for small color images."""

from torch import Tensor, nn


class FourLayer(nn.Module):
    """Four convolutions (32, 64, 128 and 128 channels, batch norm, ReLU), global average pooling and a linear layer.

    Max-pooling halves the image size after each of the first three convolutions. Figure 5b of the paper only says
    "four-layer"; the widths, the normalization and the pooling are ours.

    Args:
        channels, classes: the numbers of image channels and classes.
        kernel_size: the kernel size of all four convolutions: an odd number between 1 and 99.

    Raises:
        ValueError: for any other kernel size.

    Shape:
        Input (N, channels, H, W) with H, W >= 8, output (N, classes).
    """

    def __init__(self, channels: int = 3, classes: int = 10, kernel_size: int = 5) -> None:
        super().__init__()
        if kernel_size not in range(1, 100, 2):
            raise ValueError(
                f"model.kernel_size={kernel_size} must be odd, to preserve the image size, and between 1 and 99"
            )

        def make_conv(in_channels: int, out_channels: int) -> nn.Conv2d:
            return nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)

        self.conv1, self.norm1 = make_conv(channels, 32), nn.BatchNorm2d(32)
        self.conv2, self.norm2 = make_conv(32, 64), nn.BatchNorm2d(64)
        self.conv3, self.norm3 = make_conv(64, 128), nn.BatchNorm2d(128)
        self.conv4, self.norm4 = make_conv(128, 128), nn.BatchNorm2d(128)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        # ReLU and max-pooling commute; in this order ReLU processes a quarter of the values.
        x = self.relu(self.pool(self.norm1(self.conv1(x))))
        x = self.relu(self.pool(self.norm2(self.conv2(x))))
        x = self.relu(self.pool(self.norm3(self.conv3(x))))
        x = self.relu(self.norm4(self.conv4(x)))
        return self.fc(x.mean((-2, -1)))
