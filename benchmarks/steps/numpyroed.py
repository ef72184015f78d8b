"""NumPyro's step of the amortized learner: `SVI` with `TraceMeanField_ELBO`, jitted; the same model, guide and weights."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro.infer import SVI, TraceMeanField_ELBO

from . import jaxed, loops, workloads
from .workloads import Contender, Workload

DRAWS = 50  # of the first loss: its noise is NumPyro's own


def svi(w: Workload) -> Contender | None:
    """None for all but the ELBO. Its one loss is the mean of `DRAWS` first ones, held to the mean of the step by hand.

    Raises AssertionError where the two means are 5 standard errors apart.
    """
    if w.kind != "elbo":
        return None
    first = {n: jnp.asarray(v.detach().cpu().numpy()) for n, v in loops.start_of(w).items()}
    (x, y, _), (qx, qy, _) = workloads.episode(w).to("cpu")
    data = jnp.concatenate([x.numpy()[..., 0], qx.numpy()[..., 0]], 1), jnp.concatenate([y.numpy(), qy.numpy()], 1)

    def parameters(names: list[str]) -> dict[str, Array]:
        return {n: numpyro.param(n, first[n]) for n in names}

    ours = [n for n in first if n.startswith("model.")]

    def model(x: Array, y: Array) -> None:
        p = parameters(ours)
        mean, sd = p["model.params.mean"], jnp.exp(p["model.params.sd"])
        with numpyro.plate("tasks", len(x)):
            level = numpyro.sample("level", dist.Normal(mean[0], sd[0]))
            slope = numpyro.sample("slope", dist.Normal(mean[1], sd[1]))
            y_hat = level[:, None] + slope[:, None] * x
            numpyro.sample("y", dist.Normal(y_hat, jnp.exp(p["model.params.noise"])).to_event(1), obs=y)

    def guide(x: Array, y: Array) -> None:
        loc, sd = jax.vmap(jaxed.posterior, (None, 0, 0))(parameters(list(first)), x, y)
        with numpyro.plate("tasks", len(x)):
            numpyro.sample("level", dist.Normal(loc[:, 0], sd[:, 0]))
            numpyro.sample("slope", dist.Normal(loc[:, 1], sd[:, 1]))

    inference = SVI(model, guide, numpyro.optim.Adam(workloads.ADAM), TraceMeanField_ELBO())
    state = inference.init(jax.random.key(0), *data)
    keys = jax.random.split(jax.random.key(1), DRAWS)
    value = jax.jit(lambda state, key: inference.evaluate(state._replace(rng_key=key), *data))
    losses = jnp.stack([value(state, key) for key in keys]) / w.tasks
    by_hand = jax.jit(jaxed.mean_loss(w))
    wanted = jnp.stack([by_hand(first, key) for key in keys])
    gap, error = abs(losses.mean() - wanted.mean()), jnp.sqrt((losses.var() + wanted.var()) / DRAWS)
    assert gap < 5 * error, f"{w.name}: NumPyro's mean loss is {losses.mean()}, by hand {wanted.mean()}, standard error {error}"
    update = jax.jit(inference.update, donate_argnums=0)

    def step() -> float:
        nonlocal state
        state, loss = update(state, *data)
        return float(loss) / w.tasks

    contender = Contender.of(step)
    contender.losses = [float(losses.mean())]
    return contender
