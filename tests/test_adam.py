"""Adam's step within a training step's graph: the optimiser's own, in its places, whatever happens to the optimiser meanwhile."""

import copy

import pytest
import torch
from torch import nn

from bayesmeta import compiling, costs, meta_train, traced_step
from bayesmeta.adam import AdamStep
from bayesmeta.learners import MAML, CompletePooling

from .test_compiling import Tasks, as_traced, assert_same_training, radon, run_again, trained


@pytest.mark.parametrize("clip", [None, 0.1])
def test_adams_steps_in_the_graph_are_the_optimisers(clip, float64, monkeypatch):
    """Its own state too, so that an eager step, a checkpoint or a schedule goes on from it."""
    as_traced(monkeypatch)
    taken, runs = [], []
    took = AdamStep.took
    monkeypatch.setattr(AdamStep, "took", lambda self: (taken.append(1), took(self))[1])
    for mode in (True, False):
        made = []
        options = {
            "optimizer": lambda p, made=made: made.append(torch.optim.Adam(p, 0.01)) or made[0], "clip": clip, "steps": 9,
            "schedule": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
        }  # fmt: skip
        parameters, history, _ = trained(lambda: MAML(radon(), inner_steps=2, inner_lr=0.02), mode, **options)
        runs.append((parameters, history.loss, made[0].state_dict()["state"], made[0].param_groups[0]["lr"]))
    assert len(taken) == 7  # the first two are held to the optimiser's own
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["traced", "compiled"])
def test_a_step_that_is_too_long_for_the_graph_is_the_optimisers(backend, float64, monkeypatch):
    """Nothing has been written by then: the eager step starts from the same parameters and the same state."""
    if backend == "traced":
        as_traced(monkeypatch)
    far = lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 1e34 if k == 4 else 0.0 if k > 4 else 1.0)  # noqa: E731
    runs = []
    for mode in (True, False):
        made = []
        options = {"optimizer": lambda p, made=made: made.append(torch.optim.Adam(p, 0.01)) or made[0], "schedule": far, "steps": 5}
        parameters, history, _ = trained(lambda: MAML(radon(), inner_steps=1, inner_lr=0.02), mode, **options)
        runs.append((parameters, history.loss, made[0].state_dict()["state"]))
    assert max(p.abs().max() for p in runs[0][0]) > 1e30
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["traced", "compiled"])
def test_a_step_on_bad_data_has_written_nothing(backend, float64, monkeypatch):
    if backend == "traced":
        as_traced(monkeypatch)
    learner, made, seen = MAML(radon(), inner_steps=1, inner_lr=0.02), [], []

    class Worse(Tasks):
        calls = 0

        def sample(self, num_tasks, *, generator):
            e = super().sample(num_tasks, generator=generator)
            Worse.calls += 1
            if Worse.calls == 7:
                seen[:] = [copy.deepcopy(learner.state_dict()), copy.deepcopy(made[0].state_dict())]
                e.query.y[1, 0] = 1e200
            return e

    with pytest.raises(ValueError, match=r"query\.y: task 1, point 0: expected a finite number of size at most"):
        meta_train(learner, Worse(), steps=9, compile=True, optimizer=lambda p: made.append(torch.optim.Adam(p, 0.01)) or made[0])
    torch.testing.assert_close([dict(learner.state_dict()), made[0].state_dict()], seen, rtol=0, atol=0)


class Restarts(torch.optim.lr_scheduler.LRScheduler):
    """Does something to the optimiser after each step."""

    def __init__(self, optimizer, act):
        self.act, self.number = act, -1
        super().__init__(optimizer)

    def get_lr(self):
        return [group["lr"] for group in self.optimizer.param_groups]

    def step(self, epoch=None):
        super().step()
        self.number += 1
        self.act(self.optimizer, self.number)


def decay_later(optimiser, number):
    if number == 5:
        optimiser.param_groups[0].update(weight_decay=0.1, betas=(0.5, 0.9))


def forget(optimiser, number):
    if number in (5, 6, 11):
        optimiser.state.clear()


SCHEDULES = {
    "momentum too": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.02, total_steps=15, max_momentum=0.9, base_momentum=0.5),
    "other settings later": lambda o: Restarts(o, decay_later),
    "a state that is forgotten": lambda o: Restarts(o, forget),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_what_a_schedule_does_to_adam_is_followed(schedule, float64, monkeypatch):
    as_traced(monkeypatch)
    options = {"optimizer": lambda p: torch.optim.Adam(p, 0.01), "steps": 14, "schedule": schedule}
    make = lambda: MAML(radon(), inner_steps=1, inner_lr=0.02)  # noqa: E731
    assert_same_training(trained(make, True, **options), trained(make, False, **options), rtol=1e-9, atol=1e-11)


def test_parameters_that_were_moved_less_often_have_steps_of_their_own(float64, monkeypatch):
    """Batches of 3 tasks reach one parameter alone, those of 4 all."""
    as_traced(monkeypatch)

    class Partly(CompletePooling):
        def meta_loss(self, episode, *, generator=None):
            losses = super().meta_loss(episode, generator=generator)
            if episode.support.num_tasks == 4:
                return losses
            return self.model.params["noise"] + 0.0 * losses.detach()

    class Sizes(Tasks):
        calls = 0

        def sample(self, num_tasks, *, generator):
            Sizes.calls += 1
            return super().sample(3 if Sizes.calls in (2, 3, 8, 9) else 4, generator=generator)

    options = {"optimizer": lambda p: torch.optim.Adam(p, 0.01), "steps": 16}
    runs = []
    for mode in (True, False):
        Sizes.calls = 0
        runs.append(trained(lambda: Partly(radon()), mode, Sizes(), **options))
    assert_same_training(*runs, rtol=1e-9, atol=1e-11)


def test_a_graph_is_not_lent_to_an_adam_that_counts_in_another_type(float64):
    learner, eager = (MAML(radon(), inner_steps=1, inner_lr=0.02) for _ in range(2))
    states = []
    for fused in (False, True, False):
        made = []
        options = {"optimizer": lambda p, fused=fused, made=made: made.append(torch.optim.Adam(p, 1e-3, fused=fused)) or made[-1]}
        assert_same_training(run_again(learner, **options), run_again(eager, False, **options), rtol=1e-9, atol=1e-10)
        states.append([s["step"].item() for s in made[0].state.values()])
    assert states == [[5.0] * 2] * 3


def test_a_way_back_that_fails_leaves_the_step_taken_once(float64, monkeypatch):
    as_traced(monkeypatch)
    made, tried = [], []

    def full(*_):
        tried.append(1)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(costs, "tracing", lambda seconds: 0.0)
    monkeypatch.setattr(costs, "compiling", lambda graphs, seconds: 0.0)
    compiled = compiling.StepCompiler._compile

    def compile_then_break(self, step, episode):
        compiled(self, step, episode)
        step.before = 0.0  # no step is faster than that
        monkeypatch.setattr(traced_step.StepTracer, "uncompiled", full)

    monkeypatch.setattr(compiling.StepCompiler, "_compile", compile_then_break)
    options = {"optimizer": lambda p: made.append(torch.optim.Adam(p, 0.01)) or made[-1], "steps": 40}
    make = lambda: MAML(radon(), inner_steps=1, inner_lr=0.02)  # noqa: E731
    assert_same_training(trained(make, "auto", **options), trained(make, False, **options), rtol=1e-9, atol=1e-11)
    assert tried and {s["step"].item() for s in made[0].state.values()} == {40.0}


def test_gradients_that_a_graph_has_used_up_are_not_told(float64, monkeypatch):
    as_traced(monkeypatch)
    learner = MAML(radon(), inner_steps=1, inner_lr=0.02)
    told = []
    run_again(
        learner, optimizer=lambda p: torch.optim.Adam(p, 0.01),
        schedule=lambda o: Restarts(o, lambda o, _: told.append({p.grad is None for p in learner.trained_parameters()})),
    )  # fmt: skip
    assert told[1:3] == [{False}] * 2 and told[4:] == [{True}] * 2


def test_adams_state_is_looked_up_at_each_step():
    a, b = (nn.Parameter(torch.full((2,), v)) for v in (1.0, 2.0))
    optimiser = torch.optim.Adam([a, b], 0.1)
    step = AdamStep.of(optimiser, [a, b], None)
    assert [v.tolist() for v in step.inputs()] == [pytest.approx(0.1), [0, 0], [0] * 4, [0] * 4]
    a.grad = torch.ones(2)
    optimiser.step()
    _, taken, first, _ = step.inputs()  # b has no state: nobody has moved it
    assert taken.tolist() == [1, 0] and first.tolist() == pytest.approx([0.1, 0.1, 0, 0]) and b not in optimiser.state
    b.grad = torch.ones(2)
    optimiser.step()
    step.inputs()
    state = optimiser.state_dict()
    for k in state["state"]:
        state["state"][k] = state["state"][k] | {"step": torch.tensor(50.0)}
    optimiser.load_state_dict(state)
    _, taken, first, second = step.inputs()
    assert taken.tolist() == [50, 50] and step.inputs()[2] is first
    for written in (taken, first, second):  # as a graph does
        written += 1
    step.took()
    assert optimiser.state[a]["step"] == optimiser.state[b]["step"] == 51
    assert torch.equal(optimiser.state[b]["exp_avg"], first[2:]) and torch.equal(optimiser.state[a]["exp_avg_sq"], second[:2])
    before = first.clone()
    optimiser.step()  # its own, on the same numbers
    assert step.inputs()[2] is first and not torch.equal(first, before)


def test_an_optimiser_that_is_not_plain_adam_takes_its_own_steps():
    p = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(()))]
    mixed, turned = [p[0], nn.Parameter(torch.ones(2).double())], [p[0], nn.Parameter(torch.ones(2, 3).t())]
    for odd in (mixed, turned):
        assert AdamStep.of(torch.optim.Adam(odd, 0.1), odd, None) is None
    assert AdamStep.of(torch.optim.Adam(p, 0.1), p, None) is not None
    for other in (
        torch.optim.SGD(p, 0.1), torch.optim.AdamW(p, 0.1), torch.optim.Adam(p, 0.1, amsgrad=True), torch.optim.Adam(p[:1], 0.1),
        torch.optim.Adam(p, 0.1, weight_decay=0.1), torch.optim.Adam([{"params": p[:1]}, {"params": p[1:]}], 0.1),
        torch.optim.Adam(p, torch.tensor(0.1)), torch.optim.Adam(p, 0.1, maximize=True),
    ):  # fmt: skip
        assert AdamStep.of(other, p, None) is None
    hooked = torch.optim.Adam(p, 0.1)
    hooked.register_step_post_hook(lambda *_: None)
    assert AdamStep.of(hooked, p, None) is None


def test_a_graph_whose_steps_are_not_the_optimisers_gives_its_gradients_alone(float64, monkeypatch):
    as_traced(monkeypatch)
    step = AdamStep.__call__
    monkeypatch.setattr(AdamStep, "__call__", lambda self, *args: (args[3], [1.1 * v for v in step(self, *args)[1]]))
    options = {"optimizer": lambda p: torch.optim.Adam(p, 0.01), "steps": 6}
    make = lambda: MAML(radon(), inner_steps=2, inner_lr=0.02)  # noqa: E731
    assert_same_training(trained(make, True, **options), trained(make, False, **options))
