"""Pictures of molecules, and plots of their metrics.

Figures are made with ``matplotlib.figure.Figure`` and never with pyplot, so that drawing opens no window, changes no
global state and works in any thread. Matplotlib is imported inside the functions that draw.
"""

from __future__ import annotations

from ase_enf.plot.animation import animate as animate
from ase_enf.plot.animation import check_animation as check_animation
from ase_enf.plot.curves import learning_curve as learning_curve
from ase_enf.plot.distances import distance_histogram as distance_histogram
from ase_enf.plot.molecules import broadside as broadside
from ase_enf.plot.molecules import draw as draw
from ase_enf.plot.molecules import gallery as gallery
from ase_enf.plot.overview import evaluation as evaluation

__all__ = [
    "animate",
    "broadside",
    "check_animation",
    "distance_histogram",
    "draw",
    "evaluation",
    "gallery",
    "learning_curve",
]
