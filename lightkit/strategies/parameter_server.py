"""Training with parameter servers: optimizers step on servers, workers push gradients and pull parameters."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only as fabric_rank_zero_only
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightkit._lightning.strategies import SubprocessScriptLauncher
from lightkit._util.deprecated import RenamedAttribute
from lightkit._util.strategy_traits import StrategyTraits
from lightkit.errors import ConfigError
from lightkit.parameter_server import Client, OptimizerSpec, TrainingSpec
from lightkit.parameter_server.local_servers import LocalServers
from lightkit.parameter_server.rendezvous import SECRET_VARIABLE, split_address
from lightkit.strategies.remote_optimizers import RemoteOptimizers, parameters_of
from lightkit.strategies.worker_rendezvous import WorkerRendezvous

# Seconds for servers to end by themselves after the training.
_SHUTDOWN_TIMEOUT = 10.0


class ParameterServer(ParallelStrategy):
    """Keeps parameters and optimizers on servers, to which the workers send their gradients [1]_.

    A worker is a process of the Trainer. Each worker trains on its shard of the training data. Instead of a step it
    pushes the gradient, and continues with the parameters that come back. The servers step the optimizer, whose class
    must be one that a configuration may build; schedulers and hooks stay with the workers.

    Workers wait for each other in ``sync`` and ``bounded`` steps, at the beginning and at the end of the training, and
    nowhere else. So each worker validates on the whole validation set, and decides by itself to stop early; worker 0
    logs and saves. An ordinary checkpoint has the parameters and the optimizer states of the servers.
    Running statistics and other buffers are each worker's own; a checkpoint has those of worker 0.

    A worker may end at any time, and another one may take its place: the servers continue without it, and the
    replacement begins with the current parameters. A restarted server recovers from a snapshot and a log: each push
    that a worker has a reply for counts, and counts once. Where the Trainer starts the processes itself, worker 0 also
    starts the servers, and restarts them. Elsewhere they are ``python -m lightkit.parameter_server`` on any host.

    Gradient clipping by norm uses the norm of the mean gradient in ``sync``, as in data parallel training, and else
    the norm of each worker's gradient; the same holds for ``max_grad_norm`` and ``skip_nonfinite`` of lightkit's
    optimizers.

    Args:
        mode: ``sync``, ``async`` or ``bounded``: see `lightkit.parameter_server.TrainingSpec`.
        staleness: the largest number of pushes that a worker may be ahead of the slowest worker in ``bounded``.
        compression: the compression of pushes: ``none``, ``bf16`` or ``topk``.
        fraction: the fraction of the gradient's elements that ``topk`` sends.
        overlap: True computes the next batch while a push is under way, with parameters that are older by one step of
            this worker. Default: True in ``async`` and ``bounded``; ``sync`` does not allow True.
        servers: the number of servers that worker 0 starts; it has no effect with ``addresses``.
        snapshot_every: the number of updates from one snapshot of a server to the next; with 0 there are no snapshots,
            and the end of a server ends the job.
        directory: the directory of snapshots and logs of the servers that worker 0 starts. Default: a directory below
            the Trainer's ``default_root_dir``.
        addresses: the addresses ``HOST:PORT`` of running servers: a list, or a string with commas. The environment
            variable ``LIGHTKIT_SECRET`` has the secret of the servers. None makes worker 0 start servers.
        worker: the rank of this process, if the processes are started one by one; goes with ``workers`` and
            ``addresses``. None takes the rank from the Trainer's environment.
        workers: the number of processes that are started one by one, which share the training data.
        timeout: the seconds without a heartbeat after which a worker or a server counts as gone; it must be longer than
            a push takes.
        **options: arguments of Lightning's ``ParallelStrategy``.

    Raises:
        ConfigError: an argument is out of range, or arguments exclude each other; at the start of a training, a feature
            is not supported (``16-mixed``, ``LBFGS``, a parameter of two optimizers), or a server refuses the worker.

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
        # Checks the values here, before the first step.
        self._spec = TrainingSpec([], 1, mode, staleness, compression, fraction, snapshot_every)
        if overlap and mode == "sync":
            raise ConfigError("overlap=True: in mode sync a worker needs the parameters of the step before it goes on")
        if not isinstance(servers, int) or isinstance(servers, bool) or servers < 1:
            raise ConfigError(f"servers must be a whole number, at least 1, got {servers!r}")
        if not timeout > 0:
            raise ConfigError(f"timeout must be a number of seconds above 0, got {timeout!r}")
        if (worker is None) != (workers is None) or (worker is not None and addresses is None):
            raise ConfigError("worker, workers and addresses belong together: give all three of them")
        if worker is not None and workers is not None and not 0 <= worker < workers:
            raise ConfigError(f"worker must be from 0 to workers - 1, got worker={worker}, workers={workers}")
        if isinstance(addresses, str):
            addresses = addresses.split(",")
        for address in addresses or ():
            split_address(address)
        self._addresses = None if addresses is None else list(addresses)
        self._server_count, self._directory = servers, directory
        self._worker, self._workers = worker, workers
        self._timeout = timeout
        self._num_nodes = 1
        self._rendezvous: WorkerRendezvous | None = None
        # During the training the workers agree on nothing: see `broadcast`.
        self._is_training = False
        self._has_trained = False
        self._local_servers: LocalServers | None = None
        self._remote = RemoteOptimizers(overlap=mode != "sync" if overlap is None else overlap)

    # Processes.

    @property
    def num_nodes(self) -> int:
        """The number of machines with workers of this Trainer."""
        return self._num_nodes

    @num_nodes.setter
    def num_nodes(self, num_nodes: int) -> None:
        self._num_nodes = num_nodes

    @property
    def num_processes(self) -> int:
        """The number of workers on this machine."""
        return len(self.parallel_devices) if self.parallel_devices is not None else 0

    @property
    def is_distributed(self) -> bool:
        """True: Lightning shards the samples of a DataLoader by `distributed_sampler_kwargs`."""
        return True

    @property
    def root_device(self) -> torch.device:
        """The device of this worker."""
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def global_rank(self) -> int:
        """The rank of this worker."""
        return super().global_rank if self._worker is None else self._worker

    @property
    def world_size(self) -> int:
        """The number of workers that begin the job."""
        return super().world_size if self._workers is None else self._workers

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        """The arguments that select this worker's samples: a shard for training, all samples for evaluation."""
        if self.lightning_module is not None and not self.lightning_module.trainer.training:
            return {"num_replicas": 1, "rank": 0}
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def _configure_launcher(self) -> None:
        if self._worker is None:
            assert self.cluster_environment is not None
            self._launcher = SubprocessScriptLauncher(self.cluster_environment, self.num_processes, self.num_nodes)
        elif self.num_processes * self.num_nodes != 1:
            raise ConfigError(f"worker={self._worker} is one process: set the Trainer's devices and num_nodes to 1")

    def setup_environment(self) -> None:
        """Sets the ranks, and opens the rendezvous of the workers."""
        super().setup_environment()
        assert self.lightning_module is not None
        if self.lightning_module.trainer.state.fn == TrainerFn.FITTING:
            self._has_trained = False
        reset_seed()
        self.set_world_ranks()
        if self._worker is None and self.world_size > 1 and self._rendezvous is None:
            assert self.cluster_environment is not None
            self._rendezvous = WorkerRendezvous(self.cluster_environment, self.global_rank, self.world_size)

    def set_world_ranks(self) -> None:
        """Sets the rank of this worker; the Trainer calls this once it has made the strategy."""
        if self._worker is None and self.cluster_environment is not None:
            self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        for function in (rank_zero_only, fabric_rank_zero_only):
            vars(function)["rank"] = self.global_rank

    def barrier(self, name: str | None = None) -> None:
        """Waits for all workers before the training, for worker 0 after it, and for none during it."""
        if self._rendezvous is None or self._is_training:
            return
        if self._has_trained:
            self._rendezvous.wait_for(0)
        else:
            self._rendezvous.wait_for_all()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Returns the ``obj`` of worker ``src``, and during the training the ``obj`` of this worker.

        Raises:
            ConfigError: ``obj`` does not consist of JSON's types and paths.
        """
        if self._rendezvous is None or self._is_training:
            return obj
        return self._rendezvous.broadcast(obj, src)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Returns this worker's tensor: workers do not synchronize."""
        return tensor

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Returns this worker's tensor: workers do not synchronize."""
        return tensor

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Returns this worker's decision: workers do not synchronize."""
        return decision

    # The model.

    def model_to_device(self) -> None:
        """Moves the model to the device of this worker."""
        assert self.model is not None
        self.model.to(self.root_device)

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        """Makes the optimizers, and replaces their steps by pushes.

        Raises:
            ConfigError: the Trainer has a callback, a precision or an optimizer that is not supported.
        """
        super().setup_optimizers(trainer)
        if self._layer_sync is not None:
            raise ConfigError("ParameterServer: sync_batchnorm makes the workers wait for each other; turn it off")
        for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
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
        self._remote.attach(self.optimizers)

    @contextlib.contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Does nothing: a backward pass sends nothing."""
        yield

    # Training.

    def on_train_start(self) -> None:
        """Joins the servers; worker 0 begins the training with its parameters and the states of a checkpoint.

        Raises:
            ConfigError: an optimizer has a parameter that is not the module's or is another optimizer's, or the servers
                are in the middle of a training and worker 0 has a checkpoint.
            LightkitError: a server cannot be reached, or refuses this worker.
        """
        optimizers = self._specify_optimizers()
        # A training within this one, such as a search for a learning rate, has left its client and servers.
        self._leave()
        addresses, secret = self._find_servers()
        spec = TrainingSpec(
            optimizers,
            self.world_size,
            self._spec.mode,
            self._spec.staleness,
            self._spec.compression,
            self._spec.fraction,
            self._spec.snapshot_every,
        )
        has_begun = self._remote.start(Client(addresses, secret, self.global_rank, spec, self._timeout))
        if not has_begun and self.is_global_zero:
            if self._remote.has_restored_states:
                raise ConfigError(
                    f"the parameter servers at {', '.join(addresses)} are in the middle of a training already, and "
                    "would continue that instead of the checkpoint: start them anew, with empty "
                    "directories"
                )
            rank_zero_warn(
                f"the parameter servers at {', '.join(addresses)} are in the middle of a training: continuing with the "
                "parameters that they have"
            )
        self._remote.pull()
        # Lightning clips by the precision plugin.
        vars(self.precision_plugin)["clip_gradients"] = self._remote.clip_gradients
        self._is_training = True

    def _specify_optimizers(self) -> list[OptimizerSpec]:
        assert self.lightning_module is not None
        names: dict[Tensor, str] = {p: name for name, p in self.lightning_module.named_parameters()}
        seen: set[Tensor] = set()
        for parameter in (p for optimizer in self.optimizers for p in parameters_of(optimizer)):
            if parameter not in names:
                raise ConfigError("ParameterServer: an optimizer has a parameter that is not the module's")
            if parameter in seen:
                raise ConfigError(f"ParameterServer: {names[parameter]} is a parameter of two optimizers")
            seen.add(parameter)
        return [OptimizerSpec.from_optimizer(optimizer, names) for optimizer in self.optimizers]

    def _find_servers(self) -> tuple[list[str], str]:
        """Returns the addresses of the servers and their secret; worker 0 starts servers if no address is given."""
        own_secret = os.environ.get(SECRET_VARIABLE, "")
        if self._addresses is not None:
            if not own_secret:
                raise ConfigError(f"addresses need the servers' secret in the environment: {SECRET_VARIABLE}")
            return self._addresses, own_secret
        if self.num_nodes > 1 and not own_secret:
            raise ConfigError(
                f"a parameter server that other machines reach needs a secret in the environment of all: "
                f"{SECRET_VARIABLE}"
            )
        found = None
        if self.is_global_zero:
            secret = own_secret or secrets.token_hex(16)
            host = "127.0.0.1"
            if self.num_nodes > 1 and self.cluster_environment is not None:
                host = self.cluster_environment.main_address
            self._local_servers = LocalServers(
                self._server_count, secret, self._snapshot_directory(), host, self._timeout
            )
            # Anyone can read the store: a chosen secret is not broadcast. A random one is for servers that only this
            # machine reaches.
            found = [self._local_servers.addresses, "" if own_secret else secret]
        addresses, secret = self.broadcast(found)
        return addresses, secret or own_secret

    def _snapshot_directory(self) -> Path | None:
        if not self._spec.snapshot_every:
            return None
        assert self.lightning_module is not None
        root = self._directory or Path(self.lightning_module.trainer.default_root_dir) / "parameter_servers"
        # A new directory: the servers must not recover from the files of an earlier run.
        return Path(root) / secrets.token_hex(4)

    def push(self, index: int, optimizer: Optimizer) -> None:
        """Pushes the gradients of an optimizer's parameters, and copies the parameters that come back.

        Args:
            index: the index of the optimizer.
            optimizer: the optimizer.

        Raises:
            ConfigError: the training has not begun, the parameters were written to, or a gradient is sparse.
            LightkitError: a server is gone.
        """
        self._remote.push(index, optimizer)

    def set_masks(self, masks: Mapping[Tensor, Tensor], number: int) -> None:
        """Makes the servers keep masked entries at zero, from the update with this worker's next push on.

        Args:
            masks: for each masked parameter a bool tensor of its shape, False where an entry stays zero.
            number: see `lightkit.parameter_server.Client.set_masks`; 0 for no masks.
        """
        self._remote.set_masks(masks, number)

    @property
    def mask_number(self) -> int:
        """The number of the masks of the parameters that this worker has; 0 without masks."""
        return self._remote.mask_number

    def fetch_masks(self) -> dict[Tensor, Tensor]:
        """Returns the servers' masks by parameter."""
        return self._remote.fetch_masks()

    def on_validation_start(self) -> None:
        """Waits for the pending pushes, so that the validated parameters include them; fetches the averages if any."""
        if any(group.get("ema_decay") is not None for optimizer in self.optimizers for group in optimizer.param_groups):
            self._remote.fetch()
        else:
            self._remote.drain()

    def on_train_end(self) -> None:
        """Waits until no worker pushes any more, and copies the final parameters and optimizer states."""
        self._remote.finish()
        self._is_training, self._has_trained = False, True

    @property
    def communication(self) -> dict[str, float]:
        """The megabytes sent and received, and the bytes sent for each step, by name; empty before the first step."""
        if self._remote.steps == 0:
            return {}
        sent, received = self._remote.traffic
        return {
            "communication/megabytes": sent / 1e6,
            "communication/bytes_per_step": sent / self._remote.steps,
            "communication/received_megabytes": received / 1e6,
        }

    # Checkpoints.

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Returns the state dict of the module; worker 0, which saves it, copies the servers' parameters before."""
        if self._is_training and self.is_global_zero:
            self._remote.fetch()
        return super().lightning_module_state_dict()

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Restores the optimizers; the servers get their states when the training starts."""
        super().load_optimizer_state_dict(checkpoint)
        if self.is_global_zero:
            self._remote.restore_states()

    # Ends.

    def on_exception(self, exception: BaseException) -> None:
        """Abandons the servers, which continue with the other workers, and stops those that were started here."""
        self._remote.abandon()
        self._stop_local_servers(0.0)

    def teardown(self) -> None:
        """Leaves the servers, and restores the optimizers and the precision plugin."""
        self._leave()
        self._remote.detach()
        vars(self.precision_plugin).pop("clip_gradients", None)
        self._is_training = False
        super().teardown()

    def _leave(self) -> None:
        self._remote.leave()
        self._stop_local_servers(_SHUTDOWN_TIMEOUT)

    def _stop_local_servers(self, seconds: float) -> None:
        if self._local_servers is not None:
            self._local_servers.stop(seconds)
            self._local_servers = None
