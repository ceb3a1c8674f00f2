"""Models as files that other programs run: written, read and run, without Lightning and Hydra.

`export_model` writes any ``nn.Module``, and `open_export` runs the file. ``lightkit.load(path).export(file)`` and
``python -m lightkit.export`` export a checkpoint with its classes, its preprocessing and the configuration of its data,
and compare the file with the model first: see `lightkit.app.exporting`.
"""

from lightkit.export.exported_model import ExportedLanguageModel, ExportedModel
from lightkit.export.formats import FORMATS, export_model, format_of, open_export
from lightkit.export.runtime import InputSpec, Runtime

__all__ = [
    "FORMATS",
    "ExportedLanguageModel",
    "ExportedModel",
    "InputSpec",
    "Runtime",
    "export_model",
    "format_of",
    "open_export",
]
