"""Fast, complete model training for people who use PyTorch Lightning."""

__version__ = "0.1.0"
