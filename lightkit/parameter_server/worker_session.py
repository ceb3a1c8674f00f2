"""A server's session with one worker: requests and replies over one connection, in a thread of the session."""

from __future__ import annotations

import contextlib
import logging

from lightkit.errors import LightkitError
from lightkit.parameter_server.aggregation import Push
from lightkit.parameter_server.available_memory import check_memory
from lightkit.parameter_server.durable_state import WorkerState
from lightkit.parameter_server.mask_update import MaskUpdate
from lightkit.parameter_server.protocol import JoinRequest, Reply, Request
from lightkit.parameter_server.push_buffers import PushBuffers
from lightkit.parameter_server.training import Training
from lightkit.parameter_server.transport import (
    Connection,
    ProtocolError,
    SilenceError,
    TransportError,
    heartbeat_interval,
)

_log = logging.getLogger(__name__)

# Seconds for a refused worker to read the reason.
_REFUSAL_GRACE = 1.0


class WorkerSession:
    """A server's session with one worker.

    Args:
        training: the training, shared by all sessions.
        connection: the connection of the worker.
    """

    def __init__(self, training: Training, connection: Connection) -> None:
        self._training, self._connection = training, connection
        self._rank = -1
        self._buffers: dict[int, PushBuffers] = {}
        # By the index of the optimizer. The worker sends them anew until a reply has their number.
        self._masks: dict[int, MaskUpdate] = {}

    def run(self) -> None:
        """Replies to the requests of the worker until the worker leaves or fails.

        The method raises no exception: it logs errors and sends them to the worker.
        """
        connection, training = self._connection, self._training
        worker: WorkerState | None = None
        try:
            request = JoinRequest.from_message(connection.receive_message())
            self._rank = request.rank
            connection.heartbeat_interval = heartbeat_interval(min(training.timeout, request.timeout))
            worker, has_begun = training.join(connection, request)
            connection.send_header(Reply.OK)
            connection.send_message({"begun": has_begun, "pushes": worker.pushes, "timeout": training.timeout})
            while self._reply(request, worker):
                pass
        except ProtocolError as error:
            _log.warning("worker %d is refused: %s", self._rank, error)
            self._refuse(error)
        except SilenceError:
            if worker is not None and not worker.left:
                _log.warning(
                    "worker %d sent no heartbeat for %g s: continuing without it", self._rank, training.timeout
                )
        except TransportError as error:
            if worker is not None and not worker.finished:
                _log.warning("worker %d is gone: %s", self._rank, error)
        except Exception as error:
            # The worker receives the reason of every error, also of an error in the optimizer.
            if not isinstance(error, LightkitError):
                _log.exception("a request of worker %d", self._rank)
            self._refuse(error)
        finally:
            training.remove(self._rank, connection)

    def _refuse(self, error: Exception) -> None:
        self._training.remove(self._rank, self._connection)
        with contextlib.suppress(TransportError):
            self._connection.send_header(Reply.REFUSED)
            self._connection.send_message({"error": str(error) or type(error).__name__})
            # The worker may still be sending, and reads the reason afterwards.
            self._connection.release(_REFUSAL_GRACE)

    def _reply(self, join_request: JoinRequest, worker: WorkerState) -> bool:
        """Replies to the next request of the worker; returns False after `Request.LEAVE`.

        Args:
            join_request: the first message of the worker.
            worker: the state of the worker.
        """
        connection, training = self._connection, self._training
        request, optimizer_index, push_seq, version = connection.receive_header()
        training.members.check_current(connection, self._rank)
        if request == Request.BEGIN:
            training.begin(connection, join_request, worker)
            connection.send_header(Reply.OK)
            return True
        if training.state.spec is None:
            raise ProtocolError("the training has not begun")
        if request in (Request.PUSH, Request.PULL):
            buffers = self._buffers_for(optimizer_index)
            if request == Request.PUSH:
                if worker.finished:
                    raise ProtocolError("a push came from a worker that had said that it pushes no more")
                buffers.receive(connection)
                masks = self._masks.pop(optimizer_index, None)
                self._push(Push(connection, self._rank, worker, optimizer_index, push_seq, version, buffers, masks))
            self._send_parameters(optimizer_index, buffers)
        elif request == Request.MASK:
            self._receive_masks(optimizer_index, push_seq)
        elif request == Request.STATE:
            self._send_state()
        elif request == Request.FINISH:
            training.finish(connection, self._rank, worker)
            connection.send_header(Reply.OK)
        elif request == Request.LEAVE:
            with training.changed:
                # A worker that leaves before it has finished is lost, and does not end the training.
                worker.left = worker.finished
        else:
            raise ProtocolError(f"there is no request {request}")
        return request != Request.LEAVE

    def _buffers_for(self, optimizer_index: int) -> PushBuffers:
        state = self._training.state
        assert state.spec is not None
        if not 0 <= optimizer_index < len(state.shards):
            raise ProtocolError(f"there is no optimizer {optimizer_index}")
        if optimizer_index not in self._buffers:
            # Three times the bytes of the shard: the gradient, its compressed form, and the reply.
            check_memory(3 * state.spec.nbytes)
            hyperparameters = state.shards[optimizer_index].count_hyperparameters()
            self._buffers[optimizer_index] = PushBuffers(state.spec, optimizer_index, hyperparameters)
        return self._buffers[optimizer_index]

    def _push(self, push: Push) -> None:
        training = self._training
        spec = training.state.spec
        assert spec is not None
        if spec.mode == "sync":
            training.aggregator.step_together(push)
        else:
            training.aggregator.step_alone(push, spec.staleness if spec.mode == "bounded" else None)

    def _receive_masks(self, optimizer_index: int, number: int) -> None:
        spec = self._training.state.spec
        assert spec is not None
        if not 0 <= optimizer_index < len(spec.optimizers):
            raise ProtocolError(f"there is no optimizer {optimizer_index}")
        packed = self._connection.receive_message(spec.nbytes)
        try:
            masks = MaskUpdate(number, packed).check(spec.optimizers[optimizer_index].parameters)
        except ValueError as error:
            raise ProtocolError(str(error)) from None
        self._masks[optimizer_index] = masks

    def _send_parameters(self, optimizer_index: int, buffers: PushBuffers) -> None:
        training = self._training
        with training.changed:
            for copy, flat in zip(buffers.reply, training.state.shards[optimizer_index].flats, strict=True):
                copy.copy_(flat)
            version = training.state.versions[optimizer_index]
            mask_number = training.state.shards[optimizer_index].masks.number
        self._connection.send_header(Reply.OK, version, mask_number)
        self._connection.send(*buffers.reply)

    def _send_state(self) -> None:
        training, state = self._training, self._training.state
        assert state.spec is not None
        check_memory(2 * state.spec.nbytes)
        with training.changed:
            found = [
                {**shard.snapshot(), "version": version}
                for shard, version in zip(state.shards, state.versions, strict=True)
            ]
        self._connection.send_header(Reply.OK)
        self._connection.send_message(found)
