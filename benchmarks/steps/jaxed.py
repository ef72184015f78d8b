"""The same steps in JAX, jitted whole: each task's loss under `vmap`, its gradient, Adam. And NumPyro's ELBO step.

Written from the formulas in the learners' docstrings. First losses are taken on the noise that the package draws; the steps that are timed
draw their own inside of the jitted function.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import Array, lax
from jax.nn import relu, silu, softplus

from . import loops, workloads
from .workloads import Contender, Workload

Theta = dict[str, Array]
Loss = Callable[..., Array]  # (θ, *the task's noise, x, y, qx, qy) -> ()
LOG_2PI = math.log(2 * math.pi)


def jitted(w: Workload) -> Contender | None:
    """None where JAX does not have the workload's device."""
    if jax.default_backend() != ("cpu" if w.device == "cpu" else "gpu"):
        return None
    jax.config.update("jax_default_matmul_precision", "float32")  # on a GPU it would be TensorFloat-32
    theta = {n: jnp.asarray(v.detach().cpu().numpy()) for n, v in loops.start_of(w).items()}
    data, loss = _data(w), _loss(w)

    @partial(jax.jit, donate_argnums=(0, 1, 2))
    def update(theta: Theta, first: Theta, second: Theta, count: Array, data: list[Array]) -> tuple[Any, ...]:
        value, gradient = jax.value_and_grad(loss)(theta, _noise(w, jax.random.fold_in(jax.random.key(0), count)), data)
        count = count + 1
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradient)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, second, gradient)
        rate, root = workloads.ADAM / (1 - 0.9**count), jnp.sqrt(1 - 0.999**count)
        theta = jax.tree.map(lambda p, m, v: p - rate * m / (jnp.sqrt(v) / root + 1e-8), theta, first, second)
        return value, theta, first, second, count

    fed = tuple(jnp.asarray(v.numpy()) for v in loops.noise_of(w, torch.Generator().manual_seed(0)))
    known = [float(jax.jit(loss)(theta, fed, data))] if w.is_random else []
    state = [theta, *(jax.tree.map(jnp.zeros_like, theta) for _ in range(2)), jnp.zeros((), jnp.int32)]

    def step() -> float:
        nonlocal state
        value, *state = update(*state, data)
        return float(value)

    contender = Contender.of(step)
    contender.losses = known or contender.losses
    return contender


def mean_loss(w: Workload) -> Callable[[Theta, Array], Array]:
    """The loss at θ under the noise of a key."""
    data, loss = _data(w), _loss(w)
    return lambda theta, key: loss(theta, _noise(w, key), data)


def _loss(w: Workload) -> Callable[[Theta, tuple[Array, ...], list[Array]], Array]:
    task_loss = {"bmaml": bmaml, "abml": abml, "elbo": elbo}.get(w.kind, maml)(w)
    return lambda theta, noise, data: jax.vmap(task_loss, (None, *(0 for _ in (*noise, *data))))(theta, *noise, *data).mean()


def _data(w: Workload) -> list[Array]:
    (x, y, _), (qx, qy, _) = workloads.episode(w)
    return [jnp.asarray(v.cpu().numpy()) for v in (x, y, qx, qy)]


def _noise(w: Workload, key: Array) -> tuple[Array, ...]:
    if w.kind == "elbo":
        return (jax.random.normal(key, (w.tasks, 2)),)
    if w.kind != "abml":
        return ()
    inner, outer = jax.random.split(key)
    size = (w.steps, workloads.DRAWS, loops.DIM)
    shared = jnp.broadcast_to(jax.random.normal(inner, size), (w.tasks, *size))
    return shared, jax.random.normal(outer, (w.tasks, loops.DIM))


# --- MAML


def maml(w: Workload) -> Loss:
    """φ ← φ − α ∇ mean NLL(S), K times; mean NLL(Q)."""
    nll = {"sinusoid": _sinusoid_nll, "omniglot": _image_nll, "radon": _radon_nll}[w.kind]

    def loss(theta: Theta, x: Array, y: Array, qx: Array, qy: Array) -> Array:
        shared = {n: v for n, v in theta.items() if n == "log_noise"}
        fast = {n: v for n, v in theta.items() if n != "log_noise"}
        for _ in range(w.steps):
            gradient = jax.grad(lambda at: nll(at | shared, x, y))(fast)
            fast = jax.tree.map(lambda v, g: v - w.inner_lr * g, fast, gradient)
        return nll(fast | shared, qx, qy)

    return loss


def _sinusoid_nll(p: Theta, x: Array, y: Array) -> Array:
    h = relu(x @ p["0.weight"].T + p["0.bias"])
    h = relu(h @ p["2.weight"].T + p["2.bias"])
    out = h @ p["4.weight"].T + p["4.bias"]
    return jnp.mean((out[:, 0] - y) ** 2) + 0.5 * math.log(math.pi)


def _radon_nll(p: Theta, x: Array, y: Array) -> Array:
    mean = p["mean"][0] + p["mean"][1] * x[:, 0]
    return 0.5 * jnp.mean(((y - mean) / jnp.exp(p["log_noise"])) ** 2) + p["log_noise"] + 0.5 * LOG_2PI


def _image_nll(p: Theta, x: Array, y: Array) -> Array:
    h = x
    for layer in (0, 3, 6, 9):
        h = lax.conv_general_dilated(h, p[f"{layer}.weight"], (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NCHW", "OIHW", "NCHW"))
        h = h + p[f"{layer}.bias"][:, None, None]
        h = (h - h.mean((0, 2, 3), keepdims=True)) / jnp.sqrt(h.var((0, 2, 3), keepdims=True) + 1e-5)
        h = relu(h * p[f"{layer + 1}.weight"][:, None, None] + p[f"{layer + 1}.bias"][:, None, None])
    logits = h.reshape(len(h), -1) @ p["13.weight"].T + p["13.bias"]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()


# --- BMAML and ABML on the packed MLP


def log_likelihood(phi: Array, x: Array, y: Array) -> Array:
    """log p(y_j | φ) of one φ ``(D,)``, ``(N,)``."""
    w1, b1, w2, b2, w3, b3 = jnp.split(phi, np.cumsum(loops.SIZES)[:-1])
    h = relu(x * w1 + b1)
    h = relu(h @ w2.reshape(40, 40).T + b2)
    return -0.5 * ((h @ w3 + b3 - y) / workloads.NOISE) ** 2 - math.log(workloads.NOISE) - 0.5 * LOG_2PI


def bmaml(w: Workload) -> Loss:
    """K Stein steps of M particles on log p(S, φ | θ); the mixture's mean NLL of Q."""
    likelihoods = jax.vmap(log_likelihood, (0, None, None))

    def loss(theta: Theta, x: Array, y: Array, qx: Array, qy: Array) -> Array:
        def log_joint(phi: Array) -> Array:
            prior = -0.5 * ((phi - theta["loc"]) / jnp.exp(theta["log_scale"])) ** 2 - theta["log_scale"]
            return log_likelihood(phi, x, y).sum() + prior.sum()

        phi = theta["starts"]
        for _ in range(w.steps):
            phi = phi + w.inner_lr * _stein(phi, jax.vmap(jax.grad(log_joint))(phi))
        return -(jax.nn.logsumexp(likelihoods(phi, qx, qy), 0) - math.log(len(phi))).mean()

    return loss


def _stein(phi: Array, score: Array) -> Array:
    m = len(phi)
    if m == 1:
        return score
    centred = phi - phi.mean(0)
    gram = centred @ centred.T
    squares = jnp.diagonal(gram)[:, None] + jnp.diagonal(gram) - 2 * gram
    pairs = jnp.sort(lax.stop_gradient(squares)[np.triu_indices(m, 1)])
    h = pairs[(len(pairs) - 1) // 2] / math.log(m + 1)
    k = jnp.exp(-squares / h)
    return (k @ score + 2 / h * (k.sum(1)[:, None] * centred - k @ centred)) / m


def abml(w: Workload) -> Loss:
    """K steps of q = N(μ, σ²) in units of the prior's sd on −ELBO(S) / N_S; −ELBO of S ∪ Q at one draw."""
    likelihoods = jax.vmap(log_likelihood, (0, None, None))

    def loss(theta: Theta, inner: Array, outer: Array, x: Array, y: Array, qx: Array, qy: Array) -> Array:
        loc, scale = theta["loc"], jnp.exp(theta["log_scale"])
        half = inner[:, : math.ceil(workloads.DRAWS / 2)]
        noise = jnp.concatenate([half, -half], 1)[:, : workloads.DRAWS]
        noise = noise / jnp.sqrt((noise**2).mean(1, keepdims=True))

        def minus_elbo(q: tuple[Array, Array], noise: Array, x: Array, y: Array) -> Array:
            mu, sigma = loc + scale * q[0], scale + scale * q[1]
            ratio = (sigma / scale) ** 2
            kl = 0.5 * (ratio + ((mu - loc) / scale) ** 2 - 1 - jnp.log(ratio)).sum()
            return kl - likelihoods(mu + jnp.abs(sigma) * noise, x, y).sum(-1).mean()

        q = (jnp.zeros_like(loc), jnp.zeros_like(loc))  # steps so far, in prior sds
        for k in range(w.steps):
            gradient = jax.grad(minus_elbo)(q, noise[k], x, y)
            q = jax.tree.map(lambda v, g: v - w.inner_lr * g / len(y), q, gradient)
        return minus_elbo(q, outer[None], jnp.concatenate([x, qx]), jnp.concatenate([y, qy]))

    return loss


# --- the amortized ELBO


def elbo(w: Workload) -> Loss:
    """−ELBO of S ∪ Q under the amortized q."""

    def loss(theta: Theta, noise: Array, x: Array, y: Array, qx: Array, qy: Array) -> Array:
        x, y = jnp.concatenate([x, qx])[:, 0], jnp.concatenate([y, qy])
        centre, spread, log_residual = theta["model.params.mean"], jnp.exp(theta["model.params.sd"]), theta["model.params.noise"]
        loc, sd = posterior(theta, x, y)
        phi = loc + noise * sd
        log_likelihood = -0.5 * ((y - phi[0] - phi[1] * x) / jnp.exp(log_residual)) ** 2 - log_residual - 0.5 * LOG_2PI
        ratio = (sd / spread) ** 2
        return 0.5 * (ratio + ((loc - centre) / spread) ** 2 - 1 - jnp.log(ratio)).sum() - log_likelihood.sum()

    return loss


def posterior(theta: Theta, x: Array, y: Array) -> tuple[Array, Array]:
    """Mean and sd ``(2,)`` of one task's q(φ | points)."""

    def mlp(name: str, value: Array) -> Array:
        for layer in (0, 2):
            value = silu(value @ theta[f"{name}.{layer}.weight"].T + theta[f"{name}.{layer}.bias"])
        return value @ theta[f"{name}.4.weight"].T + theta[f"{name}.4.bias"]

    f = jnp.stack([x, y, x * x, x * y, y * y], -1)
    mean = jnp.concatenate([mlp("encoder.each", f), f], -1).mean(0)
    e = mlp("encoder.out", jnp.append(mean, math.log1p(len(x))))
    gated = jnp.broadcast_to(theta["factors.gate"] * e, (len(x), len(e)))

    def factor(name: str, own: Array) -> Array:
        direct = own @ theta[f"factors.linear.{name}.weight"].T + theta[f"factors.linear.{name}.bias"]
        return direct + mlp(f"factors.network.{name}", jnp.concatenate([own, gated], -1))

    b, t = factor("b", f[:, :1]), factor("t", f[:, :2])
    u = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(b.T @ b + jnp.eye(2)), b.T @ t)[:, 0]
    r = softplus(mlp("head.network", e) + math.log(math.e - 1))
    centre, spread = theta["model.params.mean"], jnp.exp(theta["model.params.sd"])
    return centre + spread * u, spread * jnp.sqrt(1e-6 + (1 - 1e-6) * r**2 / (1 + (b**2).sum(0)))
