"""Figures with sliders, the same in a live kernel and on a page that has none: see `Explorer`.

explorer = explorers.schedule_explorer(digit)
explorer.show()
"""

from .controls import ROLES, Choice, Image, Line, Panel, Slider
from .engine import Explorer
from .gamma import gamma_explorer, linear_gaussian_gamma
from .grid import grid_explorer
from .lam import lam_explorer
from .penalty import penalty_explorer
from .pull import Pulled, pull_explorer
from .samples import Tilted, samples_explorer
from .schedule import schedule_explorer
from .tilt import tilt_explorer
from .worker import LiveExplorer, Pack

__all__ = [
    "ROLES",
    "Choice",
    "Explorer",
    "Image",
    "Line",
    "LiveExplorer",
    "Pack",
    "Panel",
    "Pulled",
    "Slider",
    "Tilted",
    "gamma_explorer",
    "grid_explorer",
    "lam_explorer",
    "linear_gaussian_gamma",
    "penalty_explorer",
    "pull_explorer",
    "samples_explorer",
    "schedule_explorer",
    "tilt_explorer",
]
