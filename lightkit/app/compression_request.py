"""The options of `python -m lightkit.compress`."""

from __future__ import annotations

from dataclasses import dataclass

from lightkit.compress import Prune, QuantizationScheme, Sparsify
from lightkit.errors import ConfigError

# The value of ``bits`` with which max_drop finds the bits of each weight.
AUTO = "auto"


@dataclass(frozen=True)
class CompressionRequest:
    """The options of a compression: the keys of ``conf/compress.yaml`` except the checkpoint."""

    keep_macs: float | None = 0.25
    zeros: float | None = None
    bits: int | str | None = None
    max_drop: float | None = None
    distil: float = 0.0
    epochs: int | None = None
    lr: float = 1e-3
    compare: bool = True
    output: str | None = None
    data_dir: str | None = None
    download: bool = False
    accelerator: str = "auto"
    seed: int = 0
    runtimes: bool = True

    def check(self) -> None:
        """Rejects options that are out of their ranges, or ask for nothing.

        Raises:
            ConfigError: an option is one of these; the message names the option.
        """
        if self.keep_macs is None and self.zeros is None and self.bits is None and self.max_drop is None:
            raise ConfigError("keep_macs, zeros, bits and max_drop are all null: there is nothing to compress")
        if isinstance(self.bits, int):
            QuantizationScheme(self.bits)
        elif self.bits is not None and (self.bits != AUTO or self.max_drop is None):
            raise ConfigError(
                f"bits must be 8, 4, 3, 2 or null, or with max_drop {AUTO}, which finds the bits of each layer; "
                f"got {self.bits!r}"
            )
        if self.max_drop is not None and not 0 <= self.max_drop < 1:
            raise ConfigError(f"max_drop must be a share of the validation set from 0 to below 1, got {self.max_drop}")
        # The callbacks know their ranges; they are built again only after the dense model is trained.
        if self.keep_macs is not None:
            Prune(self.keep_macs)
        if self.zeros is not None:
            Sparsify(self.zeros)
        if self.bits == 2 and self.zeros is not None:
            raise ConfigError("zeros do not go with bits=2, which has no zero: give bits=3 or zeros=null")
        if not 0 <= self.distil <= 1:
            raise ConfigError(f"distil must be a number from 0 to 1, got {self.distil}")
        if self.epochs is not None and self.epochs < 0:
            raise ConfigError(f"epochs must be at least 0, got {self.epochs}")
        if self.bits == AUTO and self.zeros is not None:
            raise ConfigError("bits=auto may choose 2 bits, which have no zero: give zeros=null")
        drop = None if self.bits == AUTO else self.max_drop
        if self.epochs == 0 and (self.bits is None or {self.keep_macs, self.zeros, drop} != {None}):
            raise ConfigError(
                "epochs=0 rounds the weights without a training: give bits, and keep_macs=null, which needs a training"
            )
        if self.epochs == 0 and self.distil > 0:
            raise ConfigError(f"distil={self.distil} needs a training, and epochs=0 makes none")
        if not self.lr > 0:
            raise ConfigError(f"lr must be positive, got {self.lr}")
