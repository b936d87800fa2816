"""Figures with sliders, the same in a live kernel and on a page that has none: see `Explorer`.

explorer = explorers.schedule_explorer(digit)
explorer.show()
"""

from .controls import ROLES, Choice, Image, Line, Panel, Slider
from .engine import Explorer
from .gamma import gamma_explorer, linear_gaussian_gamma
from .lam import lam_explorer
from .penalty import penalty_explorer
from .samples import Tilted, samples_explorer
from .schedule import schedule_explorer
from .tilt import tilt_explorer

__all__ = [
    "ROLES",
    "Choice",
    "Explorer",
    "Image",
    "Line",
    "Panel",
    "Slider",
    "Tilted",
    "gamma_explorer",
    "lam_explorer",
    "linear_gaussian_gamma",
    "penalty_explorer",
    "samples_explorer",
    "schedule_explorer",
    "tilt_explorer",
]
