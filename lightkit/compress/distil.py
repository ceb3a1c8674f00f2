"""A callback that trains a model on the outputs of another one, its teacher."""

from __future__ import annotations

import copy
import functools
from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightkit._util.printable import printable
from lightkit.compress.training_support import callbacks_of, check_share
from lightkit.compress.widths import take_widths
from lightkit.errors import CheckpointError, ConfigError

_TARGETS = ("classes", "values")


class Distil(Callback):
    """Adds the distance to a teacher's outputs to the loss: ``Trainer(callbacks=[Distil(), Prune()])``.

    Without a teacher of its own the callback takes the model as it is before the first round of
    `lightkit.compress.Prune`, `lightkit.compress.Sparsify` or `lightkit.compress.Quantize`: the dense model teaches the
    compressed one. Until then the training is as without the callback.

    The loss of a step becomes ``(1 - weight) * loss + weight * distance``. The distance is that of Hinton et al. [1]_
    for classes, ``temperature ** 2`` times the divergence of the softened probabilities (Kullback-Leibler), and the
    mean squared error for values. The training step must call the model's ``forward``, and the loss must be what it
    returns, alone or as ``loss`` of a dict. It is logged as ``train/distillation``.

    A checkpoint has the weights of a dense model that teaches, so that a training resumes to the bit; a given teacher
    must be given again.

    Args:
        teacher: a model that takes the inputs of the trained one and returns outputs of the same shape; None takes the
            dense model.
        weight: the share of the distance in the loss, above 0 to 1.
        temperature: the number by which logits are divided, positive; without effect for values.
        targets: ``"classes"`` for logits ``(N, C)`` or ``(N, ..., C)``, ``"values"`` for other outputs.
        module: the name of the trained model in the LightningModule. None takes ``model``, else the LightningModule if
            it has a ``forward``, else its only submodule with parameters.

    Raises:
        ConfigError: an argument is out of its range; at the start of a training, there is no teacher and nothing that
            makes the model smaller, or no such module; in the first step, the module is not called, or the outputs are
            no tensors of one shape.

    References:
        .. [1] Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015.
    """

    def __init__(
        self,
        teacher: nn.Module | None = None,
        weight: float = 0.7,
        temperature: float = 3.0,
        targets: str = "classes",
        module: str | None = None,
    ) -> None:
        if teacher is not None and not isinstance(teacher, nn.Module):
            raise ConfigError(f"teacher must be a module or None, got {teacher!r}")
        if targets not in _TARGETS:
            raise ConfigError(f"targets must be one of {', '.join(_TARGETS)}, got {targets!r}")
        if not isinstance(temperature, (int, float)) or isinstance(temperature, bool) or not temperature > 0:
            raise ConfigError(f"temperature must be positive, got {temperature!r}")
        self.weight = check_share("weight", weight, zero=False)
        self.temperature, self.targets = float(temperature), targets
        self._given = teacher
        self._module_name = module
        self._teacher: nn.Module | None = None
        self._loaded: dict[str, Any] | None = None
        self._distance: Tensor | None = None
        self._undo = ExitStack()

    @property
    def has_teacher(self) -> bool:
        """True if a teacher was given, False if the dense model is to teach."""
        return self._given is not None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forgets the teacher of an earlier training."""
        if stage == "fit":
            self._undo.close()
            self._teacher, self._loaded, self._distance = None, None, None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Rejects a training without a teacher, or with optimization by hand."""
        makes_smaller = any(getattr(callback, "teaches_with_dense_model", False) for callback in callbacks_of(trainer))
        if self._given is None and not makes_smaller:
            raise ConfigError("Distil has no teacher: give one, or use it with Prune, Sparsify or Quantize")
        if not pl_module.automatic_optimization:
            raise ConfigError("Distil needs automatic optimization: it changes the loss that training_step returns")
        self._student(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins with a given teacher, or with that of the checkpoint."""
        if self._given is not None:
            self._begin(pl_module, self._given)
        elif self._loaded is not None:
            teacher = copy.deepcopy(self._student(pl_module))
            try:
                take_widths(teacher, self._loaded)
                teacher.load_state_dict(self._loaded)
            except (RuntimeError, CheckpointError) as error:
                reason = printable(str(error).partition("\n")[0])
                raise CheckpointError(f"the teacher in the checkpoint does not fit the model: {reason}") from error
            self._begin(pl_module, teacher)
        self._loaded = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gives the module its own training step back."""
        self._undo.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Gives the module its own training step back after an error or Ctrl-C."""
        self._undo.close()

    def take_dense_model(self, pl_module: pl.LightningModule) -> None:
        """Makes a copy of the present model the teacher, unless there is one."""
        if self._teacher is None and self._given is None:
            self._begin(pl_module, copy.deepcopy(self._student(pl_module)))

    def state_dict(self) -> dict[str, Any]:
        """Returns the weights of a dense model that teaches; an empty dict without one."""
        if self._teacher is None or self._given is not None:
            return {}
        return {"teacher": {name: value.detach().cpu() for name, value in self._teacher.state_dict().items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the weights of the teacher for the start of the training.

        Raises:
            CheckpointError: the state is something else.
        """
        teacher = state_dict.get("teacher")
        if teacher is not None and not (
            isinstance(teacher, dict) and all(isinstance(value, Tensor) for value in teacher.values())
        ):
            raise CheckpointError("the state of Distil in the checkpoint is damaged")
        self._loaded = teacher

    def __getstate__(self) -> dict[str, Any]:
        # A copy has changed no module and has nothing to undo.
        return {**vars(self), "_undo": ExitStack(), "_distance": None}

    def _student(self, pl_module: pl.LightningModule) -> nn.Module:
        name = self._module_name
        if name is not None:
            found = dict(pl_module.named_modules()).get(name)
            if found is None:
                raise ConfigError(f"Distil: module={name} is no submodule of {type(pl_module).__name__}")
            return found
        model = getattr(pl_module, "model", None)
        if isinstance(model, nn.Module):
            return model
        if type(pl_module).forward is not pl.LightningModule.forward:
            return pl_module
        children = [child for child in pl_module.children() if any(True for _ in child.parameters())]
        if len(children) != 1:
            raise ConfigError(f"Distil: {type(pl_module).__name__} has no submodule model: give module=NAME")
        return children[0]

    def _begin(self, pl_module: pl.LightningModule, teacher: nn.Module) -> None:
        """Hooks the model, and wraps the training step."""
        student = self._student(pl_module)
        if teacher is student or (isinstance(teacher, pl.LightningModule) and teacher is pl_module):
            raise ConfigError("Distil: the teacher is the trained model itself; pass a copy")
        device = next((p.device for p in student.parameters()), torch.device("cpu"))
        self._teacher = teacher.to(device).eval().requires_grad_(False)
        step = pl_module.training_step

        @functools.wraps(step)
        def training_step(*arguments: Any, **options: Any) -> Any:
            self._distance = None
            output = step(*arguments, **options)
            return self._combined(pl_module, output)

        self._undo.callback(student.register_forward_hook(self._compare, with_kwargs=True).remove)
        vars(pl_module)["training_step"] = training_step
        self._undo.callback(vars(pl_module).pop, "training_step")

    def _compare(self, module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        """Computes the distance of the first call in a step, before a loss may write into the outputs."""
        if self._distance is not None or not torch.is_grad_enabled():
            return
        assert self._teacher is not None
        with torch.no_grad():
            wanted = self._teacher(*arguments, **options)
        if not (isinstance(output, Tensor) and isinstance(wanted, Tensor) and output.shape == wanted.shape):
            shapes = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in (output, wanted)]
            raise ConfigError(f"Distil: the model returns {shapes[0]} and the teacher {shapes[1]}, expected one shape")
        self._distance = self._distance_of(output, wanted)

    def _distance_of(self, output: Tensor, wanted: Tensor) -> Tensor:
        # Half precision would round the small probabilities.
        output, wanted = (x if x.dtype == torch.float64 else x.float() for x in (output, wanted))
        if self.targets == "values":
            return F.mse_loss(output, wanted)
        classes = output.shape[-1]
        student, teacher = ((x.reshape(-1, classes) / self.temperature).log_softmax(1) for x in (output, wanted))
        return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * self.temperature**2

    def _combined(self, pl_module: pl.LightningModule, output: Any) -> Any:
        loss = output.get("loss") if isinstance(output, dict) else output
        if not isinstance(loss, Tensor):
            return output
        distance, self._distance = self._distance, None
        if distance is None:
            raise ConfigError(
                "Distil: the training step does not call forward of the model, so that there are no outputs to "
                "compare: module=NAME takes a module that it calls"
            )
        pl_module.log("train/distillation", distance.detach(), on_step=False, on_epoch=True, batch_size=1)
        combined = (1 - self.weight) * loss + self.weight * distance
        return {**output, "loss": combined} if isinstance(output, dict) else combined


def begin_distillation(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Gives the present model to the `Distil` callbacks of a trainer that wait for a teacher."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, Distil):
            callback.take_dense_model(pl_module)
