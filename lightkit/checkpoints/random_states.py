"""States of torch's random generators in a checkpoint: with them a resumed training draws what it would have drawn.

Lightning saves no such states, so that dropout after a resumption repeats the numbers of the first steps.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

# The key of the states in a checkpoint.
RANDOM_STATES_KEY = "random_states"


def random_states(device: torch.device) -> dict[str, Tensor]:
    """Returns the states of torch's generators of the CPU and of ``device``, by the type of the device.

    The states are uint8 tensors ``(B)`` on the CPU. Of other devices than CPU and CUDA there is no state.
    """
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(states: Any, device: torch.device) -> None:
    """Sets torch's generators to the states in a checkpoint, which may come from an untrusted source.

    The function warns of a state that the present torch does not accept, and leaves that generator as it is.

    Args:
        states: the result of `random_states` of an earlier process.
        device: the device of the training.
    """
    saved = states if type(states) is dict else {"cpu": None}
    for kind, own in random_states(device).items():
        if kind not in saved:
            continue
        state = saved[kind]
        try:
            if type(state) is not Tensor or state.dtype != torch.uint8 or state.shape != own.shape:
                raise ValueError(f"expected {len(own)} bytes")
            if kind == "cuda":
                torch.cuda.set_rng_state(state, device)
            else:
                torch.set_rng_state(state)
        except (RuntimeError, ValueError) as error:
            rank_zero_warn(
                f"the checkpoint has no random state for {kind} that this torch takes ({error}): new numbers"
            )
