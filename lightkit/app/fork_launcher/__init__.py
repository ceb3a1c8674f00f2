"""``hydra/launcher=fork``: a launcher that forks the jobs of a sweep from one process with all imports done."""

from __future__ import annotations

from hydra.core.plugins import Plugins

# The same name as in conf/hydra/launcher/fork.yaml.
_TARGET = "hydra_plugins.lightkit.ForkLauncher"


def register() -> None:
    """Registers the launcher with Hydra in this process.

    Hydra accepts launchers from the package ``hydra_plugins`` alone, and every program with Hydra imports all modules
    of that package at its start. The function instead registers the class in Hydra's table under a name in that
    package, without a file there.
    """
    from lightkit.app.fork_launcher.launcher import ForkLauncher

    Plugins.instance().class_name_to_class[_TARGET] = ForkLauncher
