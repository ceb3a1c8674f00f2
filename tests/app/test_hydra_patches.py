"""The patches of Hydra give the same results as Hydra."""

from __future__ import annotations

from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType

from lightkit.app import hydra_patches


def test_groups_are_what_hydra_lists():
    """The patched method lists the same choices as Hydra's method."""
    with initialize_config_module("lightkit.conf", version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        for group in ("", "data", "hydra", "hydra/launcher", "nothing"):
            for kind in (ObjectType.CONFIG, ObjectType.GROUP, None):
                listed = hydra_patches._get_group_options_uncopied(loader, group, kind)
                assert listed == hydra_patches._get_group_options(loader, group, kind)
        assert "mnist_5k" in hydra_patches._get_group_options_uncopied(loader, "data")
