"""Fine-tuning: a training that starts from the weights of another one, with some layers frozen at first."""

from lightkit.finetune.freeze import Freeze
from lightkit.finetune.initial_weights import InitialWeights, load_initial_weights

__all__ = ["Freeze", "InitialWeights", "load_initial_weights"]
