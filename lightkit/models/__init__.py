"""Plain nn.Modules, free of Lightning."""

from lightkit.models.cnn import CNN

__all__ = ["CNN"]
