"""What a run writes is whole at any time, and what is no file is not replaced by one."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from lightkit import files, results
from lightkit.files import hold, is_held_by_another, release, remove_leftovers, write_atomically
from lightkit.prediction.images import Images, Picture
from lightkit.report import figures
