"""Models as plain ``nn.Module`` classes, without Lightning."""

from lightkit.models.cnn import CNN
from lightkit.models.decoding import Decoder, decoder
from lightkit.models.ensemble import Ensemble
from lightkit.models.language_model import LanguageModel
from lightkit.models.mlp import MLP
from lightkit.models.rnn import RNN
from lightkit.models.rnn_language_model import RNNLanguageModel
from lightkit.models.transformer import Transformer

__all__ = ["CNN", "MLP", "RNN", "Decoder", "Ensemble", "LanguageModel", "RNNLanguageModel", "Transformer", "decoder"]
