"""A convolutional classifier of small images."""

from __future__ import annotations

from torch import Tensor, nn

from lightkit.nn import FusedSequential, run_fused

_BLOCKS = ("fused", "torch")


class CNN(nn.Module):
    """A classifier: Conv 32 - pool - Conv 64 - pool - Conv 64 - Dense 64 - Dense ``num_classes``.

    The convolutions are 3x3 without padding, the pools are 2x2 maxima, and a ReLU follows every layer except the last.
    With 28x28 images of one channel and ten classes the model has 93,322 parameters. The model returns logits; the
    softmax is part of the loss.

    Args:
        in_channels: the number of channels of an image.
        num_classes: the number of logits, C.
        image_size: the height and width of an image in pixels, at least 18.
        blocks: ``"fused"`` runs the layers as one operation where that is faster, `lightkit.ops.layer_chain`;
            ``"torch"`` runs the layers one by one. Parameters and state dict are the same, results the same except for
            rounding: see `lightkit.nn.FusedSequential`.

    Shape:
        ``(N, in_channels, image_size, image_size)`` -> ``(N, num_classes)``, floating point.

    Raises:
        ValueError: an argument is too small, ``blocks`` is unknown, or the input has another shape.
    """

    def __init__(
        self, in_channels: int = 1, num_classes: int = 10, image_size: int = 28, blocks: str = "fused"
    ) -> None:
        super().__init__()
        if blocks not in _BLOCKS:
            raise ValueError(f"blocks must be one of {', '.join(map(repr, _BLOCKS))}, got {blocks!r}")
        if in_channels < 1 or num_classes < 1:
            raise ValueError(f"in_channels and num_classes must be positive, got {in_channels} and {num_classes}")
        if image_size < 18:
            raise ValueError(f"image_size must be at least 18 for three convolutions and two pools, got {image_size}")
        side = ((image_size - 2) // 2 - 2) // 2 - 2
        self.image_shape = (in_channels, image_size, image_size)
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
            nn.Linear(64 * side * side, 64),
            nn.ReLU(),
            nn.Linear(64, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits ``(N, num_classes)`` of images ``(N, in_channels, image_size, image_size)``."""
        if images.dim() != 4 or images.shape[1:] != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise ValueError(f"CNN takes images of shape (N, {expected}), got {tuple(images.shape)}")
        if self._fused:
            return run_fused((self.features, self.classifier), images)
        return self.classifier(self.features(images))
