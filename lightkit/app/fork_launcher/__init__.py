"""``hydra/launcher=fork``: the jobs of a sweep fork from one process that has imported everything they need."""

from __future__ import annotations

from hydra.core.plugins import Plugins

# As conf/hydra/launcher/fork.yaml has it.
_TARGET = "hydra_plugins.lightkit.ForkLauncher"


def register() -> None:
    """Makes the launcher known to Hydra in this process.

    Hydra instantiates launchers by names within the package ``hydra_plugins`` alone, every module of which every
    program with Hydra imports at its start. So the class stands under such a name in Hydra's table, and in no file.
    """
    from lightkit.app.fork_launcher.launcher import ForkLauncher

    Plugins.instance().class_name_to_class[_TARGET] = ForkLauncher
