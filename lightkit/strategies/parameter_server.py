"""Training with a parameter server: optimizers step on servers, workers push gradients and pull parameters."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import MethodType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only as fabric_rank_zero_only
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore
from torch.optim import LBFGS, Optimizer

from lightkit._lightning.strategies import SubprocessScriptLauncher
from lightkit._util.deprecated import RenamedAttribute
from lightkit._util.strategy_traits import StrategyTraits
from lightkit.errors import ConfigError
from lightkit.parameter_server import Client, Job, Table
from lightkit.parameter_server.client import Clipping, Exchange
from lightkit.parameter_server.job import options_of
from lightkit.parameter_server.local import LocalServers
from lightkit.parameter_server.rendezvous import SECRET, split_address

# Seconds for the processes of a job to come up, and for servers to put things in order at the end.
_TOGETHER = timedelta(minutes=10)
_ORDER = 10.0

# Of the strategies that meet others, in the order of the program, which is that of all workers.
_numbers = itertools.count()


class ParameterServer(ParallelStrategy):
    """Parameters and optimizers live on servers, to which the workers send their gradients [1]_.

    A worker is one of the Trainer's processes. Each takes its part of the training data; where it would step, it pushes
    the gradient, and goes on with the parameters that come back. The optimizer's class must be one that a
    configuration may build, and steps on the servers; schedulers and hooks stay with the workers.

    Workers do not wait for each other but in those steps (``sync``, ``bounded``), at the beginning and at the end. So
    each validates on all of the validation data, and decides by itself to stop early; what is logged and saved is
    worker 0's. A checkpoint has the parameters and the optimizers' state that the servers have: it is an ordinary one.
    Running statistics and other buffers are each worker's own, in the checkpoint worker 0's.

    Workers may end at any time, and others may take their places: they are then not counted, or begin with the
    parameters of the time. A server that dies comes back, from a snapshot and a log of what has been pushed since:
    every push that was answered counts, and counts once. Where the Trainer starts its processes itself, worker 0 also
    starts the servers, and starts them again. Elsewhere they are ``python -m lightkit.parameter_server`` on any host.

    The norm to clip to is that of the mean gradient in ``sync``, as in data parallel training, and else that of each
    worker's gradient; likewise for ``max_grad_norm`` and ``skip_nonfinite`` of lightkit's optimizers.

    Args:
        mode: ``sync``, ``async`` or ``bounded``: see `lightkit.parameter_server.Job`, also for the next three.
        staleness: pushes that a worker may be ahead of the slowest in ``bounded``.
        compression: of pushes: ``none``, ``bf16`` or ``topk``.
        fraction: that ``topk`` sends.
        overlap: goes on with the next batch while a push is under way, which makes a worker's parameters older by one
            of its own steps. Default: in ``async`` and ``bounded``; not for ``sync``.
        servers: how many worker 0 starts, if there are no ``addresses``.
        snapshot_every: updates from one snapshot of a server to the next; 0: a server that dies ends the job.
        directory: where servers that are started here keep those. Default: below the Trainer's ``default_root_dir``.
        addresses: ``HOST:PORT`` of servers that run already, a list or with commas in between. Their secret is in
            ``LIGHTKIT_SECRET``.
        worker: number of this process, where nobody starts the workers together; with ``workers`` and ``addresses``.
        workers: how many those are, which the training data are dealt out to.
        timeout: seconds without a sign of life after which a worker or server counts as gone; longer than a push
            takes on its way.

    Raises:
        ConfigError: values out of range or that do not go together; at the start of a training, what cannot work with
            it (``16-mixed``, ``LBFGS``, parameters of two optimizers), and what a server refuses.

    References:
        .. [1] Li et al., Scaling distributed machine learning with the parameter server, OSDI 2014.
    """

    traits = StrategyTraits(replicates_evaluation=True, tolerates_worker_loss=True, supports_lean_loop=True)
    evaluates_everything = RenamedAttribute("traits.replicates_evaluation")
    survives_lost_workers = RenamedAttribute("traits.tolerates_worker_loss")
    takes_lean_steps = RenamedAttribute("traits.supports_lean_loop")

    def __init__(
        self,
        mode: str = "sync",
        staleness: int = 4,
        compression: str = "none",
        fraction: float = 0.01,
        overlap: bool | None = None,
        servers: int = 1,
        snapshot_every: int = 1000,
        directory: str | None = None,
        addresses: Sequence[str] | str | None = None,
        worker: int | None = None,
        workers: int | None = None,
        timeout: float = 30.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._settings = {
            "mode": mode,
            "staleness": staleness,
            "compression": compression,
            "fraction": fraction,
            "snapshot_every": snapshot_every,
        }
        # Looked at here and not at the first step.
        Job([], **self._settings)
        if overlap and mode == "sync":
            raise ConfigError("overlap=True: in mode sync a worker needs the parameters of the step before it goes on")
        if not isinstance(servers, int) or isinstance(servers, bool) or servers < 1:
            raise ConfigError(f"servers must be a whole number, at least 1, got {servers!r}")
        if not timeout > 0:
            raise ConfigError(f"timeout must be a number of seconds above 0, got {timeout!r}")
        if (worker is None) != (workers is None) or (worker is not None and addresses is None):
            raise ConfigError("worker, workers and addresses belong together: give all three of them")
        if worker is not None and not 0 <= worker < workers:
            raise ConfigError(f"worker must be from 0 to workers - 1, got worker={worker}, workers={workers}")
        self._overlap = mode != "sync" if overlap is None else overlap
        self._servers_wanted, self._directory = servers, directory
        if isinstance(addresses, str):
            addresses = addresses.split(",")
        for address in addresses or ():
            split_address(address)
        self._addresses = None if addresses is None else list(addresses)
        self._worker, self._workers = worker, workers
        self._timeout = timeout
        self._num_nodes = 1
        self._store: Store | None = None
        self._meetings = 0
        # Between them, the workers agree on nothing: see `broadcast`.
        self._is_training = False
        self._has_trained = False
        self._client: Client | None = None
        self._servers: LocalServers | None = None
        self._pending: dict[int, Exchange] = {}
        # By table, the versions of the parameters after the servers' were taken.
        self._taken: dict[int, list[int]] = {}
        self._clipping: dict[int, Clipping] = {}
        self._restored: list[Any] | None = None
        self._fetched: list[Any] | None = None
        self._steps_counted = 0
        self._traffic = (0, 0)

    # Processes.

    @property
    def num_nodes(self) -> int:
        """Machines with workers of this Trainer."""
        return self._num_nodes

    @num_nodes.setter
    def num_nodes(self, num_nodes: int) -> None:
        self._num_nodes = num_nodes

    @property
    def num_processes(self) -> int:
        """Workers on this machine."""
        return len(self.parallel_devices) if self.parallel_devices is not None else 0

    @property
    def is_distributed(self) -> bool:
        """Has Lightning deal out the samples of a DataLoader."""
        return True

    @property
    def root_device(self) -> torch.device:
        """This worker's."""
        return self.parallel_devices[self.local_rank]

    @property
    def global_rank(self) -> int:
        """This worker's number."""
        return super().global_rank if self._worker is None else self._worker

    @property
    def world_size(self) -> int:
        """The workers that the job begins with."""
        return super().world_size if self._workers is None else self._workers

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        """Which part of the samples is this worker's: of the training data; all of the others."""
        if self.lightning_module is not None and not self.lightning_module.trainer.training:
            return {"num_replicas": 1, "rank": 0}
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def _configure_launcher(self) -> None:
        if self._worker is None:
            self._launcher = SubprocessScriptLauncher(self.cluster_environment, self.num_processes, self.num_nodes)
        elif self.num_processes * self.num_nodes != 1:
            raise ConfigError(f"worker={self._worker} is one process: set the Trainer's devices and num_nodes to 1")

    def setup_environment(self) -> None:
        """Meets the other workers, and has the servers started."""
        super().setup_environment()
        if self.lightning_module.trainer.state.fn == TrainerFn.FITTING:
            self._has_trained = False
        reset_seed()
        self.set_world_ranks()
        if self._worker is None and self.world_size > 1 and self._store is None:
            self._store = self._meet()

    def set_world_ranks(self) -> None:
        """Numbers this worker; the Trainer asks for it as soon as it has made the strategy."""
        if self._worker is None:
            self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        rank_zero_only.rank = fabric_rank_zero_only.rank = self.global_rank

    def _meet(self) -> Store:
        environment = self.cluster_environment
        # torchrun, and lightkit.train, serve the store themselves.
        served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        store = TCPStore(
            environment.main_address,
            environment.main_port,
            is_master=self.global_rank == 0 and not served,
            wait_for_workers=False,
            timeout=_TOGETHER,
            # Another strategy may have one there already.
            multi_tenant=True,
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return PrefixStore(f"lightkit/parameter_server/{attempt}/{next(_numbers)}", store)

    def barrier(self, name: str | None = None) -> None:
        """Waits for all workers before the training, for worker 0 after it, and for nobody in between."""
        if self._store is None or self._is_training:
            return
        key = self._next_key()
        if self._has_trained:
            # Others may have been lost.
            self._say_or_hear(key, None)
            return
        if self._store.add(key, 1) == self.world_size:
            self._store.set(f"{key}/all", "")
        self._store.wait([f"{key}/all"], _TOGETHER)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """What that worker has; in the training, where no worker waits for another, each its own.

        Raises:
            ConfigError: it is not what JSON can say.
        """
        if self._store is None or self._is_training:
            return obj
        return self._say_or_hear(self._next_key(), obj, src)

    def _say_or_hear(self, key: str, obj: Any, src: int = 0) -> Any:
        if self.global_rank == src:
            try:
                self._store.set(key, json.dumps(obj, default=os.fspath))
            except TypeError as error:
                raise ConfigError(f"a parameter server's workers share what JSON can say alone: {error}") from None
        self._store.wait([key], timedelta(days=365))
        return json.loads(self._store.get(key))

    def _next_key(self) -> str:
        self._meetings += 1
        return f"meeting/{self._meetings}"

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """This worker's own."""
        return tensor

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """This worker's own."""
        return tensor

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """This worker's own."""
        return decision

    # The model.

    def model_to_device(self) -> None:
        """Moves it to this worker's device."""
        self.model.to(self.root_device)

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        """Makes the optimizers, whose steps are the servers' from here on."""
        super().setup_optimizers(trainer)
        if self._layer_sync is not None:
            raise ConfigError("ParameterServer: sync_batchnorm has the workers wait for each other; turn it off")
        for callback in trainer.callbacks:
            if isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
                raise ConfigError(
                    f"ParameterServer: {type(callback).__name__} writes to weights that are the servers'; for an "
                    "average use ema_decay of lightkit's optimizers"
                )
        if getattr(self.precision_plugin, "scaler", None) is not None:
            raise ConfigError(
                "ParameterServer: precision 16-mixed scales gradients by a factor of each worker's own; use bf16-mixed "
                "or 32-true"
            )
        for index, optimizer in enumerate(self.optimizers):
            if isinstance(optimizer, LBFGS):
                raise ConfigError("ParameterServer: LBFGS evaluates the model several times in a step")
            step = Optimizer.profile_hook_step(_step_on_servers)
            optimizer.step = MethodType(step, optimizer)
            # So that schedulers find it as they made it.
            optimizer.step.__func__._wrapped_by_lr_sched = True
            optimizer.lightkit_push = (self, index)

    @contextlib.contextmanager
    def block_backward_sync(self) -> Any:
        """Nothing is sent in a backward pass."""
        yield

    # Training.

    def on_train_start(self) -> None:
        """Joins the servers; worker 0 gives them the parameters, and the optimizers' state of a checkpoint."""
        names = {parameter: name for name, parameter in self.lightning_module.named_parameters()}
        seen: set[Tensor] = set()
        for parameter in (p for o in self.optimizers for p in _parameters_of(o)):
            if parameter not in names:
                raise ConfigError("ParameterServer: an optimizer has a parameter that is not the module's")
            if parameter in seen:
                raise ConfigError(f"ParameterServer: {names[parameter]} is a parameter of two optimizers")
            seen.add(parameter)
        tables = [Table.of(optimizer, names) for optimizer in self.optimizers]
        # Of a training within this one, such as the search for a learning rate.
        self._leave()
        addresses, secret = self._find_servers()
        job = Job(tables, workers=self.world_size, **self._settings)
        self._client = Client(addresses, secret, self.global_rank, job, self._timeout)
        values = [[p.detach() for p in _parameters_of(optimizer)] for optimizer in self.optimizers]
        options = [options_of(optimizer) for optimizer in self.optimizers]
        if not self._client.start(options, values, self._restored) and self.is_global_zero:
            if self._restored is not None:
                raise ConfigError(
                    f"the parameter servers at {', '.join(addresses)} are in the middle of a training already, and "
                    "would go on with that instead of with the checkpoint: start them anew, without what their "
                    "directory holds"
                )
            rank_zero_warn(
                f"the parameter servers at {', '.join(addresses)} are in the middle of a training: going on with the "
                "parameters that they have"
            )
        self._restored = self._fetched = None
        for table in range(len(tables)):
            self._take(table, self._client.pull(table))
        self._record_clipping()
        self._is_training = True

    def _find_servers(self) -> tuple[list[str], str]:
        own = os.environ.get(SECRET, "")
        if self._addresses is not None:
            if not own:
                raise ConfigError(f"addresses need the servers' secret in the environment: {SECRET}")
            return self._addresses, own
        if self.num_nodes > 1 and not own:
            raise ConfigError(
                f"a parameter server that other machines reach needs a secret in the environment of all: {SECRET}"
            )
        found = None
        if self.is_global_zero:
            secret = own or secrets.token_hex(16)
            host = "127.0.0.1" if self.num_nodes == 1 else self.cluster_environment.main_address
            self._servers = LocalServers(
                self._servers_wanted, secret, self._directory_for_snapshots(), host, self._timeout
            )
            # Anybody can read what is told here: one that was chosen stays untold, one made up is for servers that
            # this machine alone can reach.
            found = [self._servers.addresses, "" if own else secret]
        addresses, secret = self.broadcast(found)
        return addresses, secret or own

    def _directory_for_snapshots(self) -> Path | None:
        if not self._settings["snapshot_every"]:
            return None
        root = self._directory or Path(self.lightning_module.trainer.default_root_dir) / "parameter_servers"
        # Not what an earlier run has left, which would be taken up.
        return Path(root) / secrets.token_hex(4)

    def _record_clipping(self) -> None:
        """Has Lightning's clipping done where the gradients are those of the step."""

        def clip_gradients(optimizer: Optimizer, clip_val: float = 0.0, gradient_clip_algorithm: Any = "norm") -> None:
            if clip_val <= 0:
                return
            inner = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
            name = "max_value" if gradient_clip_algorithm == "value" else "max_norm"
            self._clipping[self.optimizers.index(inner)] = Clipping(**{name: float(clip_val)})

        self.precision_plugin.clip_gradients = clip_gradients

    def push(self, index: int, optimizer: Optimizer) -> None:
        """Sends the gradients of an optimizer's parameters, and takes what comes back."""
        if self._client is None:
            raise ConfigError("ParameterServer: an optimizer was stepped before the training began")
        self._check_unwritten(index, optimizer)
        self._drain(index)
        self._fetched = None
        clipping = self._clipping.pop(index, Clipping())
        own_norm = getattr(optimizer, "max_grad_norm", None)
        norms = [norm for norm in (clipping.max_norm, own_norm) if norm is not None]
        clipping = Clipping(
            min(norms, default=None), clipping.max_value, bool(getattr(optimizer, "skip_nonfinite", False))
        )
        gradients = []
        for parameter in _parameters_of(optimizer):
            if parameter.grad is not None and parameter.grad.is_sparse:
                raise ConfigError("ParameterServer: gradients must be dense; use sparse=False in embeddings")
            gradients.append(parameter.grad)
        self._pending[index] = self._client.push(index, gradients, optimizer.param_groups, clipping)
        if index == 0:
            self._steps_counted += 1
        if not self._overlap:
            self._drain(index)
        if own_norm is not None and self._client.norm is not None:
            optimizer._grad_norm = self._client.norm
        if clipping.skip_nonfinite and not math.isfinite(self._client.norm):
            optimizer.skipped_steps += 1

    def _check_unwritten(self, index: int, optimizer: Optimizer) -> None:
        """What somebody wrote to the parameters would be gone with the next answer of the servers."""
        parameters = _parameters_of(optimizer)
        taken = self._taken[index]
        if len(parameters) != len(taken):
            raise ConfigError(
                "ParameterServer: the optimizer has got other parameters since the training began, of which the "
                "servers know nothing"
            )
        for number, (parameter, version) in enumerate(zip(parameters, taken, strict=True)):
            if parameter._version == version:
                continue
            # Swapped out for a while, and back: what was taken last is at hand while no push is under way.
            same = index not in self._pending and torch.equal(parameter.cpu(), self._client.parameters(index)[number])
            if not same:
                raise ConfigError(
                    "ParameterServer: between two steps somebody wrote to the parameters of the optimizer, which the "
                    "servers have and would not hear of"
                )

    def _drain(self, index: int | None = None) -> None:
        """Waits for what is under way, and takes it."""
        for table in list(self._pending) if index is None else [index]:
            if (pending := self._pending.pop(table, None)) is not None:
                self._take(table, pending.result())

    @torch.no_grad()
    def _take(self, table: int, values: Sequence[Tensor]) -> None:
        parameters = _parameters_of(self.optimizers[table])
        torch._foreach_copy_([p.detach() for p in parameters], list(values))
        self._taken[table] = [p._version for p in parameters]

    def on_validation_start(self) -> None:
        """What is validated has all that this worker has pushed."""
        self._drain()

    def on_train_end(self) -> None:
        """Waits until no worker pushes any more, and leaves all of them with what came of it."""
        self._drain()
        self._client.finish()
        # Others may have pushed since the last checkpoint.
        self._fetched = None
        self._fetch()
        if not self.is_global_zero:
            self._load_states()
        self._is_training, self._has_trained = False, True

    @property
    def communication(self) -> dict[str, float]:
        """What this worker sent and received: in all, and a step. Empty before the first step."""
        if self._steps_counted == 0:
            return {}
        sent, received = self._traffic if self._client is None else self._client.traffic
        return {
            "communication/megabytes": sent / 1e6,
            "communication/bytes_per_step": sent / self._steps_counted,
            "communication/received_megabytes": received / 1e6,
        }

    # Checkpoints.

    def _fetch(self) -> None:
        """Has what the servers have: the parameters in the module, the optimizers' state in the optimizers."""
        if self._client is None or self._fetched is not None:
            return
        self._drain()
        self._fetched = self._client.state()
        for table, (values, _, _) in enumerate(self._fetched):
            self._take(table, values)
        self._load_states()

    def _load_states(self) -> None:
        for optimizer, (_, state, seeds) in zip(self.optimizers, self._fetched or [], strict=True):
            optimizer.state.clear()
            for parameter, entry in zip(_parameters_of(optimizer), state, strict=True):
                if entry:
                    optimizer.state[parameter] = {
                        name: value.to(parameter.device) if isinstance(value, Tensor) and value.dim() else value
                        for name, value in entry.items()
                    }
            for group, seed in seeds.items():
                optimizer.param_groups[group]["rounding_seed"] = seed

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """With the servers' parameters, at worker 0 whose checkpoint it is."""
        if self._is_training and self.is_global_zero:
            self._fetch()
        return super().lightning_module_state_dict()

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Restores the groups here; the state goes to the servers when the training starts."""
        super().load_optimizer_state_dict(checkpoint)
        if self.is_global_zero:
            self._restored = [
                [dict(optimizer.state.get(p, {})) for p in _parameters_of(optimizer)] for optimizer in self.optimizers
            ]

    # Ends.

    def on_exception(self, exception: BaseException) -> None:
        """Leaves the servers to the other workers; those that were started here end."""
        if self._client is not None:
            self._client.abandon()
        self._stop(0.0)

    def teardown(self) -> None:
        """Leaves the servers."""
        self._leave()
        for optimizer in self.optimizers:
            vars(optimizer).pop("step", None)
            vars(optimizer).pop("lightkit_push", None)
        vars(self.precision_plugin).pop("clip_gradients", None)
        self._is_training = False
        self._restored = self._fetched = None
        super().teardown()

    def _leave(self) -> None:
        if self._client is not None:
            self._traffic = self._client.traffic
            self._client.leave()
            self._client = None
        self._stop(_ORDER)
        self._pending.clear()
        self._clipping.clear()
        self._taken.clear()

    def _stop(self, seconds: float) -> None:
        if self._servers is not None:
            self._servers.stop(seconds)
            self._servers = None


# A method of an optimizer, while it is trained by a parameter server.
def _step_on_servers(optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    strategy, index = optimizer.lightkit_push
    # Schedulers look whether the optimizer has stepped before them.
    optimizer._opt_called = True
    strategy.push(index, optimizer)
    return loss


def _parameters_of(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
