"""Hydra's configuration groups, installed as ``lightkit.conf``."""
