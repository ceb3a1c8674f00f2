"""The formats of exports: how each is written and opened, chosen by the suffix of the file."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lightkit._util.installation import how_to_install
from lightkit._util.printable import printable
from lightkit.errors import CheckpointError, ConfigError
from lightkit.export.metadata import INPUTS
from lightkit.export.runtime import InputSpec, Runtime


@dataclass(frozen=True)
class Format:
    """A format of exports.

    Attributes:
        suffix: the suffix of the file.
        module: the module with the functions ``write(program, inputs, path, metadata)`` and ``read(path)``, which
            returns the runtime and the metadata.
        packages: the packages that writing and reading need.
        is_safe: True if a file of a stranger makes lightkit compute, and nothing else.
        companions: the suffixes of further files of the same name.
        one_by_one: True if the runtime runs one sample after the other, of a fixed length.
        weights: the dtype of weights in layers of a quantized model: ``"int8"`` or ``"uint8"``, with uint8 inputs; or
            ``"float32"``, which keeps weights and inputs of such a model in float32, rounded. ExecuTorch's kernels
            would want more roundings than it has. ONNX Runtime's products of uint8 and int8 saturate at 16 bits on
            processors without VNNI, and change labels by percents; those of uint8 and uint8 are exact everywhere.
    """

    suffix: str
    module: str
    packages: tuple[str, ...]
    is_safe: bool
    companions: tuple[str, ...] = ()
    one_by_one: bool = False
    weights: str = "float32"


FORMATS = {
    "executorch": Format(
        ".pte",
        "lightkit.export.executorch_file",
        ("executorch",),
        is_safe=False,
        companions=(".json",),
        one_by_one=True,
    ),
    "onnx": Format(
        ".onnx", "lightkit.export.onnx_file", ("onnx", "onnxscript", "onnxruntime"), is_safe=True, weights="uint8"
    ),
    "openvino": Format(
        ".xml",
        "lightkit.export.openvino_file",
        ("onnx", "onnxscript", "openvino"),
        is_safe=False,
        companions=(".bin",),
        weights="int8",
    ),
    "pt2": Format(".pt2", "lightkit.export.pt2_file", (), False),
}


def format_of(path: str | Path) -> str | None:
    """Returns the format that the suffix of a path names, a key of `FORMATS`; None for another suffix."""
    suffix = Path(path).suffix.lower()
    return next((name for name, known in FORMATS.items() if known.suffix == suffix), None)


def check_format(name: str) -> Format:
    """Returns the format of a name, whose packages are installed.

    Raises:
        ConfigError: there is no such format, or a package is missing.
    """
    if name not in FORMATS:
        raise ConfigError(f"format must be {', '.join(FORMATS)}, got {printable(name)!r}")
    found = FORMATS[name]
    # OpenVINO and ExecuTorch are no part of the extra: few need them, and they take more room than all the rest.
    missing = [package for package in found.packages if importlib.util.find_spec(package) is None]
    if missing:
        is_other = missing in (["openvino"], ["executorch"])
        remedy = f"pip install {missing[0]}" if is_other else how_to_install("export")
        raise ConfigError(f"format={name} needs {', '.join(missing)}: {remedy}")
    return found


def export_model(
    model: nn.Module,
    inputs: Sequence[InputSpec],
    path: str | Path,
    *,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes a model in evaluation mode to a file that other programs run.

    The file has the model's operations and weights, which are float32, or integers in layers of a quantized model:
    see `Format`; and ``metadata``. It has no source lines, no names of classes and no samples. A batch norm becomes
    part of the convolution or linear map before it. The function does not compare the file with the model.

    Args:
        model: the model, which stays as it is. It returns one tensor.
        inputs: the forms of its inputs.
        path: the file, whose suffix decides on the format: see `FORMATS`. A file that exists is replaced when the new
            one is complete. The format ``openvino`` has its weights in a second file, of the suffix ``.bin``.
        metadata: plain values that go into the file, with the forms of the inputs beside them; None for none.

    Raises:
        ConfigError: the suffix is another one, a package is missing, or the model cannot be recorded: see
            `lightkit.export.tracing.trace`.
        OSError: the file cannot be written.
    """
    name = format_of(path)
    if name is None:
        suffixes = ", ".join(known.suffix for known in FORMATS.values())
        raise ConfigError(f"the name of an export must end in {suffixes}, got {path}")
    chosen = check_format(name)
    # The import of torch.export takes a second, which reading an export need not wait for.
    from lightkit.export.tracing import trace

    program = trace(model, inputs, chosen.one_by_one, chosen.weights)
    content = {INPUTS: [asdict(spec) for spec in inputs], **(metadata or {})}
    importlib.import_module(chosen.module).write(program, tuple(inputs), Path(path), content)


def open_export(path: str | Path, trust: bool = False) -> tuple[Runtime, dict[str, Any]]:
    """Opens an export to run it on the CPU.

    Args:
        path: the file; it may come from an untrusted source.
        trust: True allows a format in which a file can run code when it is loaded.

    Returns:
        The runtime; and the metadata, plain values of any form.

    Raises:
        CheckpointError: the file is missing, damaged, or no export; or ``trust`` is False and its format is not safe.
        ConfigError: a package is missing.
    """
    name = format_of(path)
    if name is None:
        raise CheckpointError(f"{path} has no suffix of an export")
    if not Path(path).is_file():
        raise CheckpointError(f"there is no export {path}")
    if not FORMATS[name].is_safe and not trust:
        raise CheckpointError(
            f"{path}: a file of this format can run code when it is loaded; trust=true loads one whose origin you trust"
        )
    return importlib.import_module(check_format(name).module).read(Path(path))
