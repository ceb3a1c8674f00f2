"""A convolutional classifier of small images."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lightkit.models.arguments import keeps_arguments
from lightkit.nn import FusedSequential, run_fused

_BLOCKS = ("fused", "torch")

# The smallest height and width of an image of which the layers leave a feature.
_MIN_SIDE = 18


@keeps_arguments
class CNN(nn.Module):
    """A classifier: Conv 32 - pool - Conv 64 - pool - Conv 64 - Dense 64 - Dense ``num_classes``.

    The convolutions are 3x3 without padding, the pools are 2x2 maxima, and a ReLU follows every layer except the last.
    With 28x28 images of one channel and ten classes the model has 93,322 parameters. The model returns logits; the
    softmax is part of the loss.

    Args:
        in_channels: the number of channels of an image.
        num_classes: the number of logits, C.
        image_size: the height and width of an image in pixels, each at least 18; one number stands for both.
        blocks: ``"fused"`` runs the layers as one operation where that is faster, `lightkit.ops.layer_chain`;
            ``"torch"`` runs the layers one by one. Parameters and state dict are the same, results the same except for
            rounding: see `lightkit.nn.FusedSequential`.

    Shape:
        ``(N, in_channels, H, W)`` of this ``image_size`` -> ``(N, num_classes)``, floating point.

    Raises:
        ValueError: an argument is too small, ``blocks`` is unknown, or the input has another shape.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        image_size: int | Sequence[int] = 28,
        blocks: str = "fused",
    ) -> None:
        super().__init__()
        if blocks not in _BLOCKS:
            raise ValueError(f"blocks must be one of {', '.join(map(repr, _BLOCKS))}, got {blocks!r}")
        if in_channels < 1 or num_classes < 1:
            raise ValueError(f"in_channels and num_classes must be positive, got {in_channels} and {num_classes}")
        height, width = _height_and_width(image_size)
        if min(height, width) < _MIN_SIDE:
            raise ValueError(
                f"image_size must be at least {_MIN_SIDE} for three convolutions and two pools, got {image_size}"
            )
        self.image_shape = (in_channels, height, width)
        self._fused = blocks == "fused"
        sequential = FusedSequential if self._fused else nn.Sequential
        self.features = sequential(
            nn.Conv2d(in_channels, 32, kernel_size=3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, kernel_size=3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 64, kernel_size=3),
            nn.ReLU(),
        )
        self.classifier = sequential(
            nn.Flatten(),
            nn.Linear(64 * _side_of_features(height) * _side_of_features(width), 64),
            nn.ReLU(),
            nn.Linear(64, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits ``(N, num_classes)`` of images ``(N, in_channels, H, W)``."""
        if images.dim() != 4 or images.shape[1:] != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise ValueError(f"CNN takes images of shape (N, {expected}), got {tuple(images.shape)}")
        if self._fused:
            return run_fused((self.features, self.classifier), images)
        return self.classifier(self.features(images))


def _height_and_width(size: int | Sequence[int]) -> tuple[int, int]:
    sides = [size, size] if isinstance(size, int) else list(size) if isinstance(size, (list, tuple)) else []
    if len(sides) != 2 or any(type(side) is not int for side in sides):
        raise ValueError(f"image_size must be int, or height and width as two int, got {size!r}")
    return sides[0], sides[1]


def _side_of_features(side: int) -> int:
    """Returns the height or width of the features of an image with this height or width."""
    return ((side - 2) // 2 - 2) // 2 - 2
