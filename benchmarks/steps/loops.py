"""What libraries do: plain PyTorch, one task's loss at a time in a Python loop; and the same losses under `torch.func.vmap`.

A task's loss is written once, from the papers' lines, with the inner gradient left open: `autograd.grad(create_graph=True)` for the loop,
`torch.func.grad` for vmap. BMAML's particles and ABML's draws are batched by hand in both, which favours them; "unbatched" is the loop that
takes them one after the other, as one does around a module that has one set of weights.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.func import functional_call, grad, grad_and_value, vmap
from torch.nn.functional import cross_entropy

from . import amortised, ours, workloads
from .workloads import Contender, Workload

Parameters = dict[str, Tensor]
Loss = Callable[..., Tensor]  # (parameters, *the task's noise, x, y, qx, qy) -> ()
Gradient = Callable[[Loss], Callable[..., Parameters]]
Likelihood = Callable[[Tensor, Tensor, Tensor], Tensor]


def unbatched(w: Workload) -> Contender | None:
    """A Python loop over tasks, and within a task one over particles or draws; None where there are none of these."""
    return loop(w, one_by_one) if w.kind in ("bmaml", "abml") else None


def loop(w: Workload, likelihood: Likelihood | None = None) -> Contender:
    """A Python loop over tasks."""

    def create_graph(f: Loss) -> Callable[..., Parameters]:
        def gradient(at: Parameters, *rest: Tensor) -> Parameters:
            return dict(zip(at, torch.autograd.grad(f(at, *rest), list(at.values()), create_graph=True), strict=True))

        return gradient

    parameters, loss, data = problem(w, create_graph, likelihood)

    def gradient(parameters: Parameters, *data: Tensor) -> tuple[Tensor, Parameters]:
        value = torch.stack([loss(parameters, *task) for task in zip(*data, strict=True)]).mean()
        return value, dict(zip(parameters, torch.autograd.grad(value, list(parameters.values())), strict=True))

    return _contender(parameters, gradient, data)


def vmapped(w: Workload) -> Contender:
    """`vmap` over tasks, `grad` inside and outside, eager."""
    parameters, loss, data = problem(w, grad)

    def mean(parameters: Parameters, *data: Tensor) -> Tensor:
        return vmap(loss, in_dims=(None, *(0 for _ in data)))(parameters, *data).mean()

    def gradient(parameters: Parameters, *data: Tensor) -> tuple[Tensor, Parameters]:
        return grad_and_value(mean)(parameters, *data)[::-1]

    return _contender(parameters, gradient, data)


def _contender(parameters: Parameters, gradient: Callable[..., tuple[Tensor, Parameters]], data: Iterator[tuple[Tensor, ...]]) -> Contender:
    optimiser = torch.optim.Adam(parameters.values(), workloads.ADAM, fused=True)

    def step() -> float:
        value, gradients = gradient(parameters, *next(data))
        for name, parameter in parameters.items():
            parameter.grad = gradients[name]
        optimiser.step()
        return value.item()

    return Contender.of(step)


def problem(
    w: Workload, gradient: Gradient, likelihood: Likelihood | None = None
) -> tuple[Parameters, Loss, Iterator[tuple[Tensor, ...]]]:  # fmt: skip
    """The parameters where they start, a task's loss, and for each step its noise and data, every tensor with tasks in front."""
    start = {name: value.detach().clone().to(w.device) for name, value in start_of(w).items()}
    if w.kind == "elbo":
        return _leaves(start), amortised.task_loss, with_noise(w)
    bayesian = {"bmaml": bmaml, "abml": abml}.get(w.kind)
    loss = maml(w, gradient) if bayesian is None else bayesian(w, gradient, likelihood or log_likelihood)
    return _leaves(start), loss, with_noise(w)


def start_of(w: Workload) -> Parameters:
    """The learned numbers where they start, by name."""
    if w.kind == "sinusoid":
        return dict(workloads.mlp().named_parameters())
    if w.kind == "omniglot":
        return dict(workloads.convolutions().named_parameters())
    if w.kind == "radon":
        return {"mean": torch.tensor([1.0, -0.5]), "log_noise": torch.tensor(0.0)}
    learner = ours.learner(w)
    names = {id(p): n for n, p in learner.named_parameters()}
    short = {"model.program.prior.loc": "loc", "model.program.prior.log_scale": "log_scale", "starts.value": "starts"}
    return {short.get(names[id(p)], names[id(p)]): p for p in learner.trained_parameters()}


def noise_of(w: Workload, generator: torch.Generator) -> tuple[Tensor, ...]:
    """A step's noise, tasks in front, drawn in the order in which the package draws it."""
    if w.kind == "elbo":
        return (torch.stack([torch.randn(w.tasks, generator=generator) for _ in range(2)], -1),)
    if w.kind != "abml":
        return ()
    inner = torch.stack([torch.randn(workloads.DRAWS, 1, DIM, generator=generator)[:, 0] for _ in range(w.steps)])
    return inner.expand(w.tasks, *inner.shape), torch.randn(w.tasks, DIM, generator=generator)


def with_noise(w: Workload) -> Iterator[tuple[Tensor, ...]]:
    (x, y, _), (qx, qy, _) = workloads.episode(w)
    generator = torch.Generator().manual_seed(0)
    while True:
        yield (*(noise.to(w.device) for noise in noise_of(w, generator)), x, y, qx, qy)


def _leaves(values: Parameters) -> Parameters:
    return {name: value.requires_grad_() for name, value in values.items()}


# --- a task's losses


def maml(w: Workload, gradient: Gradient) -> Loss:
    """φ ← φ − α ∇ mean NLL(S), K times; mean NLL(Q)."""
    nll = {"sinusoid": _sinusoid_nll, "omniglot": _image_nll, "radon": _radon_nll}[w.kind]()

    def loss(theta: Parameters, x: Tensor, y: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        shared = {n: v for n, v in theta.items() if n == "log_noise"}
        fast = {n: v for n, v in theta.items() if n != "log_noise"}
        for _ in range(w.steps):
            step = gradient(lambda at, x, y: nll(at | shared, x, y))(fast, x, y)
            fast = {n: v - w.inner_lr * step[n] for n, v in fast.items()}
        return nll(fast | shared, qx, qy)

    return loss


def _sinusoid_nll() -> Loss:
    module, constant = workloads.mlp(), 0.5 * math.log(math.pi)
    return lambda weights, x, y: (functional_call(module, weights, (x,))[:, 0] - y).square().mean() + constant


def _image_nll() -> Loss:
    module = workloads.convolutions()
    return lambda weights, x, y: cross_entropy(functional_call(module, weights, (x,)), y)


def _radon_nll() -> Loss:
    def nll(at: Parameters, x: Tensor, y: Tensor) -> Tensor:
        mean = at["mean"][0] + at["mean"][1] * x[:, 0]
        return 0.5 * ((y - mean) / at["log_noise"].exp()).square().mean() + at["log_noise"] + 0.5 * math.log(2 * math.pi)

    return nll


SIZES = (40, 40, 1600, 40, 40, 1)  # weights and biases of the MLP 1-40-40-1, packed
DIM = sum(SIZES)
LOG_2PI = math.log(2 * math.pi)


def network(phi: Tensor, x: Tensor) -> Tensor:
    """The MLP with weights ``phi (S, D)`` at ``x (N, 1)``: ``(S, N)``."""
    w1, b1, w2, b2, w3, b3 = phi.split(SIZES, -1)
    h = (x[:, 0, None] * w1[:, None] + b1[:, None]).relu()
    h = (h @ w2.unflatten(-1, (40, 40)).mT + b2[:, None]).relu()
    return (h @ w3[..., None])[..., 0] + b3


def log_likelihood(phi: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """log p(y_j | φ), ``(S, N)``."""
    return -0.5 * ((network(phi, x) - y) / workloads.NOISE).square() - math.log(workloads.NOISE) - 0.5 * LOG_2PI


def one_by_one(phi: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """`log_likelihood` without a batch, one φ after the other."""
    return torch.cat([log_likelihood(one[None], x, y) for one in phi])


def bmaml(w: Workload, gradient: Gradient, log_likelihood: Likelihood) -> Loss:
    """K Stein steps of M particles on log p(S, φ | θ); the mixture's mean NLL of Q."""

    def loss(theta: Parameters, x: Tensor, y: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        def minus_log_joint(at: Parameters, x: Tensor, y: Tensor) -> Tensor:
            prior = -0.5 * ((at["phi"] - theta["loc"]) / theta["log_scale"].exp()).square() - theta["log_scale"]
            return -(log_likelihood(at["phi"], x, y).sum() + prior.sum())

        phi = theta["starts"]
        for _ in range(w.steps):
            phi = phi + w.inner_lr * _stein(phi, -gradient(minus_log_joint)({"phi": phi}, x, y)["phi"])
        return -(torch.logsumexp(log_likelihood(phi, qx, qy), 0) - math.log(len(phi))).mean()

    return loss


def _stein(phi: Tensor, score: Tensor) -> Tensor:
    """1/M Σ_n [ k(φ_n, φ_m) score_n + ∇_{φ_n} k(φ_n, φ_m) ], the bandwidth the median over pairs / log(M + 1)."""
    m = len(phi)
    if m == 1:
        return score
    squares = (phi[:, None] - phi).square().sum(-1)
    first, second = torch.triu_indices(m, m, 1)
    h = squares.detach()[first, second].median() / math.log(m + 1)
    k = (-squares / h).exp()
    return (k @ score + 2 / h * (k.sum(1)[:, None] * phi - k @ phi)) / m


def antithetic(noise: Tensor) -> Tensor:
    """``(..., S, D)``: the second half the first one's negative, scaled to variance 1."""
    draws = noise.shape[-2]
    half = noise[..., : math.ceil(draws / 2), :]
    both = torch.cat([half, -half], -2)[..., :draws, :]
    return both / both.square().mean(-2, keepdim=True).sqrt()


def abml(w: Workload, gradient: Gradient, log_likelihood: Likelihood) -> Loss:
    """K steps of q = N(μ, σ²) in units of the prior's sd on −ELBO(S) / N_S; −ELBO of S ∪ Q at one draw."""

    def loss(theta: Parameters, inner: Tensor, outer: Tensor, x: Tensor, y: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        loc, scale, noise = theta["loc"], theta["log_scale"].exp(), antithetic(inner)

        def minus_elbo(mu: Tensor, sigma: Tensor, noise: Tensor, x: Tensor, y: Tensor) -> Tensor:
            ratio = (sigma / scale).square()
            kl = 0.5 * (ratio + ((mu - loc) / scale).square() - 1 - ratio.log()).sum()
            return kl - log_likelihood(mu + sigma.abs() * noise, x, y).sum(-1).mean()

        def inner_loss(at: Parameters, noise: Tensor, x: Tensor, y: Tensor) -> Tensor:
            return minus_elbo(loc + scale * at["mu"], scale + scale * at["sigma"], noise, x, y) / len(y)

        at = {"mu": loc * 0, "sigma": loc * 0}  # steps so far, in prior sds
        for k in range(w.steps):
            step = gradient(inner_loss)(at, noise[k], x, y)
            at = {name: v - w.inner_lr * step[name] for name, v in at.items()}
        x, y = torch.cat([x, qx]), torch.cat([y, qy])
        return minus_elbo(loc + scale * at["mu"], scale + scale * at["sigma"], outer[None], x, y)

    return loss
