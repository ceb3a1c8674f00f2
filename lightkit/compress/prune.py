"""A callback that removes channels, hidden units and heads during a training."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightkit._lightning.ddp import wrap_anew
from lightkit._util.strategy_traits import LocalTrainer
from lightkit.compress.calls import CallRecorder, ModelCall
from lightkit.compress.distil import begin_distillation
from lightkit.compress.importance import squared_derivatives
from lightkit.compress.overlaps import separate_roots
from lightkit.compress.save_widths import SaveWidths
from lightkit.compress.selection import choose_units, smallest_macs
from lightkit.compress.surgery import provable_graph, remove_units
from lightkit.compress.training_support import (
    LOCAL,
    WHOLE,
    check_not_compiled,
    check_share,
    check_training,
    decide_together,
    forget_best,
    gather_objects,
    round_steps,
    training_steps,
)
from lightkit.compress.units import FIXED, UnitGraph, named_tensors
from lightkit.errors import CheckpointError, ConfigError

# The number of steps before the first removal in which the importances are measured.
_MEASURED_STEPS = 64


class TooSmallError(ConfigError):
    """An error in ``keep_macs``: no choice of units leaves so few multiply-adds."""


class Prune(SaveWidths):
    """Removes units of any LightningModule while it trains: ``Trainer(callbacks=[Prune(keep_macs=0.25)])``.

    Units are the channels of convolutions and linear layers, the hidden units of recurrent layers, the heads of
    lightkit's attention and the inner width of its feed-forward blocks. They are removed for good: the layers have
    smaller weights, and the model is faster. The training first runs with all units, then loses some in several rounds,
    and goes on with those that are left.

    In a round the units of all layers compete: those with the least importance for the multiply-adds that they take are
    removed, see `lightkit.compress.importance` and `lightkit.compress.selection`. The widths of the layers follow from
    that. The first training step shows which units there are: see `lightkit.compress.tracing`. A layer whose units
    cannot be removed, such as one whose size stands in a ``forward``, keeps its width.

    Parameters stay the same objects, and optimizers keep their states, averages and master weights of the remaining
    units. Checkpoints have the widths under `lightkit.compress.WIDTHS_KEY`. A training resumes at any step, to the bit
    like one that was not interrupted. At each round, checkpoints and early stopping forget the scores so far, which are
    those of larger models.

    Args:
        keep_macs: the share of the multiply-adds that is left at the end, above 0 to 1.
        start: the share of the training's steps before the first round.
        end: the share before the last round.
        rounds: the number of rounds, each of which leaves the same share of the multiply-adds.
        multiple: layers of at least twice as many units keep a multiple of this number: lightkit's kernels compute 16
            channels of float32 at once with AVX-512, so that other widths take the time of the next multiple. Where
            that would leave multiply-adds unused, a layer keeps half a multiple more. The share at the end may be
            smaller for that.

    Attributes:
        dense_macs: the multiply-adds of the dense model for one sample, which its layers take; None before the first
            step.
        macs: those of the present model.
        widths: the number of units of each layer in the dense and in the present model, by the layer's name.

    Raises:
        ConfigError: an argument is out of its range; at the start of a training, its strategy, optimizer or callbacks
            do not allow pruning, see `lightkit.compress.training_support.check_training`; in the first step, no layer
            can be pruned, or not that far.
    """

    teaches_with_dense_model = True

    def __init__(
        self, keep_macs: float = 0.25, start: float = 0.3, end: float = 0.6, rounds: int = 4, multiple: int = 16
    ) -> None:
        super().__init__()
        self.keep_macs = check_share("keep_macs", keep_macs, zero=False)
        self.start, self.end = check_share("start", start), check_share("end", end)
        if self.end < self.start:
            raise ConfigError(f"end must be at least start, which is {start}, got {end}")
        if type(rounds) is not int or rounds < 1:
            raise ConfigError(f"rounds must be a whole number, at least 1, got {rounds!r}")
        if type(multiple) is not int or multiple < 1:
            raise ConfigError(f"multiple must be a whole number, at least 1, got {multiple!r}")
        self.rounds, self.multiple = rounds, multiple
        self.dense_macs: float | None = None
        self.macs: float | None = None
        self.widths: dict[str, tuple[int, int]] = {}
        self._finished_rounds = 0
        self._recorder: CallRecorder | None = None
        self._roots: list[tuple[nn.Module, UnitGraph]] = []
        # The sum of the squared derivatives of each root's units since the last round, and the number of summed steps.
        self._sums: list[Tensor] = []
        self._summed_steps = 0
        # Those of the other processes in a checkpoint.
        self._workers: list[Any] = []
        # The number of units of each layer of the dense model, by the name of the group.
        self._dense_counts: dict[str, int] = {}
        self._seen_step = -1
        self._round_steps: list[int] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forgets an earlier training, and lets the module load checkpoints of other widths than its own."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._finished_rounds, self._roots, self._sums, self._summed_steps = 0, [], [], 0
            self._dense_counts, self.widths, self._workers = {}, {}, []
            self._recorder, self._seen_step, self.dense_macs, self.macs = None, -1, None, None

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Ends what `setup` has begun, and forgets the modules."""
        super().teardown(trainer, pl_module, stage)
        self._roots, self._recorder = [], None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Removes the hooks at the module."""
        super().on_exception(trainer, pl_module, exception)
        if self._recorder is not None:
            self._recorder.stop()
        self._recorder = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Rejects a training that cannot be pruned."""
        check_training("Prune", trainer, pl_module, WHOLE | LOCAL)
        check_not_compiled("Prune", pl_module)
        if isinstance(trainer.optimizers[0], torch.optim.LBFGS):
            raise ConfigError("Prune: LBFGS keeps a history of all weights as one vector; use another optimizer")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Computes the steps of the rounds, and requests a recording of the first step."""
        total = training_steps("Prune", trainer)
        # The first round needs some steps before it, in which the importances are measured.
        measured = min(_MEASURED_STEPS, max(1, total // (self.rounds + 1)))
        start = max(self.start, measured / total)
        self._round_steps = round_steps("Prune", start, max(start, self.end), self.rounds, total)
        self._recorder = CallRecorder(pl_module)
        rank, workers = trainer.global_rank, self._workers
        if workers and rank > 0 and isinstance(trainer.strategy, LocalTrainer):
            # A worker that is new has measured nothing.
            self._summed_steps, self._sums = workers[rank - 1] if rank <= len(workers) else (0, [])
        self._workers = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Records the calls of the model in the first step."""
        if self._recorder is not None:
            self._recorder.start()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finds the units after the passes of the first step, so that its derivatives count."""
        if self._recorder is not None:
            self._find_units(pl_module)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Adds the squared derivatives of this step, in the steps before a round; except those that are not finite."""
        if not self._roots or not self._is_measured(trainer.global_step):
            return
        derivatives = [squared_derivatives(root, graph) for root, graph in self._roots]
        # The first steps of precision 16-mixed overflow, until the scale of the loss is small enough.
        if all(bool(each.isfinite().all()) for each in derivatives):
            for total, each in zip(self._sums, derivatives, strict=True):
                total += each
            self._summed_steps += 1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Removes units after the step of a round."""
        if self._recorder is not None:
            # A step without a backward pass.
            self._recorder.stop()
        step = trainer.global_step
        is_new, self._seen_step = step != self._seen_step, step
        if not is_new or self._finished_rounds >= self.rounds:
            return
        due = step >= self._round_steps[self._finished_rounds] and bool(self._roots) and self._summed_steps > 0
        if decide_together(trainer, due):
            self._remove(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warns if the training has ended before the last round."""
        if self._finished_rounds < self.rounds:
            rank_zero_warn(
                f"Prune: the training ended before round {self._finished_rounds + 1} of {self.rounds}: the model has "
                "more multiply-adds than keep_macs allows"
            )

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of finished rounds and the measured importances, as plain containers and tensors.

        All processes of a group must call the method.
        """
        sums = self._sums
        # After a training the roots are forgotten, and before the first step the sums are those of a checkpoint.
        if self._roots:
            # In the order of the units that are left: after a removal their numbers have gaps.
            sums = [total[_units(graph)].cpu() for total, (_, graph) in zip(self._sums, self._roots, strict=True)]
        state = {
            "rounds": self._finished_rounds,
            "dense_macs": self.dense_macs,
            "dense_counts": dict(self._dense_counts),
            "steps": self._summed_steps,
            "sums": sums,
        }
        workers = gather_objects([state["steps"], state["sums"]])[1:]
        return {**state, "workers": workers} if workers else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state that `state_dict` returned.

        Raises:
            CheckpointError: the state has other types.
        """
        rounds, steps, sums = (state_dict.get(name) for name in ("rounds", "steps", "sums"))
        dense, counts = state_dict.get("dense_macs"), state_dict.get("dense_counts")
        workers = state_dict.get("workers", [])
        if (
            not isinstance(rounds, int)
            or not isinstance(steps, int)
            or not isinstance(sums, list)
            or not _is_measurement([steps, sums])
            or not (dense is None or isinstance(dense, float))
            or rounds < 0
            or not isinstance(counts, dict)
            or not all(type(name) is str and type(count) is int and count > 0 for name, count in counts.items())
            or not isinstance(workers, list)
            or not all(map(_is_measurement, workers))
        ):
            raise CheckpointError("the state of Prune in the checkpoint is damaged")
        self._workers = workers
        self._finished_rounds, self._summed_steps, self._sums, self.dense_macs = rounds, steps, list(sums), dense
        self._dense_counts = dict(counts)

    def _is_measured(self, step: int) -> bool:
        if self._finished_rounds >= self.rounds:
            return False
        return step >= self._round_steps[self._finished_rounds] - _MEASURED_STEPS

    def _find_units(self, pl_module: pl.LightningModule) -> None:
        assert self._recorder is not None
        calls = self._recorder.stop()
        if calls is None:
            return
        self._recorder = None
        self._roots = []
        for root, graph in separate_roots([(call.module, _trained_graph(call)) for call in calls]):
            names = _names_in(pl_module, root, graph)
            known = {group: self._dense_counts[name] for group, name in names.items() if name in self._dense_counts}
            self._roots.append((root, graph.with_dense_counts(known)))
        self._count_widths(pl_module)
        self._dense_counts = {name: dense for name, (dense, _) in self.widths.items()}
        macs = sum(graph.macs() for _, graph in self._roots)
        if not self.widths:
            reasons = {name: why for _, graph in self._roots for name, why in graph.kept.items()}
            shown = "; ".join(f"{name}: {why}" for name, why in list(reasons.items())[:3])
            raise TooSmallError(f"Prune: no layer can lose units ({shown or 'no module with layers was called'})")
        self.macs = macs
        self.dense_macs = macs if self.dense_macs is None else self.dense_macs
        smallest = sum(smallest_macs(graph, self.multiple) for _, graph in self._roots)
        if self._finished_rounds < self.rounds and smallest > self.keep_macs * self.dense_macs:
            raise TooSmallError(
                f"Prune: keep_macs={self.keep_macs} is less than can be kept: the layers that stay as they are, and a "
                f"sixteenth of the others, take {smallest / self.dense_macs:.3f} of the multiply-adds"
            )
        saved, steps = self._sums, self._summed_steps
        self._clear_sums()
        units = [_units(graph) for _, graph in self._roots]
        # The sums of a checkpoint, unless its model had other units.
        if [len(x) for x in saved] == [len(x) for x in units]:
            for total, numbers, values in zip(self._sums, units, saved, strict=True):
                total[numbers] = values.to(total)
            self._summed_steps = steps

    def _count_widths(self, pl_module: pl.LightningModule) -> None:
        self.widths = {
            names[group.name]: (group.dense_count, len(group.units))
            for root, graph in self._roots
            for names in [_names_in(pl_module, root, graph)]
            for group in graph.groups
        }

    def _clear_sums(self) -> None:
        self._sums = [torch.zeros(graph.count, device=_device(root)) for root, graph in self._roots]
        self._summed_steps = 0

    def _remove(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self.dense_macs is not None and self.macs is not None
        begin_distillation(trainer, pl_module)
        self._finished_rounds += 1
        target = self.dense_macs * self.keep_macs ** (self._finished_rounds / self.rounds)
        present = sum(graph.macs() for _, graph in self._roots)
        widths = {name: len(tensor) for name, tensor in pl_module.named_parameters() if name.endswith("weight")}
        roots: list[tuple[nn.Module, UnitGraph]] = []
        local = trainer.strategy if isinstance(trainer.strategy, LocalTrainer) else None
        outer = None if local is None else local.outer_state()
        optimizers = [*trainer.optimizers, *([] if outer is None else [outer])]
        for (root, graph), total in zip(self._roots, self._sums, strict=True):
            if local is not None:
                # Each process has measured with batches of its own.
                total = trainer.strategy.reduce(total, reduce_op="sum")
            removed = choose_units(graph, total, target * graph.macs() / present, self.multiple)
            # The same units in all processes, whatever the rounding of their gradients.
            removed = torch.tensor(trainer.strategy.broadcast(removed.tolist()), dtype=torch.bool)
            remove_units(root, graph, removed, optimizers)
            roots.append((root, graph.without(removed)))
        self._roots = roots
        self._count_widths(pl_module)
        self.macs = sum(graph.macs() for _, graph in roots)
        self._clear_sums()
        forget_best(trainer)
        if local is None:
            wrap_anew(trainer)
        else:
            local.resize(outer)
        if trainer.is_global_zero:
            after = {name: len(tensor) for name, tensor in pl_module.named_parameters()}
            changed = [f"{name.removesuffix('.weight')} {n} -> {after[name]}" for name, n in widths.items()]
            changed = [text for text, (name, n) in zip(changed, widths.items(), strict=True) if after[name] != n]
            share = self.macs / self.dense_macs
            where = ", ".join(changed) or "no layer is changed in this round"
            print(f"pruned to {share:.1%} of the multiply-adds: {where}", flush=True)


def _names_in(pl_module: pl.LightningModule, root: nn.Module, graph: UnitGraph) -> dict[str, str]:
    """Returns the names of a graph's groups with the path of the graph's root in the whole module, by their own."""
    path = next(name for name, module in pl_module.named_modules() if module is root)
    prefix = f"{path}." if path else ""
    return {group.name: " + ".join(prefix + name for name in group.name.split(" + ")) for group in graph.groups}


def _units(graph: UnitGraph) -> Tensor:
    """Returns the sorted numbers of the units of a graph."""
    return torch.tensor(sorted(unit for group in graph.groups for unit in group.units), dtype=torch.int64)


def _is_measurement(value: Any) -> bool:
    if type(value) is not list or len(value) != 2:
        return False
    steps, sums = value
    are_sums = isinstance(sums, list) and all(
        isinstance(x, Tensor) and x.dim() == 1 and x.is_floating_point() for x in sums
    )
    return type(steps) is int and are_sums


def _device(root: nn.Module) -> torch.device:
    return next(root.parameters()).device


def _trained_graph(call: ModelCall) -> UnitGraph:
    """Returns the units of the called module, without those of frozen layers, which have no gradients to measure."""
    graph = provable_graph(call.module, call.arguments, call.options)
    tensors = named_tensors(call.module)
    frozen = {
        unit
        for axis in graph.axes
        if isinstance(tensors[axis.name], nn.Parameter) and not tensors[axis.name].requires_grad
        for unit in axis.labels.tolist()
        if unit != FIXED
    }
    names = [group.name for group in graph.groups if frozen & set(group.units)]
    return graph.without_groups(dict.fromkeys(names, "a frozen layer reads or computes it"))
