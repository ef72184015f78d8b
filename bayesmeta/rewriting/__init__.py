"""What is done to a graph of operations before it is compiled; each rule leaves its results as they are, to rounding.

    rules               in which order, and products turned the way in which they are wanted
    sharing             what is the same for all tasks is worked out once
    sums_of_products    sums over tasks taken within the product
    products            by code of our own
    convolutions        likewise
    kernels             how the compiler is told of that code
    long_sums           without what is constant in them, in two steps
    divisions           multiplications in their place; what is slow and small once
    passes              factors and sums taken elsewhere, so that a large tensor is gone over once less
    layouts             the weights of convolutions put in the order in which they are wanted, once
    small_matrices      Cholesky's factors and solves of up to 3 × 3, written out
    overwriting         results that are put where inputs stand
    nodes               what is known of an operation of a graph
"""

from . import kernels
from .convolutions import CONVOLUTIONS, OURS
from .divisions import ONCE
from .nodes import is_view
from .overwriting import overwrite, overwritten
from .products import PRODUCT
from .rules import rewritten

LOWERED = (PRODUCT, *OURS, ONCE)  # operations of our own, of which the compiler is told how they are done
__all__ = ["CONVOLUTIONS", "LOWERED", "is_view", "kernels", "overwrite", "overwritten", "rewritten"]
