"""Private functions and classes of Lightning's strategies."""

from __future__ import annotations

from lightning.pytorch.overrides.distributed import _register_ddp_comm_hook as register_ddp_comm_hook
from lightning.pytorch.overrides.distributed import _sync_module_states as sync_module_states
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher as SubprocessScriptLauncher

__all__ = ["SubprocessScriptLauncher", "register_ddp_comm_hook", "sync_module_states"]
