"""matplotlib, as all that draws imports it."""

import os

try:
    import matplotlib
except ValueError:  # MPLBACKEND names another environment's backend, such as a notebook's; we do not need one
    del os.environ["MPLBACKEND"]
    import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

__all__ = ["Axes", "Figure", "MaxNLocator", "Patch", "matplotlib"]
