"""Shared models and data of the tests."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from bayesmeta import Episode, HierarchicalModel, Points, backends


@pytest.fixture(autouse=True)
def _clean_slate():
    """Every test starts from the same random state and the default dtype, and leaves Pyro's store empty."""
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
    pyro.clear_param_store()


@pytest.fixture
def float64():
    """Default dtype float64, for closed forms."""
    torch.set_default_dtype(torch.float64)


@pytest.fixture
def compiled_anew(monkeypatch):
    """No graph comes from the disk as a library, past what a test looks at or has changed in the compiler."""
    monkeypatch.setattr(backends, "saved", lambda module, inputs, compiling: compiling())


def linear_program(points):
    """y = w · x + noise with w ~ N(mean, sd²): the log joint is quadratic in w."""
    dim = points.x.shape[-1]
    mean = pyro.param("mean", torch.linspace(1.0, -0.5, dim))
    sd = pyro.param("sd", torch.linspace(0.8, 1.3, dim), constraint=dist.constraints.positive)
    noise = pyro.param("noise", torch.tensor(0.7), constraint=dist.constraints.positive)
    with pyro.plate("tasks", points.num_tasks):
        w = pyro.sample("w", dist.Normal(mean, sd).to_event(1))
        y_hat = (w[..., None, :] * points.x).sum(-1)
        pyro.sample("y", dist.Normal(y_hat, noise).mask(points.mask).to_event(1), obs=points.y)


def radon_program(points):
    """The program of the README."""
    mean = pyro.param("mean", torch.tensor([1.0, -0.5]))
    sd = pyro.param("sd", torch.ones(2), constraint=dist.constraints.positive)
    noise = pyro.param("noise", torch.tensor(1.0), constraint=dist.constraints.positive)
    with pyro.plate("tasks", points.num_tasks):
        level = pyro.sample("level", dist.Normal(mean[0], sd[0]))
        effect = pyro.sample("effect", dist.Normal(mean[1], sd[1]))
        y_hat = level[..., None] + effect[..., None] * points.x[..., 0]
        pyro.sample("y", dist.Normal(y_hat, noise).mask(points.mask).to_event(1), obs=points.y)


def hyper_program(points):
    """`radon_program` with a hyperprior on the mean and the scale: θ may have a posterior."""
    mean = pyro.sample("mean", dist.Normal(torch.tensor([1.0, -0.5]), 0.5).to_event(1))
    sd = pyro.sample("sd", dist.HalfNormal(torch.ones(2)).to_event(1))
    noise = pyro.param("noise", torch.tensor(1.0), constraint=dist.constraints.positive)
    with pyro.plate("tasks", points.num_tasks):
        level = pyro.sample("level", dist.Normal(mean[..., 0], sd[..., 0]))
        effect = pyro.sample("effect", dist.Normal(mean[..., 1], sd[..., 1]))
        y_hat = level[..., None] + effect[..., None] * points.x[..., 0]
        pyro.sample("y", dist.Normal(y_hat, noise).mask(points.mask).to_event(1), obs=points.y)


def positive_program(points):
    """A count model with a points plate, a positive site, a hyperprior, and no Normal prior on the rate."""
    spread = pyro.sample("spread", dist.HalfCauchy(torch.tensor(1.0)))
    centre = pyro.param("centre", torch.tensor(0.5))
    with pyro.plate("tasks", points.num_tasks, dim=-2):
        rate = pyro.sample("rate", dist.LogNormal(centre, spread))
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("points", points.num_points, dim=-1):
            pyro.sample("y", dist.Poisson(rate * torch.exp(0.3 * slope * points.x[..., 0])), obs=points.y)


def ragged(counts, features=1, seed=0, counts_as_targets=False):
    """Random padded points with the given numbers of points a task."""
    generator = torch.Generator().manual_seed(seed)
    tasks = []
    for n in counts:
        x = torch.randn(n, features, generator=generator)
        y = torch.randn(n, generator=generator)
        tasks.append((x, torch.floor(y.abs() * 2) if counts_as_targets else y))
    return Points.from_tasks(tasks)


def episode(counts=(3, 5, 2, 8), queries=(4, 1, 6, 2), features=1, seed=0, counts_as_targets=False):
    """Support and query sets of unequal sizes."""
    return Episode(
        ragged(counts, features, seed, counts_as_targets), ragged(queries, features, seed + 1, counts_as_targets)
    )


@pytest.fixture
def linear_model(float64):
    """`linear_program` on two features, in float64."""
    return HierarchicalModel(linear_program, example=ragged((4, 4), 2))
