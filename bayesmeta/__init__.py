"""bayesmeta: one hierarchical Bayesian model, every meta-learner an inference strategy on it, calibration side by side.

A model is a Pyro program with a ``tasks`` plate and an observed site ``y`` (`HierarchicalModel`), or a network
(`HierarchicalModel.from_network`). Learners (`bayesmeta.learners`) infer its task parameters; `meta_train` learns θ;
`evaluate` scores them on the same held-out tasks.
"""

__version__ = "0.1.0"

from . import learners, likelihoods, metrics, networks, plots, tasks
from .checkpoints import CheckpointError
from .comparison import compare
from .compiled import Compiled
from .episodes import Episode, Points
from .evaluation import evaluate
from .full_bayes import sample_theta
from .learners.base import AbstractAdapter, AbstractMetaLearner
from .meta_gradient import TrainingError
from .model import HierarchicalModel
from .posteriors import FunctionPosterior, MixturePosterior, Particles, TaskPosterior, TemperedPosterior
from .predictive import Predictive
from .report import Report
from .robustness import out_of_episode, under_shift
from .survey import ModelError
from .tasks import TaskFamily
from .training import meta_train
from .training_run import History

__all__ = [
    "AbstractAdapter",
    "AbstractMetaLearner",
    "CheckpointError",
    "Compiled",
    "Episode",
    "FunctionPosterior",
    "HierarchicalModel",
    "History",
    "MixturePosterior",
    "ModelError",
    "Particles",
    "Points",
    "Predictive",
    "Report",
    "TaskFamily",
    "TaskPosterior",
    "TemperedPosterior",
    "TrainingError",
    "compare",
    "evaluate",
    "learners",
    "likelihoods",
    "meta_train",
    "metrics",
    "networks",
    "out_of_episode",
    "plots",
    "sample_theta",
    "tasks",
    "under_shift",
]
