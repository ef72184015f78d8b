"""What adaptation returns: `TaskPosterior`, a distribution over φ; `MixturePosterior`, several; `FunctionPosterior`, none over φ at all.

In order: distributions over φ (distributions.py), posteriors under one θ (single.py), posteriors made of others (composed.py).
"""

from .composed import MixturePosterior, Posterior, TemperedPosterior
from .distributions import Mixture, Particles, delta, with_points_axis
from .single import FunctionPosterior, TaskPosterior, as_inputs

__all__ = [
    "FunctionPosterior",
    "Mixture",
    "MixturePosterior",
    "Particles",
    "Posterior",
    "TaskPosterior",
    "TemperedPosterior",
    "as_inputs",
    "delta",
    "with_points_axis",
]
