"""`meta_train`: every step is the hand-made one, an interrupted run ends where an uninterrupted one does, a bad task does no harm."""

import copy
import itertools
import math
import random
from functools import partial

import matplotlib.axes
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from bayesmeta import AbstractMetaLearner, CheckpointError, Episode, HierarchicalModel, TrainingError, compiling, meta_train
from bayesmeta.checkpoints import save_checkpoint
from bayesmeta.learners import ABML, MAML, NUTS, CompletePooling, Exact
from bayesmeta.likelihoods import Gaussian
from bayesmeta.networks import WeightNetwork
from bayesmeta.posteriors import TaskPosterior, delta
from bayesmeta.training_run import History, predictive_nll

from .conftest import episode, hyper_program, linear_program, positive_program, radon_program, ragged


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


class Tasks:
    """A family for tests: slopes and levels vary by task; ``shift`` moves all targets; with ``num_tasks`` it says that it is finite.

    Counts its calls, and can be told to break off at one of them, as a power cut does.
    """

    def __init__(self, *, shift=0.0, counts=False, num_tasks=None, break_at=None):
        self.shift, self.counts, self.num_tasks, self.break_at = shift, counts, num_tasks, break_at
        self.sizes = []

    def sample(self, num_tasks, *, generator):
        self.sizes.append(num_tasks)
        if len(self.sizes) == self.break_at:
            raise KeyboardInterrupt
        sets = []
        level, slope = torch.randn(2, num_tasks, 1, generator=generator)
        for n in (4, 3):
            x = torch.randn(num_tasks, n, 1, generator=generator)
            y = level + slope * x[..., 0] + 0.5 * torch.randn(num_tasks, n, generator=generator) + self.shift
            sets.append((x, y.abs().floor() if self.counts else y))
        return Episode.from_tuple([*sets[0], *sets[1]])


def maml(**options):
    return MAML(HierarchicalModel(radon_program), inner_steps=2, inner_lr=0.05, **options)


def abml():
    return ABML(HierarchicalModel(radon_program), inner_steps=2, inner_lr=0.05)


LEARNERS = {"MAML": maml, "Meta-SGD": lambda: maml(learn_lr="per_parameter"), "ABML": abml}
every_learner = pytest.mark.parametrize("make", LEARNERS.values(), ids=LEARNERS)


def values(learner):
    return [p.detach().clone() for p in learner.parameters()]


def assert_same(a, b):
    """To the last bit."""
    assert len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def by_hand(learner, family, *, steps, tasks, total, optimiser, schedule=None, generator, clip=None):
    """The training loop written out, from `meta_loss` and `global_loss` alone; returns the losses."""
    learner.materialise(family if isinstance(family, Episode) else family.sample(tasks, generator=seeded(99)))
    optimiser = optimiser([p for p in learner.parameters() if p.requires_grad])
    scheduler = schedule(optimiser) if schedule else None
    losses = []
    for _ in range(steps):
        batch = family if isinstance(family, Episode) else family.sample(tasks, generator=generator)
        with learner.model.theta_at(learner.model.draw_theta(generator)):
            loss = learner.meta_loss(batch, generator=generator).sum() / tasks + learner.global_loss() / total
        optimiser.zero_grad()
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(learner.parameters(), clip)
        optimiser.step()
        if scheduler:
            scheduler.step()
        losses.append(loss.item())
    return losses


# --- one step


def test_one_step_is_the_hand_made_one(float64):
    """θ ← θ − α ∇ [ 1/T Σ_i loss_i ], nothing else."""
    e = episode()
    learner = maml()
    learner.materialise(e)
    before = values(learner)
    loss = learner.meta_loss(e).sum() / 4
    gradients = torch.autograd.grad(loss, list(learner.parameters()), allow_unused=True)
    history = meta_train(learner, e, steps=1, optimizer=lambda p: torch.optim.SGD(p, 0.3))
    assert history.loss == [pytest.approx(loss.item(), abs=1e-14)]
    for old, gradient, new in zip(before, gradients, learner.parameters(), strict=True):
        wanted = old if gradient is None else old - 0.3 * gradient
        torch.testing.assert_close(new.detach(), wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("family", "options", "tasks", "total"),
    [
        (None, {}, 4, 4),  # a fixed batch is all there is
        (Tasks(counts=True, num_tasks=30), {"tasks_per_step": 5}, 5, 30),
        (Tasks(counts=True, num_tasks=30), {}, 30, 30),
        (Tasks(counts=True), {"tasks_per_step": 5, "num_tasks": 200}, 5, 200),
        (Tasks(counts=True, num_tasks=30), {"tasks_per_step": 5, "num_tasks": 60}, 5, 60),  # the caller knows better
    ],
    ids=["episode", "minibatch", "all of a finite family", "endless", "said"],
)
def test_the_hyperprior_counts_once_over_all_training_tasks(float64, family, options, tasks, total):
    """A hyperprior on the spread, HalfCauchy(1): −log p(spread) / number of tasks is added, however many tasks a step sees."""
    learner = MAML(HierarchicalModel(positive_program), inner_lr=0.01)
    batch = episode(counts_as_targets=True).to(torch.float64) if family is None else family.sample(tasks, generator=seeded(1))
    learner.materialise(batch)
    spread = learner.model.theta()["spread"]
    minus_log_p = -(math.log(2 / math.pi) - torch.log1p(spread**2))
    loss = learner.meta_loss(batch).sum() / tasks + minus_log_p / total
    (wanted,) = torch.autograd.grad(loss, learner.model.theta_loc)
    before = learner.model.theta_loc.detach().clone()
    history = meta_train(learner, family or batch, steps=1, generator=seeded(1), optimizer=lambda p: torch.optim.SGD(p, 0.1), **options)
    assert history.loss == [pytest.approx(loss.item(), abs=1e-12)]
    torch.testing.assert_close(learner.model.theta_loc.detach(), before - 0.1 * wanted, rtol=0, atol=1e-13)
    assert wanted.abs() > 1e-4


@pytest.mark.parametrize("theta", ["map", "variational"])
def test_variational_theta_is_one_draw_a_step_and_its_kl_counts_once(float64, theta):
    family = Tasks(counts=True, num_tasks=30)
    one, two = (ABML(HierarchicalModel(positive_program, theta=theta), inner_steps=2, inner_lr=0.02) for _ in range(2))
    sgd = lambda p: torch.optim.SGD(p, 0.01)  # noqa: E731
    history = meta_train(one, family, steps=5, tasks_per_step=6, generator=seeded(), optimizer=sgd)
    losses = by_hand(two, family, steps=5, tasks=6, total=30, optimiser=sgd, generator=seeded())
    np.testing.assert_allclose(history.loss, losses, rtol=1e-12)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


# --- optimisers, schedules, clipping


OPTIMISERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, 0.02, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.02),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, 0.02),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_any_torch_optimiser(float64, name):
    e = episode()
    one, two = maml(), maml()
    history = meta_train(one, e, steps=6, optimizer=OPTIMISERS[name])
    trained = by_hand(two, e, steps=6, tasks=4, total=4, optimiser=OPTIMISERS[name], generator=seeded())
    np.testing.assert_allclose(history.loss, trained, rtol=1e-12)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_the_default_is_adam_with_a_thousandth(float64):
    e = episode()
    one, two = maml(), maml()
    history = meta_train(one, e, steps=4)
    losses = by_hand(two, e, steps=4, tasks=4, total=4, optimiser=lambda p: torch.optim.Adam(p, 1e-3), generator=seeded())
    np.testing.assert_allclose(history.loss, losses, rtol=1e-12)


SCHEDULES = {
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "milestones": lambda o: lr_scheduler.MultiStepLR(o, [3, 7]),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 12),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.05, total_steps=20),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "warm-up": lambda o: lr_scheduler.SequentialLR(o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.8)], [3]),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_any_schedule_steps_once_a_step(float64, name):
    e = episode()
    one, two = maml(), maml()
    sgd = OPTIMISERS["SGD"]
    history = meta_train(one, e, steps=9, optimizer=sgd, schedule=SCHEDULES[name])
    losses = by_hand(two, e, steps=9, tasks=4, total=4, optimiser=sgd, schedule=SCHEDULES[name], generator=seeded())
    np.testing.assert_allclose(history.loss, losses, rtol=1e-12)
    plain = maml()
    assert meta_train(plain, e, steps=9, optimizer=sgd).loss[-1] != pytest.approx(losses[-1], rel=1e-6)


def moved(before, learner):
    return math.sqrt(sum(((a - b) ** 2).sum().item() for a, b in zip(before, learner.parameters(), strict=True)))


def test_clip_bounds_the_norm_of_the_whole_gradient(float64):
    e = episode()
    distances = []
    for clip in (None, 0.01, 1e6):
        learner = maml()
        learner.materialise(e)
        before = values(learner)
        meta_train(learner, e, steps=1, clip=clip, optimizer=lambda p: torch.optim.SGD(p, 1.0))
        distances.append(moved(before, learner))
    assert distances[1] == pytest.approx(0.01, rel=1e-3) and distances[0] > 0.1
    assert distances[2] == pytest.approx(distances[0], rel=1e-6)  # torch divides by the norm plus 1e-6


def test_the_optimiser_is_made_once_after_the_model_has_seen_data():
    """A plain function's θ is unknown before, so a factory it must be; it gets what the objective reaches, and no more."""
    calls = []

    def factory(parameters):
        calls.append((learner.model.dim, list(parameters)))
        return torch.optim.SGD(parameters, 0.1)

    learner = maml()
    with pytest.raises(RuntimeError, match="has not seen data yet"):
        learner.model.dim  # noqa: B018
    meta_train(learner, episode(), steps=2, optimizer=factory)
    ((dim, parameters),) = calls
    assert dim == 2
    names = {name for name, p in learner.named_parameters() if any(p is q for q in parameters)}
    assert names == {"model.params.mean", "model.params.noise"}  # the prior's scale plays no part in MAML


def test_an_optimiser_instead_of_a_factory_is_explained():
    ready = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)
    with pytest.raises((TypeError, ValueError), match=r"optimizer: .*(factory|lambda)"):
        meta_train(maml(), episode(), steps=1, optimizer=ready)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizer": torch.optim.LBFGS}, r"optimizer: LBFGS needs step\(closure\).*take torch\.optim\.Adam"),
        ({"optimizer": lambda params: None}, r"optimizer: expected a factory of something with step\(\).*NoneType"),
        ({"schedule": lr_scheduler.ReduceLROnPlateau}, r"schedule: ReduceLROnPlateau needs step\(metrics\).*CosineAnnealingLR"),
        ({"schedule": lambda optimiser: 0.1}, r"schedule: expected a factory of something with step\(\).*float"),
    ],
)
def test_what_cannot_be_stepped_is_refused_before_the_first_step(options, words):
    learner = maml()
    with pytest.raises(TypeError, match=words):
        meta_train(learner, episode(), steps=1, **options)
    assert torch.equal(learner.model.params["mean"], torch.tensor([1.0, -0.5]))


# --- how many tasks


@pytest.mark.parametrize(
    ("num_tasks", "options", "wanted"),
    [(None, {}, 25), (60, {}, 60), (100, {}, 100), (101, {}, 25), (60, {"tasks_per_step": 7}, 7), (None, {"tasks_per_step": 3}, 3)],
)
def test_tasks_per_step(num_tasks, options, wanted):
    family = Tasks(num_tasks=num_tasks)
    meta_train(maml(), family, steps=3, **options)
    assert family.sizes == [wanted] * 4  # the first call is for materialising; its randomness is given back


def test_the_first_batch_is_the_generators_first():
    """Materialising must not eat randomness: a model that has seen data before trains the same."""
    family = Tasks()
    one, two = abml(), abml()
    two.materialise(episode())
    assert meta_train(one, family, steps=3, generator=seeded()).loss == meta_train(two, family, steps=3, generator=seeded()).loss


def test_an_endless_family_with_a_hyperprior_needs_num_tasks():
    learner = MAML(HierarchicalModel(positive_program), inner_lr=0.01)
    with pytest.raises(ValueError, match=r"θ has a hyperprior and the family is endless.*num_tasks="):
        meta_train(learner, Tasks(counts=True), steps=1)
    assert meta_train(maml(), Tasks(), steps=1).steps == 1


# --- the same again


@every_learner
def test_the_same_seed_gives_the_same_bits(make):
    runs = [(learner := make(), meta_train(learner, Tasks(), steps=5, generator=seeded(s))) for s in (1, 1, 2)]
    (one, first), (two, second), (_, third) = runs
    assert first.loss == second.loss != third.loss
    assert_same(values(one), values(two))


def test_without_a_generator_the_seed_is_zero():
    torch.manual_seed(77)  # and the caller's own stream plays no part
    assert meta_train(abml(), Tasks(), steps=3).loss == meta_train(abml(), Tasks(), steps=3, generator=seeded(0)).loss


@every_learner
def test_nothing_outside_is_changed(make, tmp_path):
    state = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    meta_train(make(), Tasks(), steps=3, validation=Tasks(), validate_every=2, checkpoint=tmp_path / "c", generator=seeded())
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1:] == (np.random.get_state()[1].tolist(), random.getstate())  # noqa: NPY002
    assert not pyro.get_param_store().keys()


# --- validation


def diverging(**options):
    """Trains towards targets that lie far from the validation's, so that validation gets worse from the first step on."""
    learner = maml()
    adam = lambda p: torch.optim.Adam(p, 0.3)  # noqa: E731
    return learner, meta_train(learner, Tasks(shift=50.0), generator=seeded(), optimizer=adam, **options)


def test_validation_is_the_predictive_nll_of_a_fixed_set():
    """MAML's predictive is one Normal: its density is worked out by hand at every check."""
    held_out = episode((3, 5, 2, 8), (4, 1, 6, 0))
    _, history = diverging(steps=7, validation=held_out, validate_every=3)
    assert history.validation_step == [3, 6, 7]  # and at the end
    for step, got in zip(history.validation_step, history.validation, strict=True):
        twin, _ = diverging(steps=step)
        phi = twin.adapt(held_out.support).mean
        nlls = []
        for i, (x, y) in enumerate(held_out.query.to_tasks()):
            normal = dist.Normal(phi[i, 0] + phi[i, 1] * x[:, 0], twin.model.params["noise"].exp().detach())
            nlls += [-normal.log_prob(y).mean()] if len(y) else []  # the mean over points, then over tasks that have any
        assert got == pytest.approx(torch.stack(nlls).mean().item(), rel=1e-5)


def test_the_best_parameters_are_kept():
    learner, history = diverging(steps=12, validation=Tasks(), validate_every=4)
    assert history.best_step == history.validation_step[int(np.argmin(history.validation))] == 4
    assert history.steps == 12 and not history.stopped_early
    assert_same(values(learner), values(diverging(steps=4)[0]))


def test_the_last_parameters_are_kept_without_validation():
    learner, history = diverging(steps=12)
    assert history.best_step is None and history.validation == []
    twin = maml()
    by_hand(twin, Tasks(shift=50.0), steps=12, tasks=25, total=1, optimiser=lambda p: torch.optim.Adam(p, 0.3), generator=seeded())
    for a, b in zip(learner.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("patience", [1, 3])
def test_training_stops_after_so_many_checks_without_a_new_best(patience):
    learner, history = diverging(steps=100, validation=Tasks(), validate_every=2, patience=patience)
    assert history.stopped_early and history.best_step == 2
    assert history.validation_step == list(range(2, 2 * patience + 3, 2))
    assert history.steps == len(history.loss) == 2 * (patience + 1)
    assert_same(values(learner), values(diverging(steps=2)[0]))


def test_training_that_improves_is_not_stopped():
    learner = maml()
    adam = lambda p: torch.optim.Adam(p, 0.05)  # noqa: E731
    history = meta_train(learner, Tasks(shift=3.0), steps=20, validation=Tasks(shift=3.0), validate_every=2, patience=1, optimizer=adam)
    assert history.steps == 20 and not history.stopped_early and history.best_step == 20
    assert (np.diff(history.validation) < 0).all()


@pytest.mark.parametrize(("num_tasks", "options", "wanted"), [(None, {}, 100), (7, {}, 7), (None, {"validation_tasks": 11}, 11)])
def test_the_validation_set_is_drawn_once(num_tasks, options, wanted):
    held_out = Tasks(num_tasks=num_tasks)
    meta_train(maml(), Tasks(), steps=4, validation=held_out, validate_every=1, **options)
    assert held_out.sizes == [wanted]


def test_predictive_nll_of_a_mixture_and_of_a_task_without_query(linear_model):
    """Under the exact posterior the predictive is Normal in closed form; 20,000 draws come near it."""
    e = episode((3, 5, 0), (4, 0, 6), features=2)
    exact = Exact(linear_model)
    got = predictive_nll(exact, e, num_draws=20_000)
    q, noise = exact.adapt(e.support).distribution, linear_model.params["noise"].exp()
    assert got[1].isnan()
    for i in (0, 2):
        x, y = (v.double() for v in e.query.to_tasks()[i])
        sd = (torch.einsum("nd,de,ne->n", x, q.covariance_matrix[i], x) + noise**2).sqrt()
        assert got[i].item() == pytest.approx(-dist.Normal(x @ q.mean[i], sd).log_prob(y).mean().item(), abs=0.02)


# --- the history


def test_history_has_everything_and_draws_itself():
    _, history = diverging(steps=12, validation=Tasks(), validate_every=4)
    arrays = history.as_arrays()
    assert arrays["step"].tolist() == list(range(1, 13)) and arrays["loss"].tolist() == history.loss
    assert arrays["validation_step"].tolist() == [4, 8, 12] and arrays["validation"].tolist() == history.validation
    assert history.seconds > 0 and history.skipped == 0 and history.steps == 12
    ax = history.plot()
    assert isinstance(ax, matplotlib.axes.Axes)
    drawn = {tuple(line.get_xdata()): tuple(line.get_ydata()) for line in ax.lines}
    assert drawn[tuple(range(1, 13))] == tuple(history.loss)  # a median over one value is the value
    assert drawn[4, 8, 12] == tuple(history.validation)
    assert len(History(loss=[1.0, 2.0]).plot().lines) == 1  # no validation, no second line
    assert history.plot(ax) is ax


# --- breaking off and going on


def interrupted(make, path, *, at, resume=False, **options):
    """One run with a checkpoint every 3 steps, cut off while it draws the batch of its own ``at``-th step."""
    learner = make()
    family = Tasks(break_at=None if at is None else at + 1)
    options = {"steps": 11, "checkpoint_every": 3, "optimizer": lambda p: torch.optim.Adam(p, 0.05), **options}
    if at is None:
        return learner, meta_train(learner, family, checkpoint=path, resume=resume, **options)
    with pytest.raises(KeyboardInterrupt):
        meta_train(learner, family, checkpoint=path, resume=resume, **options)
    return None


def assert_same_run(one, two):
    (learner, history), (twin, again) = one, two
    assert_same(values(learner), values(twin))
    facts = [{k: v for k, v in vars(h).items() if k != "seconds"} for h in (history, again)]
    assert facts[0] == facts[1]


@every_learner
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"validation": Tasks(shift=-1.0), "validate_every": 2},
        {"validation": Tasks(shift=40.0), "validate_every": 4, "schedule": SCHEDULES["cosine"], "clip": 0.5},
    ],
    ids=["plain", "validated", "scheduled"],
)
def test_a_resumed_run_is_the_uninterrupted_one(make, options, tmp_path):
    """Cut off at step 5 and, gone on from step 3, at step 10; each time with a new learner and another seed: all is in the file."""
    whole = interrupted(make, tmp_path / "whole", at=None, generator=seeded(1), **options)
    interrupted(make, tmp_path / "cut", at=5, generator=seeded(1), **options)
    interrupted(make, tmp_path / "cut", at=7, generator=seeded(2), resume=True, **options)
    rest = interrupted(make, tmp_path / "cut", at=None, generator=seeded(3), resume=True, **options)
    assert_same_run(whole, rest)
    assert rest[1].steps == 11


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_goes_on(name, tmp_path):
    options = {"schedule": SCHEDULES[name], "optimizer": OPTIMISERS["SGD"]}
    whole = interrupted(maml, tmp_path / "whole", at=None, **options)
    interrupted(maml, tmp_path / "cut", at=8, **options)
    assert_same_run(whole, interrupted(maml, tmp_path / "cut", at=None, resume=True, **options))


@pytest.mark.parametrize("name", OPTIMISERS)
def test_every_optimiser_goes_on(name, tmp_path):
    options = {"optimizer": OPTIMISERS[name]}
    whole = interrupted(maml, tmp_path / "whole", at=None, **options)
    interrupted(maml, tmp_path / "cut", at=8, **options)
    assert_same_run(whole, interrupted(maml, tmp_path / "cut", at=None, resume=True, **options))


def test_a_finished_run_goes_on_to_more_steps(tmp_path):
    """The file holds the last parameters beside the best ones, and training goes on from the last."""
    options = {"validation": Tasks(shift=-2.0), "validate_every": 3, "generator": seeded(1)}
    whole = interrupted(abml, tmp_path / "whole", at=None, **{**options, "steps": 12})
    interrupted(abml, tmp_path / "part", at=None, **{**options, "steps": 6, "generator": seeded(1)})
    assert_same_run(whole, interrupted(abml, tmp_path / "part", at=None, resume=True, **{**options, "steps": 12}))


def test_patience_is_counted_across_the_interruption(tmp_path):
    def run(name, at, resume=False):
        learner = maml()
        family = Tasks(shift=50.0, break_at=None if at is None else at + 1)
        return learner, meta_train(
            learner, family, steps=50, optimizer=lambda p: torch.optim.Adam(p, 0.3), validation=Tasks(), validate_every=1, patience=4,
            checkpoint=tmp_path / name, checkpoint_every=1, resume=resume,
        )  # fmt: skip

    whole = run("whole", None)
    assert whole[1].stopped_early and whole[1].steps == 5
    with pytest.raises(KeyboardInterrupt):
        run("cut", 4)
    assert_same_run(whole, run("cut", None, resume=True))
    assert_same_run(whole, run("cut", None, resume=True))  # a run that had stopped early stays stopped, with the best parameters


def test_resume_without_a_file_starts_anew(tmp_path):
    one, two = maml(), maml()
    first = meta_train(one, Tasks(), steps=3, checkpoint=tmp_path / "new", resume=True)
    second = meta_train(two, Tasks(), steps=3)
    assert first.loss == second.loss and (tmp_path / "new").exists()


def test_without_resume_the_old_file_is_written_over(tmp_path):
    meta_train(maml(), Tasks(), steps=3, checkpoint=tmp_path / "c")
    assert meta_train(maml(), Tasks(), steps=2, checkpoint=tmp_path / "c").steps == 2
    assert meta_train(maml(), Tasks(), steps=2, checkpoint=tmp_path / "c", resume=True).steps == 2


def refused(learner, path, match, **options):
    """Resuming raises CheckpointError, and the learner stays as it was."""
    learner.materialise(episode())
    with torch.no_grad():
        for p in learner.parameters():
            p += 0.125  # something that the file does not have
    before = values(learner)
    with pytest.raises(CheckpointError, match=match):
        meta_train(learner, episode(), steps=5, checkpoint=path, resume=True, **options)
    assert_same(before, values(learner))


@pytest.fixture
def checkpoint(tmp_path):
    meta_train(maml(), episode(), steps=2, checkpoint=tmp_path / "c")
    return tmp_path / "c"


def test_a_checkpoint_of_another_learner_is_refused(checkpoint):
    refused(abml(), checkpoint, "of a MAML, expected a ABML|of a MAML, expected an ABML")


def test_a_checkpoint_of_another_model_is_refused_and_says_where(checkpoint):
    refused(MAML(HierarchicalModel(linear_program)), checkpoint, "of another model.*mean")


def test_a_checkpoint_of_another_network_is_refused(checkpoint):
    network = WeightNetwork(torch.nn.Linear(1, 1))
    refused(MAML(HierarchicalModel.from_network(network, Gaussian())), checkpoint, "of another model")


@pytest.mark.parametrize("optimizer", [lambda p: torch.optim.SGD(p, 0.1), lambda p: torch.optim.RMSprop(p, 0.1)])
def test_a_checkpoint_of_another_optimiser_is_refused(checkpoint, optimizer):
    refused(maml(), checkpoint, "optimi", optimizer=optimizer)


def test_a_checkpoint_with_another_schedule_is_refused(checkpoint):
    """Going on without it, or with a new one, would not be the same run."""
    refused(maml(), checkpoint, "schedule", schedule=SCHEDULES["cosine"])


def test_a_damaged_checkpoint_is_refused(checkpoint):
    body = bytearray(checkpoint.read_bytes())
    body[len(body) // 2] ^= 4
    checkpoint.write_bytes(body)
    refused(maml(), checkpoint, "damaged")


def test_a_file_of_something_else_is_refused(checkpoint):
    save_checkpoint(checkpoint, {"weights": torch.zeros(3)})
    refused(maml(), checkpoint, "c: ")
    checkpoint.write_bytes(b"not a checkpoint")
    refused(maml(), checkpoint, "not a bayesmeta checkpoint")


def test_a_checkpoint_that_cannot_be_written_ends_the_run(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        meta_train(maml(), episode(), steps=1, checkpoint=tmp_path / "file" / "c")


# --- bad tasks


class Spiky(AbstractMetaLearner):
    """loss_i = (mean − level of task i)²; a level of 13 makes it NaN at the first operation, as an overflow does, gradient and all."""

    def adapt(self, support, *, generator=None):
        support = self.prepared(support)
        return TaskPosterior(self.model, delta(self.model.initial(support).detach()))

    def meta_loss(self, episode, *, generator=None):
        query = self.prepared(episode.query, "query")
        level = query.y[:, 0]
        phi = self.model.initial(query)[:, 0]
        poison = torch.where(level == 13, torch.nan, 1.0)
        return (phi * poison - level) ** 2


def levels(*values):
    y = torch.tensor(values)[:, None]
    return Episode.from_tuple([torch.zeros(len(values), 1, 1), y, torch.zeros(len(values), 1, 1), y])


def overflow():
    """A task whose inner step overflows float32, between three that are fine: finite data, no fault of the user's."""
    e = episode()
    x = e.support.x.clone()
    x[1] *= 1e30
    return e._replace(support=e.support._replace(x=x))


@pytest.mark.parametrize(
    ("make", "bad"),
    [(maml, overflow()), (abml, overflow()), (lambda: CompletePooling(HierarchicalModel(radon_program)), overflow()),
     (lambda: Spiky(HierarchicalModel(radon_program)), levels(1.0, 13.0, 2.0, 3.0))],
    ids=["MAML", "ABML", "CompletePooling", "NaN"],
)  # fmt: skip
def test_a_bad_task_is_raised_or_skipped(make, bad):
    """Skipped, the step is the one that the other tasks alone would have taken: NaN has no gradient to leave behind."""
    learner = make()
    learner.materialise(bad.select([0, 2, 3]))
    start = values(learner)
    with pytest.raises(TrainingError, match=r"step 1: the loss of task 1 is (inf|nan) \(1 of 4 tasks\).*bad_tasks='skip'"):
        meta_train(learner, bad, steps=3)
    assert_same(start, values(learner))
    sgd = lambda p: torch.optim.SGD(p, 0.01)  # noqa: E731
    history = meta_train(learner, bad, steps=1, bad_tasks="skip", optimizer=sgd)
    assert history.skipped == 1 and history.steps == 1
    twin = make()
    alone = meta_train(twin, bad.select([0, 2, 3]), steps=1, optimizer=sgd)
    assert all(p.isfinite().all() for p in learner.parameters())
    if make is not abml:  # whose noise is drawn task by task
        assert history.loss == pytest.approx(alone.loss, rel=1e-6)
        for a, b in zip(learner.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert meta_train(learner, bad, steps=4, bad_tasks="skip", optimizer=sgd).skipped == 4


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 20])
def test_tasks_in_chunks_take_the_same_steps(chunk, compile, float64, monkeypatch):
    """Seven tasks, so that the last chunk is smaller; θ's hyperprior counts once; the graph is traced, not compiled, to save time."""
    monkeypatch.setattr(compiling, "inductor", lambda module, inputs: module)
    runs = []
    for option in (None, chunk):
        learner = MAML(HierarchicalModel(hyper_program), inner_steps=2, inner_lr=0.05)
        options = {"steps": 4, "tasks_per_step": 7, "num_tasks": 50, "generator": seeded(), "clip": 1.0, "compile": compile}
        runs.append((values(learner), meta_train(learner, Tasks(), task_chunk=option, **options).loss, values(learner)))
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=1e-12)


def test_a_bad_task_in_a_chunk_is_found_and_left_out(float64):
    bad, sgd = levels(1.0, 2.0, 13.0, 3.0, 13.0), lambda p: torch.optim.SGD(p, 0.01)
    learner, twin = (Spiky(HierarchicalModel(radon_program)) for _ in range(2))
    with pytest.raises(TrainingError, match=r"the loss of task 2 is nan \(1 of 2 tasks\)"):
        meta_train(learner, bad, steps=1, task_chunk=2)
    history = meta_train(learner, bad, steps=3, task_chunk=2, bad_tasks="skip", optimizer=sgd)  # the last chunk has no good task
    assert history.skipped == 6
    alone = meta_train(twin, bad.select([0, 1, 3]), steps=3, optimizer=sgd)
    torch.testing.assert_close([history.loss, values(learner)], [alone.loss, values(twin)], rtol=0, atol=1e-12)


class Script:
    """A family that plays given episodes in turn."""

    def __init__(self, *episodes):
        self.episodes, self.turn = episodes, itertools.count(-1)  # the first call is for materialising

    def sample(self, num_tasks, *, generator):
        return self.episodes[max(0, next(self.turn))]


def test_the_error_names_the_step_and_keeps_what_was_learned():
    good, bad = levels(1.0, 2.0), levels(1.0, 13.0)
    one, two = (Spiky(HierarchicalModel(radon_program)) for _ in range(2))
    with pytest.raises(TrainingError, match="step 3: the loss of task 1 is nan"):
        meta_train(one, Script(good, good, bad), steps=5)
    meta_train(two, good, steps=2)
    assert_same(values(one), values(two))
    assert issubclass(TrainingError, ArithmeticError)


def test_all_tasks_bad_is_an_error_even_where_bad_ones_are_skipped():
    learner = Spiky(HierarchicalModel(radon_program))
    with pytest.raises(TrainingError, match="step 2: loss or gradient of all 2 tasks is not finite"):
        meta_train(learner, Script(levels(1.0, 2.0), levels(13.0, 13.0)), steps=5, bad_tasks="skip")
    assert all(p.isfinite().all() for p in learner.parameters())


def test_a_skipped_count_survives_a_checkpoint(tmp_path):
    for steps in (3, 5):
        learner = Spiky(HierarchicalModel(radon_program))
        history = meta_train(learner, levels(1.0, 13.0, 2.0), steps=steps, bad_tasks="skip", checkpoint=tmp_path / "c", resume=True)
        assert history.skipped == steps


class Cliff(AbstractMetaLearner):
    """A finite loss whose gradient is infinite: √0."""

    def adapt(self, support, *, generator=None):
        raise NotImplementedError

    def meta_loss(self, episode, *, generator=None):
        phi = self.model.initial(self.prepared(episode.query, "query"))[:, 0]
        return (phi - phi.detach()).abs().clamp(min=0).sqrt()


def test_an_infinite_gradient_is_an_error_and_moves_nothing():
    learner = Cliff(HierarchicalModel(radon_program))
    learner.materialise(episode())
    before = values(learner)
    with pytest.raises(TrainingError, match=r"step 1: the loss is 0\.0, the gradient's norm (nan|inf)"):
        meta_train(learner, episode(), steps=2)
    with pytest.raises(TrainingError, match="step 1: loss or gradient of all 4 tasks is not finite"):
        meta_train(learner, episode(), steps=2, bad_tasks="skip")
    assert_same(before, values(learner))


class Steep(AbstractMetaLearner):
    """A finite loss everywhere; the gradient of a task whose level is 13 is infinite."""

    def adapt(self, support, *, generator=None):
        raise NotImplementedError

    def meta_loss(self, episode, *, generator=None):
        query = self.prepared(episode.query, "query")
        phi = self.model.initial(query)[:, 0]
        return (phi - query.y[:, 0]) ** 2 + (phi - phi.detach() + (query.y[:, 0] != 13)).abs().sqrt()


def test_a_task_with_an_infinite_gradient_is_skipped_alone():
    one, two = (Steep(HierarchicalModel(radon_program)) for _ in range(2))
    history = meta_train(one, levels(1.0, 13.0, 2.0), steps=2, bad_tasks="skip")
    assert history.skipped == 2
    alone = meta_train(two, levels(1.0, 2.0), steps=2)
    assert history.loss == alone.loss
    assert_same(values(one), values(two))
    with pytest.raises(TrainingError, match="the gradient's norm nan"):
        meta_train(one, levels(1.0, 13.0, 2.0), steps=2)


class Turned(AbstractMetaLearner):
    """The gradient in its matrix stands in memory transposed."""

    def __init__(self, model):
        super().__init__(model)
        self.matrix = nn.Parameter(torch.zeros(2, 3))

    def adapt(self, support, *, generator=None):
        raise NotImplementedError

    def meta_loss(self, episode, *, generator=None):
        return (self.matrix.mT * torch.arange(6.0).view(3, 2)).sum().expand(episode.num_tasks)


@pytest.mark.parametrize(
    "optimizer", [partial(torch.optim.SGD, lr=1.0), partial(torch.optim.Adam, lr=0.1), partial(torch.optim.Adam, lr=0.1, weight_decay=0.1)]
)
def test_fused_optimisers_take_gradients_where_they_belong(optimizer):
    """They pair a parameter's numbers with the gradient's by place in memory."""
    runs = []
    for fused in (True, False):
        learner = Turned(HierarchicalModel(radon_program))
        meta_train(learner, episode(), steps=4, optimizer=partial(optimizer, fused=fused), compile=False)
        runs.append(learner.matrix.detach())
    torch.testing.assert_close(*runs)
    if optimizer.func is torch.optim.SGD:
        assert torch.equal(runs[0], -4 * torch.arange(6.0).view(3, 2).mT)


def test_a_step_size_that_throws_the_parameters_out_is_caught():
    """Finite gradient, infinite step: what the message says of the parameters, that they are finite, must hold."""
    learner = CompletePooling(HierarchicalModel(radon_program))
    with pytest.raises(TrainingError, match="parameters are at their last finite value"):
        meta_train(learner, episode(), steps=5, optimizer=lambda p: torch.optim.SGD(p, 1e38))
    assert all(p.isfinite().all() for p in learner.parameters())


# --- what makes no sense


def test_samplers_are_not_trained():
    with pytest.raises(TypeError, match="NUTS adapts and does not learn: it needs no training"):
        meta_train(NUTS(HierarchicalModel(radon_program)), episode(), steps=1)


def test_a_learner_without_parameters_has_nothing_to_train():
    model = HierarchicalModel(radon_program, example=episode()).requires_grad_(False)
    with pytest.raises(ValueError, match="MAML: nothing to train"):
        meta_train(MAML(model), episode(), steps=1)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"steps": -1}, "steps"), ({"validate_every": 0}, "every"), ({"checkpoint_every": 0}, "every"),
        ({"bad_tasks": "ignore"}, "bad_tasks"), ({"tasks_per_step": 0}, "tasks_per_step"), ({"tasks_per_step": -1}, "tasks_per_step"),
        ({"num_tasks": 0}, "num_tasks"), ({"patience": 0}, "patience"), ({"clip": 0.0}, "clip"), ({"clip": -1.0}, "clip"),
        ({"validation_tasks": 0}, "task"),
    ],
    ids=str,
)  # fmt: skip
def test_arguments_that_make_no_sense_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        meta_train(maml(), Tasks(), **{"steps": 1, "validation": Tasks(), **options})


def test_an_episode_is_checked_before_anything_is_done():
    bad = episode()
    y = bad.query.y.clone()
    y[2, 1] = float("nan")
    with pytest.raises(ValueError, match=r"query\.y: task 2, point 1"):
        meta_train(maml(), bad._replace(query=bad.query._replace(y=y)), steps=1)
    with pytest.raises(ValueError, match="support has 2 tasks, query 3"):
        meta_train(maml(), Episode(ragged((2, 2)), ragged((1, 1, 1))), steps=1)


def test_no_steps_change_nothing(tmp_path):
    learner = maml()
    learner.materialise(episode())
    before = values(learner)
    history = meta_train(learner, episode(), steps=0, checkpoint=tmp_path / "c")
    assert history.steps == 0 and history.loss == []
    assert_same(before, values(learner))


# --- progress


@pytest.mark.parametrize(("progress", "shown"), [(True, True), (False, False), (None, False)])
def test_the_bar_shows_loss_and_rate(capsys, progress, shown):
    """None means on a terminal only, which a captured stream is not."""
    history = meta_train(maml(), Tasks(), steps=3, progress=progress)
    out, err = capsys.readouterr()
    assert out == ""
    if not shown:
        assert err == ""
        return
    assert f"loss={history.loss[-1]:.4g}" in err and "3/3" in err
    assert "step/s" in err or "s/step" in err


def test_a_copy_trains_apart():
    learner = maml()
    learner.materialise(episode())
    twin = copy.deepcopy(learner)
    before = values(twin)
    meta_train(learner, episode(), steps=3)
    assert_same(before, values(twin))
    assert moved(before, learner) > 1e-4
