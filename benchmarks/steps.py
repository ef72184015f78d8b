"""Milliseconds a meta-step, side by side: eager, compiled, and what libraries do, a plain PyTorch loop over tasks.

    python benchmarks/steps.py                     all workloads
    python benchmarks/steps.py --only W1 --repeats 50

W1: sinusoid MAML, MLP 1-40-40-1, 25 tasks, 10 + 10 points, second order, 1 and 5 inner steps. W5: a hierarchical regression as a Pyro
program (a level and a slope for each county), 85 tasks of 8 + 8 points, MAML with 5 steps; the loop is hand-written, without Pyro. Each
step is loss, gradient and an Adam step of θ, as in `bayesmeta.meta_train`. "traced" is the graph without the compiler. Medians of
interleaved repeats; the time to trace and compile is given apart (with the compiler's disk cache as it is). All contenders' first losses
are compared.
"""

import argparse
import datetime
import math
import os
import platform
import statistics
import time

import torch
from torch import nn
from torch.func import functional_call

import bayesmeta as bm
from bayesmeta.compiling import StepCompiler, inductor
from bayesmeta.recipes import hierarchical_regression, multilayer
from bayesmeta.training import _Run


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return multilayer(1, 40, 40, 1)


def sinusoids() -> bm.Episode:
    return bm.tasks.Sinusoid.maml().sample(25, generator=torch.Generator().manual_seed(0))


def counties() -> bm.Episode:
    generator = torch.Generator().manual_seed(0)
    level, effect = torch.randn(2, 85, 1, generator=generator)
    sets = []
    for _ in range(2):
        x = torch.rand(85, 8, 1, generator=generator).round()
        sets += [x, 1 + level + effect * x[..., 0] + torch.randn(85, 8, generator=generator)]
    return bm.Episode.from_tuple(sets)


def sinusoid_learner(steps: int) -> bm.learners.MAML:
    model = bm.HierarchicalModel.from_network(bm.networks.WeightNetwork(mlp()), bm.likelihoods.Gaussian(0.5**0.5, learn=False))
    return bm.learners.MAML(model, inner_steps=steps, inner_lr=0.01)


def radon_learner(steps: int) -> bm.learners.MAML:
    program = hierarchical_regression(torch.tensor([1.0, -0.5]), torch.ones(2), 1.0)
    return bm.learners.MAML(bm.HierarchicalModel(program), inner_steps=steps, inner_lr=0.05)


def sinusoid_loop(steps: int):
    """Loss over the tasks one after the other, and the parameters."""
    module = mlp()
    names, parameters = zip(*module.named_parameters(), strict=True)
    constant = 0.5 * math.log(math.pi)  # of a Gaussian of variance ½

    def nll(values, x, y):
        return (functional_call(module, dict(zip(names, values, strict=True)), (x,))[:, 0] - y).square().mean() + constant

    def loss(e):
        total = 0.0
        for x, y, qx, qy in zip(e.support.x, e.support.y, e.query.x, e.query.y, strict=True):
            fast = parameters
            for _ in range(steps):
                fast = [v - 0.01 * g for v, g in zip(fast, torch.autograd.grad(nll(fast, x, y), fast, create_graph=True), strict=True)]
            total = total + nll(fast, qx, qy)
        return total / e.num_tasks

    return loss, list(parameters)


def radon_loop(steps: int):
    mean, log_noise = nn.Parameter(torch.tensor([1.0, -0.5])), nn.Parameter(torch.tensor(0.0))

    constant = 0.5 * math.log(2 * math.pi)

    def nll(phi, x, y):
        return 0.5 * ((y - phi[0] - phi[1] * x[:, 0]) / log_noise.exp()).square().mean() + log_noise + constant

    def loss(e):
        total = 0.0
        for x, y, qx, qy in zip(e.support.x, e.support.y, e.query.x, e.query.y, strict=True):
            phi = mean
            for _ in range(steps):
                phi = phi - 0.05 * torch.autograd.grad(nll(phi, x, y), phi, create_graph=True)[0]
            total = total + nll(phi, qx, qy)
        return total / e.num_tasks

    return loss, [mean, log_noise]


WORKLOADS = {
    "W1, 1 step": (sinusoid_learner, sinusoid_loop, sinusoids, 1),
    "W1, 5 steps": (sinusoid_learner, sinusoid_loop, sinusoids, 5),
    "W5, 5 steps": (radon_learner, radon_loop, counties, 5),
}


def ours(learner, episode, mode, backend):
    """A training step as `meta_train` takes it, and how long its first took."""
    learner.materialise(episode)
    parameters, generator = learner.trained_parameters(), torch.Generator().manual_seed(0)
    run = _Run(learner, parameters, torch.optim.Adam(parameters, 1e-3, fused=True), None, generator)
    run.compiler = StepCompiler(learner, parameters, run.losses, 1, generator, mode=mode, backend=backend)

    def step():
        # other data at every step, as in training: what was seen of the last ones does not help
        data = bm.Episode(*(p._replace(y=p.y.clone()) for p in episode))
        return run.step(data, 1, None, "raise", 1)

    start = time.perf_counter()
    first = step()
    seconds = time.perf_counter() - start
    for _ in range(5):
        step()
    assert mode is False or run.compiler.why_eager is None, run.compiler.why_eager
    return step, first, seconds


def by_loop(make, steps, episode):
    loss, parameters = make(steps)
    optimiser = torch.optim.Adam(parameters, 1e-3)

    def step():
        value = loss(episode)
        optimiser.zero_grad()
        value.backward(inputs=parameters)
        optimiser.step()
        return value.item()

    return step, step(), 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--only", default="", help="workloads whose name begins so")
    options = parser.parse_args()
    print(f"{datetime.date.today()}, torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores, "
          f"load {os.getloadavg()[0]:.1f}, float32, medians of {options.repeats}")  # fmt: skip
    print(f"{'':14}{'loop':>10}{'eager':>10}{'traced':>10}{'compiled':>10}   loop/compiled  eager/compiled   trace s  trace and compile s")
    for name, (make, make_loop, data, steps) in WORKLOADS.items():
        if not name.startswith(options.only):
            continue
        episode = data()
        contenders = {
            "loop": by_loop(make_loop, steps, episode),
            "eager": ours(make(steps), episode, False, None),
            "traced": ours(make(steps), episode, True, lambda module, inputs: module),
            "compiled": ours(make(steps), episode, True, inductor),
        }
        losses = {kind: first for kind, (_, first, _) in contenders.items()}
        assert max(losses.values()) - min(losses.values()) < 1e-4 * abs(losses["loop"]), losses
        times = {kind: [] for kind in contenders}
        for _ in range(options.repeats):
            for kind, (step, _, _) in contenders.items():
                inner = 1 if kind == "loop" else 10
                start = time.perf_counter()
                for _ in range(inner):
                    step()
                times[kind].append(1000 * (time.perf_counter() - start) / inner)
        ms = {kind: statistics.median(values) for kind, values in times.items()}
        print(
            f"{name:14}" + "".join(f"{ms[kind]:10.2f}" for kind in contenders)
            + f"{ms['loop'] / ms['compiled']:15.1f}×{ms['eager'] / ms['compiled']:15.1f}×"
            + f"{contenders['traced'][2]:10.1f}{contenders['compiled'][2]:21.1f}", flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
