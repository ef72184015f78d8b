"""`rng`: the global stream is the generator's inside, and the caller's again outside, whatever happens."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from bayesmeta import HierarchicalModel, meta_train
from bayesmeta.learners import ABML
from bayesmeta.randomness import rng
from bayesmeta.tasks import Sinusoid

from .conftest import episode, radon_program


def generator(seed=5):
    return torch.Generator().manual_seed(seed)


def test_inside_the_stream_is_the_generators():
    wanted = torch.randn(7, generator=generator())
    with rng(generator()):
        torch.testing.assert_close(torch.randn(7), wanted, rtol=0, atol=0)
    with rng(generator()):
        torch.testing.assert_close(dist.Normal(torch.zeros(7), 1.0).sample(), wanted, rtol=0, atol=0)
    with rng(generator()):
        torch.testing.assert_close(pyro.sample("x", dist.Normal(torch.zeros(7), 1.0)), wanted, rtol=0, atol=0)


def test_the_callers_stream_is_put_back_and_the_generator_has_moved_on():
    before, moving = torch.get_rng_state(), generator()
    with rng(moving):
        first = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    with rng(moving):
        second = torch.rand(3)
    straight = generator()
    torch.testing.assert_close(torch.cat([first, second]), torch.cat([torch.rand(3, generator=straight) for _ in range(2)]), rtol=0, atol=0)
    assert torch.equal(moving.get_state(), straight.get_state())


def test_without_a_generator_the_callers_stream_is_replayed():
    torch.manual_seed(3)
    with rng():
        first = torch.rand(3)
    with rng():
        again = torch.rand(3)
    assert torch.equal(first, again)
    assert torch.equal(torch.rand(3), first)  # the caller draws what was replayed
    with rng():
        assert not torch.equal(torch.rand(3), first)


@pytest.mark.parametrize("value", [3, True, torch.Generator, "cpu"])
def test_what_is_no_generator_is_refused_everywhere(value):
    e = episode()
    learner = ABML(HierarchicalModel(radon_program, e))
    q, before = learner.adapt(e.support), torch.get_rng_state()
    for call in (
        lambda: learner.adapt(e.support, generator=value), lambda: learner.meta_loss(e, generator=value),
        lambda: q.draws(3, generator=value), lambda: q.sites(3, generator=value), lambda: q.predict(e.query.filled().x, generator=value),
        lambda: q.predict(e.query.filled().x).sample(generator=value), lambda: meta_train(learner, e, steps=1, generator=value),
        lambda: Sinusoid().sample(3, generator=value),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=r"generator: expected a torch\.Generator.*, got "):
            call()
    assert torch.equal(torch.get_rng_state(), before)


def test_blocks_inside_each_other_do_not_touch():
    outer, inner = generator(1), generator(2)
    with rng(outer):
        first = torch.rand(2)
        with rng(inner):
            other = torch.rand(2)
        with rng():
            replayed = torch.rand(2)
        second = torch.rand(2)
    straight = generator(1)
    assert torch.equal(first, torch.rand(2, generator=straight))
    assert torch.equal(second, torch.rand(2, generator=straight))
    assert torch.equal(replayed, second)
    assert torch.equal(other, torch.rand(2, generator=generator(2)))


@pytest.mark.parametrize("seed", [None, 5])
def test_an_error_puts_everything_back_too(seed):
    before, given = torch.get_rng_state(), None if seed is None else generator(seed)
    with pytest.raises(KeyError), rng(given):
        torch.rand(3)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)
    if given is not None:
        assert torch.equal(torch.rand(1, generator=given), torch.rand(4, generator=generator(seed))[3:])


def test_a_seed_set_inside_does_not_leak():
    before = torch.get_rng_state()
    with rng(generator()):
        torch.manual_seed(0)
        pyro.set_rng_seed(1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_generator_elsewhere_is_refused_and_nothing_moves():
    class Elsewhere(torch.Generator):
        device = torch.device("cuda")

    before = torch.get_rng_state()
    with pytest.raises(TypeError, match=r"expected one on the CPU .*got one on cuda"), rng(Elsewhere()):
        pass
    assert torch.equal(torch.get_rng_state(), before)
