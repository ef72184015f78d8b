"""A program that breaks a rule is refused with the rule and how to mend it; the model is then as it was before."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn

from bayesmeta import Episode, HierarchicalModel, ModelError, Points
from bayesmeta.learners import MAML, MatchingNet
from bayesmeta.likelihoods import Categorical, Gaussian
from bayesmeta.networks import PrototypeNetwork, WeightNetwork

from .conftest import ragged

NET = nn.Linear(1, 1)
PYRO_NET = PyroModule[nn.Linear](1, 1)


def tasks(points, **options):
    return pyro.plate("tasks", points.num_tasks, **options)


def level(name="level"):
    return pyro.sample(name, dist.Normal(0.0, 1.0))


def observe(points, y_hat, **options):
    pyro.sample("y", dist.Normal(y_hat, 1.0).to_event(1), obs=points.y, **options)


def at(value, points):
    """One value a task, at each of its points."""
    return value[..., None] + 0 * points.x[..., 0]


def nothing(points):
    pass


def no_plate(points):
    observe(points, at(pyro.sample("level", dist.Normal(torch.zeros(points.num_tasks), 1.0).to_event(1)), points))


def another_plate(points):
    with pyro.plate("counties", points.num_tasks):
        observe(points, at(level(), points))


def loop_over_tasks(points):
    for i in pyro.plate("tasks", points.num_tasks):
        y_hat = level(f"level_{i}").expand(points.num_points)
        pyro.sample(f"y_{i}", dist.Normal(y_hat, 1.0).to_event(1), obs=points.y[i])


def no_y(points):
    with tasks(points):
        pyro.sample("target", dist.Normal(at(level(), points), 1.0).to_event(1), obs=points.y)


def y_is_drawn(points):
    with tasks(points):
        pyro.sample("y", dist.Normal(at(level(), points), 1.0).to_event(1))


def y_outside(points):
    with tasks(points):
        y_hat = at(level(), points)
    pyro.sample("y", dist.Normal(y_hat, 1.0).to_event(2), obs=points.y)


def minibatch(points):
    with tasks(points, subsample_size=1) as index:
        pyro.sample("y", dist.Normal(level()[..., None].expand(1, points.num_points), 1.0).to_event(1), obs=points.y[index])


def fixed_number_of_tasks(points):
    with pyro.plate("tasks", 2):
        pyro.sample("y", dist.Normal(level()[..., None].expand(2, points.num_points), 1.0).to_event(1), obs=points.y[:2])


def plates_the_other_way_round(points):
    with pyro.plate("points", points.num_points, dim=-2), tasks(points, dim=-1):
        pyro.sample("y", dist.Normal(level(), 1.0), obs=points.y.T)


def plate_too_far_left(points):
    with tasks(points, dim=-3):
        y_hat = level() + 0 * points.x
        with pyro.plate("points", points.num_points, dim=-2):
            pyro.sample("y", dist.Normal(y_hat[:, :, 0][..., None], 1.0), obs=points.y[..., None])


def some_points(points):
    with tasks(points, dim=-2):
        y_hat = level()
        with pyro.plate("points", points.num_points, subsample_size=2, dim=-1):
            pyro.sample("y", dist.Normal(y_hat.expand(points.num_tasks, 2), 1.0), obs=points.y[:, :2])


def dependent_points(points):
    with tasks(points):
        pyro.sample("y", dist.MultivariateNormal(at(level(), points), torch.eye(points.num_points)), obs=points.y)


def points_are_no_event(points):
    with tasks(points):
        pyro.sample("y", dist.Normal(at(level(), points), 1.0), obs=points.y)


def task_parameters_are_constants(points):
    w = pyro.param("w", torch.tensor(0.0))
    with tasks(points):
        observe(points, w + 0 * points.x[..., 0])


def discrete_parameter(points):
    with tasks(points):
        observe(points, at(pyro.sample("kind", dist.Bernoulli(0.5)), points))


def discrete_theta(points):
    count = pyro.sample("count", dist.Poisson(2.0))
    with tasks(points):
        observe(points, at(level(), points) + count)


def parameter_on_a_sphere(points):
    with tasks(points):
        observe(points, at(pyro.sample("direction", dist.ProjectedNormal(torch.ones(2)))[..., 0], points))


def parameters_inside_points(points):
    with tasks(points, dim=-2), pyro.plate("points", points.num_points, dim=-1):
        pyro.sample("y", dist.Normal(level(), 1.0), obs=points.y)


def parameters_grow_with_points(points):
    with tasks(points):
        observe(points, pyro.sample("effect", dist.Normal(torch.zeros(points.num_points), 1.0).to_event(1)))


def a_prior_with_points(points):
    with tasks(points, dim=-2):
        effect = pyro.sample("effect", dist.Normal(points.x[..., 0], 1.0))
        with pyro.plate("points", points.num_points, dim=-1):
            pyro.sample("y", dist.Normal(effect, 1.0), obs=points.y)


def a_vector_without_event(points):
    with tasks(points):
        effect = pyro.sample("effect", dist.Normal(torch.zeros(3, 1), 1.0).expand([3, points.num_tasks]))
        observe(points, at(effect.sum(0), points))


def task_site_outside(points):
    effect = pyro.sample("effect", dist.Normal(torch.zeros(points.num_tasks), 1.0).to_event(1))
    with tasks(points):
        observe(points, at(level() + effect, points))


def point_site_outside(points):
    effect = pyro.sample("effect", dist.Normal(torch.zeros(points.num_points), 1.0).to_event(1))
    with tasks(points):
        observe(points, at(level(), points) + effect)


def a_parameter_per_task(points):
    mean = pyro.param("mean", torch.zeros(points.num_tasks))
    with tasks(points):
        observe(points, at(pyro.sample("level", dist.Normal(mean, 1.0)), points))


def a_parameter_per_point_in_disguise(points):
    mean = pyro.param("mean", torch.zeros(points.num_points)).sum()
    with tasks(points):
        observe(points, at(pyro.sample("level", dist.Normal(mean, 1.0)), points))


def a_site_that_comes_later(points):
    with tasks(points):
        observe(points, at(level() + (level("extra") if points.num_tasks == 3 else 0), points))


def a_site_that_goes_away(points):
    with tasks(points):
        observe(points, at(level() + (level("extra") if points.num_tasks == 2 else 0), points))


def a_parameter_that_comes_later(points):
    mean = pyro.param("mean", torch.tensor(0.0)) if points.num_tasks == 3 else 0.0
    with tasks(points):
        observe(points, at(level() + mean, points))


def reshapes_to_tasks(points):
    with tasks(points):
        observe(points, level().reshape(points.num_tasks, 1) + 0 * points.x[..., 0])


def indexes_from_the_left(points):
    with tasks(points):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        observe(points, w[:, 0, None] + 0 * points.x[..., 0])


def two_outputs(points):
    with tasks(points):
        y_hat = at(level(), points)
        pyro.sample("z", dist.Normal(y_hat, 1.0).to_event(1), obs=2 * points.y)
        observe(points, y_hat)


def a_factor_per_point(points):
    with tasks(points, dim=-2):
        y_hat = level()
        with pyro.plate("points", points.num_points, dim=-1):
            pyro.factor("weight", -points.x[..., 0] ** 2)
            pyro.sample("y", dist.Normal(y_hat, 1.0).expand([points.num_tasks, points.num_points]), obs=points.y)


def start_outside_the_constraint(points):
    sd = pyro.param("sd", torch.tensor(-1.0), constraint=dist.constraints.positive)
    with tasks(points):
        observe(points, at(pyro.sample("level", dist.Normal(0.0, sd)), points))


def no_start(points):
    mean = pyro.param("mean")
    with tasks(points):
        observe(points, at(level() + mean, points))


def refers_to_a_module_by_pyro(points):
    net = pyro.module("net", NET)
    with tasks(points):
        observe(points, at(level(), points) + net(points.x)[..., 0])


def refers_to_a_module(points):
    with tasks(points):
        observe(points, at(level(), points) + NET(points.x)[..., 0])


def refers_to_a_pyro_module(points):
    with tasks(points):
        observe(points, at(level(), points) + PYRO_NET(points.x)[..., 0])


def is_broken(points):
    with tasks(points):
        observe(points, at(level(), points) + points.x[..., 3])


PLATE = r'`with pyro.plate("tasks", points.num_tasks):`'
def bounds_from_the_data(points):
    with tasks(points):
        observe(points, at(pyro.sample("level", dist.Uniform(0.0, 1.0 + points.x[..., 0].abs().amax(-1))), points))


def bounds_from_the_number_of_points(points):
    with tasks(points):
        observe(points, at(pyro.sample("level", dist.Pareto(points.mask.sum(-1).float(), 2.0)), points))


REFUSED = {  # what the message says: the rule, the culprit, the remedy
    nothing: ('no plate named "tasks"', "plates found: none", PLATE),
    no_plate: ('no plate named "tasks"', PLATE),
    another_plate: ('no plate named "tasks"', "plates found: ['counties']", PLATE),
    loop_over_tasks: ('no plate named "tasks"', PLATE),
    no_y: ('no site named "y"', "sites found: ['level', 'target']", "obs=points.y"),
    y_is_drawn: ('site "y" is not observed', "obs=points.y"),
    y_outside: ('site "y" stands outside the tasks plate', PLATE),
    minibatch: ('plate "tasks" has size 1 for 2 tasks', "points.num_tasks", "no subsample_size"),
    fixed_number_of_tasks: ('plate "tasks" has size 2 for 3 tasks', "points.num_tasks"),
    plates_the_other_way_round: ("'points' at dim -2, 'tasks' at dim -1", '"tasks" at dim=-2 with one plate over points at dim=-1'),
    plate_too_far_left: ("'tasks' at dim -3, 'points' at dim -2", '"tasks" alone at dim=-1'),
    some_points: ("plate 'points' has size 2 for 4 points", "points.num_points"),
    dependent_points: ("batch shape (2,) and event shape (4,)", "one independent distribution per point", ".to_event(1)"),
    points_are_no_event: ("site y", "2 vs 4", "end the distribution with .to_event(1)"),
    task_parameters_are_constants: ("no latent site in the tasks plate", 'with pyro.plate("tasks"'),
    discrete_parameter: ("'kind' is discrete (Bernoulli)", "sum it out", "MixtureSameFamily"),
    discrete_theta: ("'count' is discrete (Poisson)", "sum it out"),
    parameter_on_a_sphere: ("'direction'", "no bijection to unconstrained reals", "another support"),
    parameters_inside_points: ("'level' stands inside the plate 'points'", "must not grow with its points", "directly in the tasks plate"),
    parameters_grow_with_points: ("'effect' has event shape (4,) for 4 points and (5,) for 5", "fixed size"),
    a_prior_with_points: ("'effect' has batch shape (2, 4), expected (2, 1)", "no parameter of a task"),
    a_vector_without_event: ("'effect' has batch shape (3, 2), expected (2,)", "a vector needs .to_event(1)"),
    bounds_from_the_data: ("'level': the bounds of its support are taken from the data", "Uniform(0, 1)", "stretch it afterwards"),
    bounds_from_the_number_of_points: ("'level': the bounds of its support are taken from the data", "stretch it afterwards"),
    task_site_outside: ("'effect' stands outside the tasks plate", "one value per task or point", PLATE),
    point_site_outside: ("'effect' stands outside the tasks plate", "one value per task or point", "shape (4,)"),
    a_parameter_per_task: ("pyro.param('mean') has shape (2,) in one run and (3,)", "must not depend on the numbers of tasks", PLATE),
    a_parameter_per_point_in_disguise: ("pyro.param('mean') has shape (4,) in one run and (5,)", "must not depend"),
    a_site_that_comes_later: ("'extra' is there for 3 tasks of 5 points and not for 2 of 4", "must not depend on the data"),
    a_site_that_goes_away: ("'extra' is there for 2 tasks of 4 points and not for 3 of 5", "must not depend on the data"),
    a_parameter_that_comes_later: ("pyro.param 'mean' is there for 3 tasks of 5 points and not for 2", "must not depend on the data"),
    reshapes_to_tasks: ("does not broadcast over draws", "index from the right"),
    indexes_from_the_left: ("does not broadcast over draws", "index from the right"),
    two_outputs: ("'z' has one value per point", 'only "y" knows which points are real', 'observe all outputs in "y"'),
    a_factor_per_point: ("'weight' has one value per point", 'only "y" knows which points are real'),
    start_outside_the_constraint: ("pyro.param('sd')", "-1.0 does not satisfy GreaterThan(lower_bound=0.0)"),
    no_start: ("pyro.param('mean') has no initial value", "write pyro.param('mean', tensor)"),
    refers_to_a_module_by_pyro: ("'net$$$weight' is the parameter of a module", "PyroModule that holds the module"),
    refers_to_a_module: ("require a gradient and are not the model's", "PyroModule that holds it", ".requires_grad_(False)"),
    refers_to_a_pyro_module: ("'weight' is the parameter of a module that the function only refers to", "PyroModule that holds the module"),
    is_broken: ("failed on 2 tasks of 4 points, x of shape (2, 4, 1)", "IndexError"),
}


def good(points):
    with tasks(points):
        observe(points, at(level(), points))


@pytest.mark.parametrize("program", REFUSED, ids=lambda program: program.__name__)
def test_the_message_says_the_rule_and_the_remedy(program):
    with pytest.raises(ModelError) as caught:
        HierarchicalModel(program, example=ragged((3, 5, 2)))
    for words in REFUSED[program]:
        assert words in str(caught.value)
    assert pyro.poutine.runtime._PYRO_STACK == []
    assert not list(pyro.get_param_store())


def with_hyperprior_and_parameters(points):
    """Fails at the last check, when θ has been made already."""
    spread = pyro.sample("spread", dist.HalfNormal(1.0))
    mean = pyro.param("mean", torch.tensor(0.0))
    with tasks(points):
        value = pyro.sample("level", dist.Normal(mean, spread))
        observe(points, value.reshape(points.num_tasks, 1) + 0 * points.x[..., 0])


@pytest.mark.parametrize("program", [*REFUSED, with_hyperprior_and_parameters], ids=lambda program: program.__name__)
@pytest.mark.parametrize("theta", ["map", "variational", "nuts"])
def test_a_model_is_as_before_and_usable_once_the_program_is_mended(program, theta):
    switch = [program]
    model, points = HierarchicalModel(lambda points: switch[0](points), theta=theta), ragged((3, 5, 2))
    double = points.to(torch.float64)
    for _ in range(2):
        with pytest.raises(ModelError):
            model.materialise(double)
    assert not list(model.parameters())
    assert not model.state_dict()
    with pytest.raises(RuntimeError, match="has not seen data yet"):
        model.dim  # noqa: B018
    switch[0] = good
    assert model.initial(points).dtype == torch.float32
    assert model.dim == 1
    assert not list(model.parameters())


def wants_numbers(points):
    with tasks(points):
        observe(points, at(level(), points))


def wants_classes(points):
    with tasks(points):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("y", dist.Categorical(logits=w[..., None, :] * points.x).to_event(1), obs=points.y)


def test_a_y_with_an_axis_too_many():
    points = ragged((3, 5, 2))
    wide = points._replace(y=points.y[..., None])
    with pytest.raises(ModelError, match=r"has shape \(2, 4, 1\), its distribution \(2, 4\).*y of shape \(T, N\), or observe points\.y"):
        HierarchicalModel(wants_numbers, example=wide)
    model = HierarchicalModel(wants_numbers, example=points)
    with pytest.raises(ValueError, match=r"y: expected shape \(T, N\), as the program's likelihood has it, got \(3, 5, 1\)"):
        MAML(model).adapt(wide)
    with pytest.raises(ModelError, match=r"observed has shape \(2, 4\), its distribution \(2, 4, 3\).*give y of shape \(T, N, 3\)$"):
        outputs = HierarchicalModel.from_network(WeightNetwork(nn.Linear(1, 3)), Gaussian())
        outputs.materialise(points)


def test_a_class_that_there_is_not():
    points = ragged((3, 5, 2))
    y = torch.zeros(3, 5, dtype=torch.long)
    y[1, 3] = 3
    with pytest.raises(ValueError, match=r"points\.y: task 1, point 3: the likelihood expects a value in .*upper_bound=2\), got 3"):
        HierarchicalModel(wants_classes, example=points._replace(y=y))
    first = points._replace(y=torch.full_like(y, 3))
    with pytest.raises(ValueError, match=r"query\.y: task 0, point 0: the likelihood expects a value in .*, got 3"):
        HierarchicalModel(wants_classes, example=Episode(points._replace(y=torch.zeros_like(y)), first))
    with pytest.raises(ValueError, match=r"points\.y: task 0, point 0: the likelihood expects a value in .*, got 3"):
        HierarchicalModel.from_network(WeightNetwork(nn.Linear(1, 3)), Categorical(3), example=first)


def test_what_is_no_network():
    with pytest.raises(TypeError, match=r"network: expected one of bayesmeta\.networks, got Linear: wrap .*WeightNetwork\(module\)"):
        HierarchicalModel.from_network(nn.Linear(1, 1), Gaussian())
    with pytest.raises(TypeError, match=r"likelihood: got the class Gaussian: construct it, say Gaussian\(\)"):
        HierarchicalModel.from_network(WeightNetwork(nn.Linear(1, 1)), Gaussian)


@pytest.mark.parametrize("kind", ["program", "matching"])
def test_points_are_no_inputs(kind):
    points = ragged((3, 3))
    if kind == "program":
        posterior = MAML(HierarchicalModel(wants_numbers)).adapt(points)
    else:
        points = points._replace(y=torch.tensor([[0, 1, 0], [1, 0, 0]]))
        network = PrototypeNetwork(nn.Linear(1, 2), 2, 2)
        posterior = MatchingNet(HierarchicalModel.from_network(network, Categorical(2))).adapt(points)
    for data in (points, Episode(points, points)):
        with pytest.raises(TypeError, match=rf"x: expected inputs of shape \(T, N, \*I\), got {type(data).__name__}: .* say points\.x"):
            posterior.predict(data)


def test_dim_before_any_data_says_what_to_do():
    model = HierarchicalModel(good)
    for ask in (lambda: model.dim, lambda: model.sites, lambda: model.theta_sites, lambda: model.made_up_points(1, 1), model.global_loss):
        with pytest.raises(RuntimeError, match=r"has not seen data yet.*example=points.*model\.materialise\(points\)"):
            ask()


@pytest.mark.parametrize(
    "points",
    [
        Points.of(torch.zeros(2, 3, 1)),
        Points.of(torch.zeros(2, 0, 1), torch.zeros(2, 0)),
        Points.of(torch.zeros(2, 3, 1), torch.zeros(2, 3), torch.zeros(2, 3) > 0),
    ],
    ids=["no y", "no N", "all padding"],
)
def test_the_first_data_must_have_a_real_point(points):
    with pytest.raises(ModelError, match="must have a real point and its y"):
        HierarchicalModel(good, example=points)


def test_a_parameter_that_comes_much_later():
    def program(points):
        mean = pyro.param("mean", torch.tensor(0.0)) if points.num_tasks > 6 else 0.0
        with tasks(points):
            observe(points, at(level() + mean, points))

    model = HierarchicalModel(program, example=ragged((2, 2)))
    with pytest.raises(ModelError, match=r"pyro.param\('mean'\) was not there.*must not depend on the data"):
        model.log_joint(torch.zeros(7, 1), ragged((2,) * 7))
    assert not list(model.parameters())


@pytest.mark.parametrize("spread", [lambda y: y.std(), torch.std, lambda y: 0 * y])
def test_a_program_that_needs_y_learns_and_does_not_predict(spread):
    def program(points):
        with tasks(points):
            observe(points, at(level(), points) + spread(points.y))

    model = HierarchicalModel(program, example=ragged((2, 2)))
    with pytest.raises(ModelError, match=r"must run without targets \(points.y is None\) to predict: .*None"):
        model.predict(torch.zeros(2, 1), torch.zeros(2, 3, 1))


def test_arguments_are_named():
    model = HierarchicalModel(good, example=ragged((2, 2)))
    with pytest.raises(ValueError, match="theta: expected one of 'map', 'variational', 'nuts', got 'mcmc'"):
        HierarchicalModel(good, theta="mcmc")
    with pytest.raises(ValueError, match=r"phi: expected shape \(\*S, T, D\) with D = 1, got \(2, 3\)"):
        model.log_joint(torch.zeros(2, 3), ragged((2, 2)))
    with pytest.raises(ValueError, match=r"x: expected shape \(T, N, \*I\) with T = 2 tasks, got \(3, 4, 1\)"):
        model.predict(torch.zeros(2, 1), torch.zeros(3, 4, 1))
    with pytest.raises(ValueError, match=r"expected exactly the sites \['level'\], got \['extra', 'level'\]"):
        model.pack({"level": torch.zeros(2), "extra": torch.zeros(2)})


def test_a_frozen_module_may_be_referred_to():
    net = nn.Linear(1, 1).requires_grad_(False)

    def program(points):
        with tasks(points):
            observe(points, at(level(), points) + net(points.x)[..., 0])

    assert HierarchicalModel(program, example=ragged((2, 2))).dim == 1
