"""A callback that trains a model with the few bits that it is deployed with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightkit._util.strategy_traits import LocalTrainer
from lightkit.compress.distil import begin_distillation
from lightkit.compress.quantization import read_spec, remember, show_levels, spec_of
from lightkit.compress.quantized_weights import QuantizedWeights
from lightkit.compress.scheme import QuantizationScheme
from lightkit.compress.sparsify import Sparsify
from lightkit.compress.training_support import (
    LOCAL,
    WHOLE,
    callbacks_of,
    check_not_compiled,
    check_share,
    check_training,
    decide_together,
    forget_best,
    gather_objects,
    round_steps,
    training_steps,
)
from lightkit.compress.weight_formats import QUANTIZATION_KEY, quantizable_weights
from lightkit.errors import CheckpointError, ConfigError
from lightkit.nn.input_quantizer import InputQuantizer, attach, detach


class Quantize(Callback):
    """Trains any LightningModule with weights of few bits: ``Trainer(callbacks=[Quantize(bits=8)])``.

    From a share of the training on, forward and backward passes compute with rounded weights, and the optimizer updates
    the weights without rounding (the straight-through estimator [1]_). Validation, tests and predictions compute with
    rounded weights, too, so that each figure is one of the model that is deployed. Weights of 3 to 8 bits have the
    symmetric levels ``-qmax ... qmax`` times a scale for each output of a layer, its largest weight divided by
    ``qmax = 2 ** (bits - 1) - 1``. Weights of 2 bits have the levels -3, -1, 1, 3 of statistics-aware weight
    binning [2]_.

    The inputs of convolutions and linear layers are rounded to 8 bits, see `lightkit.nn.InputQuantizer`. In each round
    the callback records the extremes of the inputs in some batches, as means over batches and processes, and the range
    stays as it is until the next round: in evaluation nothing is recorded, and the last range is the deployed one.

    Checkpoints have the weights without rounding, so that a training resumes to the bit, and under
    `lightkit.compress.QUANTIZATION_KEY` the bits and ranges. After the training the module has the rounded weights. At
    the first round, checkpoints and early stopping forget the scores so far, which are those of the model in float.

    Args:
        bits: see `lightkit.compress.QuantizationScheme`, as for the next three and ``layers``.
        activations: as there.
        edge_bits: as there.
        group_size: as there.
        start: the share of the training's steps before the first round.
        end: the share before the last round.
        rounds: the number of rounds.
        batches: the number of batches that a round observes.
        layers: the bits of some weights by patterns of names, such as ``{"features.3": 4}``.

    Raises:
        ConfigError: an argument is none of these; or the training cannot be quantized, see
            `lightkit.compress.training_support.check_training`.

    References:
        .. [1] Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
           Inference, CVPR 2018.
        .. [2] Choi et al., Accurate and Efficient 2-bit Quantized Neural Networks, MLSys 2019.
    """

    teaches_with_dense_model = True

    def __init__(
        self,
        bits: int = 8,
        activations: str = "auto",
        edge_bits: int = 8,
        group_size: int | None = None,
        start: float = 0.6,
        end: float = 0.85,
        rounds: int = 2,
        batches: int = 16,
        layers: Mapping[str, int] | None = None,
    ) -> None:
        self.scheme = QuantizationScheme(bits, activations, edge_bits, group_size, layers)
        self.start, self.end = check_share("start", start), check_share("end", end)
        if self.end < self.start:
            raise ConfigError(f"end must be at least start, which is {start}, got {end}")
        for name, value in {"rounds": rounds, "batches": batches}.items():
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name} must be a whole number, at least 1, got {value!r}")
        self.rounds, self.batches = rounds, batches
        self._forget()

    def _forget(self) -> None:
        self._finished_rounds = 0
        self._seen_step = -1
        self._round_steps: list[int] = []
        # The batches of the present round that are still to be observed.
        self._left = 0
        # True after the training: the module keeps the rounded weights.
        self._is_over = False
        self._weights: QuantizedWeights | None = None
        # The shapes for which the formats of the weights were chosen.
        self._shapes: list[torch.Size] = []
        self._quantizers: dict[str, InputQuantizer] = {}
        # What each process has observed, by its rank.
        self._loaded: list[dict[str, list[float]]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forgets an earlier training."""
        if stage == "fit":
            self._forget()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves the rounded weights in the module after a training."""
        if stage == "fit":
            self._begin_evaluation(pl_module)
            self._is_over = True
            if self._weights is not None:
                remember(pl_module, spec_of(self._weights.formats, self._quantizers), self._weights.levels())

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Gives the weights the values that the optimizer has computed."""
        self._restore()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Rejects a training that cannot be quantized."""
        check_training("Quantize", trainer, pl_module, WHOLE | LOCAL, "with and without rounding")
        check_not_compiled("Quantize", pl_module)
        if isinstance(trainer.optimizers[0], torch.optim.LBFGS):
            raise ConfigError("Quantize: LBFGS evaluates the model within a step; use another optimizer")
        if not any(True for _ in quantizable_weights(pl_module)):
            raise ConfigError("Quantize: the module has no convolution, linear, recurrent or embedding layer")
        self.scheme.formats(pl_module)
        if self.scheme.least_bits == 2 and any(isinstance(callback, Sparsify) for callback in callbacks_of(trainer)):
            raise ConfigError("Quantize: weights of 2 bits have no zero for Sparsify; use more bits")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Computes the steps of the rounds, and goes on as the checkpoint says."""
        total = training_steps("Quantize", trainer)
        self._round_steps = round_steps("Quantize", self.start, self.end, self.rounds, total)
        for _, layer in pl_module.named_modules():
            detach(layer)
        if self._finished_rounds > 0:
            self._begin(pl_module)
            self._load_ranges(trainer.global_rank)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Rounds the weights for the passes of the step."""
        self._round(pl_module)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gives the weights their values without rounding, which the optimizer steps."""
        self._restore()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Begins a round after its step, and ends it after its last observed batch."""
        self._restore()
        step = trainer.global_step
        is_new, self._seen_step = step != self._seen_step, step
        if self._left > 0:
            self._end_observation(trainer, pl_module, is_new)
        is_open = is_new and self._finished_rounds < self.rounds
        if is_open and decide_together(trainer, step >= self._round_steps[self._finished_rounds]):
            if self._finished_rounds == 0:
                begin_distillation(trainer, pl_module)
                self._begin(pl_module)
            self._finished_rounds += 1
            self._left = self._observed_batches(trainer) if self._quantizers else 0
            for quantizer in self._quantizers.values():
                quantizer.is_observing = True
            if self._finished_rounds == 1:
                forget_best(trainer)
            if self._finished_rounds == 1 and trainer.is_global_zero:
                print(self._summary(pl_module), flush=True)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Rounds the weights for a batch, whatever weights another callback validates."""
        self._begin_evaluation(pl_module)

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any) -> None:
        """Gives the weights their values back."""
        self._restore()

    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Rounds the weights for a batch."""
        self._begin_evaluation(pl_module)

    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any) -> None:
        """Gives the weights their values back."""
        self._restore()

    def on_predict_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Rounds the weights for a batch."""
        self._begin_evaluation(pl_module)

    def on_predict_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any) -> None:
        """Gives the weights their values back."""
        self._restore()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warns if the training has ended before the ranges of the last round are known."""
        if self._finished_rounds < self.rounds or self._left > 0:
            missing = self._finished_rounds if self._left > 0 else self._finished_rounds + 1
            rank_zero_warn(f"Quantize: the training ended before round {missing} of {self.rounds} was complete")
            self._freeze(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds the bits of weights and the ranges of inputs, from the first round on."""
        if self._weights is None:
            return
        weights = self._present(pl_module)
        checkpoint[QUANTIZATION_KEY] = spec_of(weights.formats, self._quantizers)
        if weights.are_rounded:
            kept = weights.copies()
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {name: kept.get(name, value) for name, value in state.items()}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Takes the bits and ranges of a checkpoint for a validation, a test or a prediction."""
        if trainer.state.fn == TrainerFn.FITTING:
            return
        # A training of before may have left its own.
        for layer in pl_module.modules():
            detach(layer)
        self._weights, self._quantizers = None, {}
        spec = checkpoint.get(QUANTIZATION_KEY)
        if spec is None:
            return
        formats, self._quantizers = read_spec(pl_module, spec)
        self._weights, self._is_over = QuantizedWeights(pl_module, formats), False
        self._shapes = [p.shape for p in self._weights.parameters.values()]
        for name, quantizer in self._quantizers.items():
            attach(pl_module.get_submodule(name), quantizer)

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of rounds and what they have observed, as plain containers.

        While several processes observe, all of them must call the method.
        """
        ranges = {
            name: [*(() if q.scale is None else (q.scale, q.zero_point)), q.lows, q.highs, q.batches]
            for name, q in self._quantizers.items()
        }
        state = {"rounds": self._finished_rounds, "left": self._left, "ranges": ranges}
        workers = gather_objects(ranges)[1:] if self._left > 0 else []
        return {**state, "workers": workers} if workers else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state that `state_dict` returned; the training goes on with it when it starts.

        Raises:
            CheckpointError: the state has other types.
        """
        rounds, left, ranges = (state_dict.get(name) for name in ("rounds", "left", "ranges"))
        workers = state_dict.get("workers", [])
        if (
            not (isinstance(rounds, int) and isinstance(left, int) and rounds >= 0 and left >= 0)
            or not isinstance(workers, list)
            or not all(isinstance(found, dict) and all(map(_is_range, found.values())) for found in (ranges, *workers))
        ):
            raise CheckpointError("the state of Quantize in the checkpoint is damaged")
        self._finished_rounds, self._left, self._loaded = rounds, left, [ranges, *workers]

    def _begin(self, pl_module: pl.LightningModule) -> None:
        """Chooses the bits of the weights, and the layers whose inputs are rounded."""
        self._weights = QuantizedWeights(pl_module, self.scheme.formats(pl_module))
        self._shapes = [p.shape for p in self._weights.parameters.values()]
        for name, layer in self.scheme.rounded_layers(pl_module).items():
            self._quantizers[name] = InputQuantizer()
            attach(layer, self._quantizers[name])

    def _load_ranges(self, rank: int) -> None:
        for name, values in self._loaded[0].items() if self._loaded else ():
            quantizer = self._quantizers.get(name)
            if quantizer is None:
                raise CheckpointError(f"the checkpoint has a range for {name}, whose input is not rounded")
            *scale, _, _, _ = values
            if scale:
                quantizer.scale, quantizer.zero_point = scale[0], int(scale[1])
            quantizer.is_observing = self._left > 0
            # A process that is new has observed nothing.
            observed = self._loaded[rank].get(name) if rank < len(self._loaded) else None
            if observed is not None:
                quantizer.lows, quantizer.highs, quantizer.batches = observed[-3], observed[-2], int(observed[-1])
        self._loaded = []

    def _present(self, pl_module: pl.LightningModule) -> QuantizedWeights:
        """Returns the weights with the formats of their present shapes, which pruning changes."""
        assert self._weights is not None
        shapes = [p.shape for p in self._weights.parameters.values()]
        if not self._weights.are_rounded and shapes != self._shapes:
            self._weights, self._shapes = QuantizedWeights(pl_module, self.scheme.formats(pl_module)), shapes
        return self._weights

    def _round(self, pl_module: pl.LightningModule) -> None:
        if self._weights is not None:
            self._present(pl_module).round()

    def _begin_evaluation(self, pl_module: pl.LightningModule) -> None:
        """Rounds the weights, whose integers lightkit's models then compute with, as they do when they are deployed."""
        if self._weights is not None and not self._is_over:
            self._round(pl_module)
            show_levels(pl_module, self._weights.levels())

    def _restore(self) -> None:
        if self._weights is not None and not self._is_over:
            self._weights.restore()

    def _observed_batches(self, trainer: pl.Trainer) -> int:
        """Returns the number of batches of this round, at most half of those before the next one or the end."""
        following = [*self._round_steps, training_steps("Quantize", trainer)][self._finished_rounds]
        room = (following - trainer.global_step) * trainer.accumulate_grad_batches
        return min(self.batches, max(1, room // 2))

    def _end_observation(self, trainer: pl.Trainer, pl_module: pl.LightningModule, is_new: bool) -> None:
        """Counts an observed batch, and sets the ranges after the last one.

        Processes that train by themselves observe until an average, in which all of them take part.

        Args:
            trainer: the trainer.
            pl_module: the module.
            is_new: True if the batch ended with a step of the optimizer.
        """
        is_last = self._left == 1
        if isinstance(trainer.strategy, LocalTrainer):
            is_last = is_new and decide_together(trainer, is_last)
        self._left = 0 if is_last else max(1, self._left - 1)
        if is_last:
            self._freeze(trainer, pl_module)
            if self._finished_rounds == 1:
                # A validation since the first round had a model without rounded inputs.
                forget_best(trainer)

    def _freeze(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sets the ranges to the means over the processes."""
        quantizers = list(self._quantizers.values())
        if not quantizers:
            return
        if trainer.world_size > 1:
            sums = torch.tensor(
                [[q.lows, q.highs, q.batches] for q in quantizers], dtype=torch.float64, device=pl_module.device
            )
            gathered = pl_module.all_gather(sums)
            assert isinstance(gathered, Tensor)
            total = gathered.sum(0)
            for quantizer, (low, high, count) in zip(quantizers, total.tolist(), strict=True):
                quantizer.lows, quantizer.highs, quantizer.batches = low, high, int(count)
        for quantizer in quantizers:
            quantizer.freeze()

    def _summary(self, pl_module: pl.LightningModule) -> str:
        assert self._weights is not None
        count = sum(p.numel() for p in self._weights.parameters.values())
        rest = sum(p.numel() for p in pl_module.parameters()) - count
        inputs = f"; the inputs of {len(self._quantizers)} layers have 8 bits" if self._quantizers else ""
        by_bits: Counter[int] = Counter()
        for name, weight_format in self._weights.formats.items():
            by_bits[weight_format.bits] += self._weights.parameters[name].numel()
        shown = ", ".join(f"{number:,} to {bits} bits" for bits, number in sorted(by_bits.items()))
        return f"quantized {count:,} weights: {shown}{inputs}; {rest:,} parameters stay in float"


def _is_range(value: Any) -> bool:
    if type(value) is not list or len(value) not in (3, 5):
        return False
    *scale, low, high, count = value
    is_scale = not scale or (type(scale[0]) is float and scale[0] > 0 and type(scale[1]) is int and 0 <= scale[1] < 256)
    return is_scale and type(low) is float and type(high) is float and type(count) is int and count >= 0
