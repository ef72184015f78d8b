"""Learners: inference strategies for φ on one `HierarchicalModel`. No learner knows another one, nor a task family."""

from .abml import ABML
from .base import AbstractAdapter, AbstractMetaLearner
from .bayesian_black_box import BayesianBlackBox
from .black_box import BlackBox
from .bmaml import BMAML
from .complete_pooling import CompletePooling
from .ensemble import Ensemble
from .exact import Exact
from .llama import LLAMA
from .maml import MAML
from .matching_net import MatchingNet
from .no_pooling import NoPooling
from .nuts import NUTS
from .platipus import PLATIPUS
from .proto_net import ProtoNet
from .reptile import Reptile
from .temperature_scaling import TemperatureScaling

__all__ = [
    "ABML", "BMAML", "LLAMA", "MAML", "NUTS", "PLATIPUS", "AbstractAdapter", "AbstractMetaLearner", "BayesianBlackBox", "BlackBox",
    "CompletePooling", "Ensemble", "Exact", "MatchingNet", "NoPooling", "ProtoNet", "Reptile", "TemperatureScaling",
]  # fmt: skip
