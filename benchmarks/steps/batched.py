"""What an expert writes for one model and one learner: tasks batched by hand, `torch.compile` over loss, gradient and Adam in one graph.

On a GPU its kernels are recorded once (a CUDA graph).
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, grad_and_value
from torch.utils._pytree import tree_leaves

from . import amortised, loops, workloads
from .loops import Parameters
from .workloads import Contender, Workload


def batched(w: Workload) -> Contender | None:
    """None for a workload that nobody has written out."""
    makers: dict[str, Callable[[Workload], Callable[..., Tensor]]] = {"sinusoid": _sinusoid, "radon": _radon, "elbo": lambda w: _elbo}
    if w.kind not in makers:
        return None
    loss = makers[w.kind](w)
    data = loops.with_noise(w)
    parameters = {n: v.detach().clone().to(w.device) for n, v in loops.start_of(w).items()}
    state = [parameters, *({n: torch.zeros_like(v) for n, v in parameters.items()} for _ in range(2))]
    count = torch.zeros((), device=w.device)

    @torch.compile(fullgraph=True)
    def update(parameters: Parameters, first: Parameters, second: Parameters, count: Tensor, *data: Tensor) -> tuple:
        gradients, value = grad_and_value(loss)(parameters, *data)
        count = count + 1
        first = {n: 0.9 * first[n] + 0.1 * g for n, g in gradients.items()}
        second = {n: 0.999 * second[n] + 0.001 * g.square() for n, g in gradients.items()}
        rate, root = workloads.ADAM / (1 - 0.9**count), (1 - 0.999**count).sqrt()
        new = {n: v - rate * first[n] / (second[n].sqrt() / root + 1e-8) for n, v in parameters.items()}
        return value, new, first, second, count

    @torch.no_grad()
    def step() -> float:
        nonlocal state, count
        value, *state, count = update(*state, count, *next(data))
        return value.item()

    torch.compiler.reset()
    return Contender.of(step if w.device == "cpu" else _recorded(update, [*state, count], data))


def _recorded(update: Callable[..., tuple], state: list[Any], data: Iterator[tuple[Tensor, ...]]) -> Callable[[], float]:
    """Steps of ``update``, all of whose kernels are launched by one call; parameters and data stay where they are."""
    fed = [v.clone() for v in next(data)]

    @torch.no_grad()
    def once() -> Tensor:
        value, *new = update(*state, *fed)
        torch._foreach_copy_(tree_leaves(state), tree_leaves(new))
        return value

    start = [v.clone() for v in tree_leaves(state)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        once()
    torch.cuda.current_stream().wait_stream(stream)
    recording = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recording):
        value = once()
    torch._foreach_copy_(tree_leaves(state), start)
    feed = itertools.chain([tuple(v.clone() for v in fed)], data)

    def step() -> float:
        torch._foreach_copy_(fed, list(next(feed)))
        recording.replay()
        return value.item()

    return step


def _sinusoid(w: Workload) -> Callable[..., Tensor]:
    def nll(p: Parameters, x: Tensor, y: Tensor) -> Tensor:
        """``(T,)``; weights ``(T, O, I)``."""
        h = (x * p["0.weight"].mT + p["0.bias"][:, None]).relu()
        h = torch.baddbmm(p["2.bias"][:, None], h, p["2.weight"].mT).relu()
        out = torch.baddbmm(p["4.bias"][:, None], h, p["4.weight"].mT)[..., 0]
        return (out - y).square().mean(1) + 0.5 * math.log(math.pi)

    def loss(theta: Parameters, x: Tensor, y: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        fast = {n: v.expand(w.tasks, *v.shape) for n, v in theta.items()}
        for _ in range(w.steps):
            gradients = grad(lambda p: nll(p, x, y).sum())(fast)
            fast = {n: v - w.inner_lr * gradients[n] for n, v in fast.items()}
        return nll(fast, qx, qy).mean()

    return loss


def _radon(w: Workload) -> Callable[..., Tensor]:
    def nll(phi: Tensor, log_noise: Tensor, x: Tensor, y: Tensor) -> Tensor:
        mean = phi[:, :1] + phi[:, 1:] * x[..., 0]
        return 0.5 * ((y - mean) / log_noise.exp()).square().mean(1) + log_noise + 0.5 * math.log(2 * math.pi)

    def loss(theta: Parameters, x: Tensor, y: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        phi = theta["mean"].expand(w.tasks, 2)
        for _ in range(w.steps):
            phi = phi - w.inner_lr * grad(lambda phi: nll(phi, theta["log_noise"], x, y).sum())(phi)
        return nll(phi, theta["log_noise"], qx, qy).mean()

    return loss


def _elbo(theta: Parameters, *data: Tensor) -> Tensor:
    return amortised.task_loss(theta, *data).mean()
