"""Families of tasks: what a learner is trained on and shown. They know no learner and no model."""

from bayesmeta.tasks.base import TaskFamily
from bayesmeta.tasks.circles import Circles
from bayesmeta.tasks.few_shot import FewShot
from bayesmeta.tasks.gaussian_process import GaussianProcess
from bayesmeta.tasks.glyphs import Glyphs
from bayesmeta.tasks.image_tasks import AbstractFewShot, Detection
from bayesmeta.tasks.linear_gaussian import LinearGaussian
from bayesmeta.tasks.omniglot import Omniglot
from bayesmeta.tasks.panel import Panel
from bayesmeta.tasks.shift import SHIFTS, Shifted, shifted
from bayesmeta.tasks.sine_or_line import SineOrLine
from bayesmeta.tasks.sinusoid import Sinusoid

__all__ = [
    "SHIFTS",
    "AbstractFewShot",
    "Circles",
    "Detection",
    "FewShot",
    "GaussianProcess",
    "Glyphs",
    "LinearGaussian",
    "Omniglot",
    "Panel",
    "Shifted",
    "SineOrLine",
    "Sinusoid",
    "TaskFamily",
    "shifted",
]
