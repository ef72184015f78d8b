"""The compiler spared detours: the same strides, and all as it was afterwards."""

import platform
import sys

import pytest
import sympy
import torch
from torch._inductor import config, cpu_vec_isa, sizevars
from torch.utils._sympy.functions import FloorDiv, ModularIndexing

from bayesmeta import backends
from bayesmeta.graphs import trace
from bayesmeta.short_compiling import short_compiling

here = pytest.mark.skipif(
    not hasattr(sizevars, "simplify_index_in_vec_range"), reason="this version of torch simplifies places elsewhere, and is left alone"
)
x, y, z = sympy.symbols("x0 x1 x2", integer=True, nonnegative=True)
PLACES = [
    40000 * x + 1600 * y + 40 * z + z, 7 * x + 3, 5 * (x + 2 * y) + 10 * (x - 1), sympy.Integer(4), x * y + x, x - x,
    40 * FloorDiv(x, 16) + y, ModularIndexing(x, 1, 32) + 2 * y, FloorDiv(x, 5) * 3 + x, ModularIndexing(x + 16 * y, 16, 4),
]  # fmt: skip


@here
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_strides_are_those_of_the_simplified_place(place):
    strides = sizevars.stride_at_vec_range.__wrapped__
    for var in (x, y, z):
        wanted = strides(place, var, 16)
        with short_compiling():
            found = strides(place, var, 16)
        assert sympy.simplify(found - wanted) == 0 and found.is_number == wanted.is_number and (found == 1) == (wanted == 1)


@here
def test_sums_are_not_simplified(monkeypatch):
    seen = []
    monkeypatch.setattr(sizevars, "simplify_index_in_vec_range", lambda index, *_: seen.append(index) or index)
    with short_compiling():
        sizevars.stride_at_vec_range.__wrapped__(17 * x + 5 * y, y, 16)
        assert not seen
        sizevars.stride_at_vec_range.__wrapped__(17 * x + FloorDiv(y, 16), y, 16)
    assert seen == [17 * x + FloorDiv(y, 16)]


@pytest.mark.skipif((sys.platform, platform.machine()) != ("linux", "x86_64"), reason="elsewhere instructions are tried out")
def test_the_first_and_widest_instructions_need_no_trial(monkeypatch):
    built = []
    monkeypatch.setattr(cpu_vec_isa.VecISA, "check_build", lambda self, code: built.append(code) or True)

    class New(cpu_vec_isa.VecAVX2):
        """Nobody in this process has tried it out yet."""

        __hash__ = object.__hash__

    assert bool(New()) and built == [cpu_vec_isa.VecISA._avx_code]
    with short_compiling():
        assert bool(New())
    assert len(built) == 1


@pytest.mark.skipif((sys.platform, platform.machine()) != ("linux", "x86_64"), reason="elsewhere instructions are tried out")
def test_nor_do_they_for_the_rules_that_rewrite_a_graph(monkeypatch, compiled_anew):
    told, rewritten = [], backends.rewritten
    monkeypatch.setattr(backends, "rewritten", lambda module: told.append(config.cpp.vec_isa_ok) or rewritten(module))
    given = torch.randn(5)
    backends.inductor(trace(lambda x: [x.sin() * 0.6], [given]), [given])
    assert told == [True]


@pytest.mark.parametrize("told", [True, False])
def test_what_the_user_has_told_the_compiler_holds(told):
    with config.patch({"cpp.vec_isa_ok": told}), short_compiling():
        assert config.cpp.vec_isa_ok is told


@here
def test_all_is_as_it_was_afterwards():
    before = sizevars.simplify_index_in_vec_range, config.cpp.vec_isa_ok
    with pytest.raises(ZeroDivisionError), short_compiling():
        assert sizevars.simplify_index_in_vec_range is not before[0]
        _ = 1 / 0
    assert before == (sizevars.simplify_index_in_vec_range, config.cpp.vec_isa_ok)


def test_another_version_of_the_compiler_is_left_alone(monkeypatch):
    monkeypatch.delattr(sizevars, "simplify_index_in_vec_range", raising=False)
    with short_compiling():
        assert not hasattr(sizevars, "simplify_index_in_vec_range")
