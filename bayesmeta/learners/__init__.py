"""Learners: inference strategies for φ, one file each, all on the same `bayesmeta.HierarchicalModel`."""

from .abml import ABML
from .base import AbstractAdapter, AbstractMetaLearner
from .complete_pooling import CompletePooling
from .exact import Exact
from .maml import MAML
from .no_pooling import NoPooling
from .nuts import NUTS

__all__ = ["ABML", "MAML", "NUTS", "AbstractAdapter", "AbstractMetaLearner", "CompletePooling", "Exact", "NoPooling"]
