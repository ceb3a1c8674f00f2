"""A stand-in for the package torch_tpu: its import registers a device "tpu" that is a CPU's (device.cpp).

The variable ``FAKE_TPU`` is the path of the library built from device.cpp, or empty for a machine without a TPU.
"""

import os

import torch


class _DeviceModule:
    """The device module that torch requires."""

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        pass

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float32]


if os.environ.get("FAKE_TPU"):
    torch.ops.load_library(os.environ["FAKE_TPU"])
    torch.utils.rename_privateuse1_backend("tpu")
    torch._register_device_module("tpu", _DeviceModule)
    torch.utils.generate_methods_for_privateuse1_backend()
