"""Plain nn.Modules, free of Lightning."""

from lightkit.models.cnn import CNN
from lightkit.models.rnn import RNN

__all__ = ["CNN", "RNN"]
