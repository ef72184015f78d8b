"""Mini-bayesmeta: the library's learners on one page, to be read next to the papers. Plain torch, one model, a task at a time.

    φ_i ~ N( μ_θ, diag σ_θ² )                a task's parameters: its level and its slope (D = 2)
    y_ij ~ N( φ_i · [1, x_ij], noise² )      its points: support set S_i, query set Q_i, D_i = S_i ∪ Q_i
    θ = (μ_θ, log σ_θ, log noise)            what all tasks share, and what is learned: the mean of ``_loss`` over tasks is minimised

A set of points is a pair ``(x, y)``, each ``(N,)``. Every learner answers one question, q(φ_i | S_i, θ): its ``_adapt`` gives φ, or
what q is made of; its ``_loss`` is one task's objective for θ. What is random is passed in, as standard normal ``noise``. The library
does the same for any Pyro program and all tasks at once. Run this file to see who is overconfident.
"""

import math
from typing import NamedTuple

import torch
from torch.autograd import grad
from torch.func import jacrev


class Theta(NamedTuple):
    mean: torch.Tensor
    log_sd: torch.Tensor
    log_noise: torch.Tensor
    sd = property(lambda self: self.log_sd.exp())
    noise = property(lambda self: self.log_noise.exp())


def log_normal(value, mean, sd):
    return -0.5 * ((value - mean) / sd) ** 2 - sd.log() - 0.5 * math.log(2 * math.pi)

def design(x):
    return torch.stack([torch.ones_like(x), x], -1)  # X, (N, 2)

def log_likelihood(theta, phi, points):
    """log p(y | x, φ, θ), summed over points; φ may be several at once: ``(*M, 2)`` to ``(*M,)``."""
    return log_normal(points[1], phi @ design(points[0]).mT, theta.noise).sum(-1)

def log_prior(theta, phi):
    return log_normal(phi, theta.mean, theta.sd).sum(-1)

def log_joint(theta, phi, points):
    return log_likelihood(theta, phi, points) + log_prior(theta, phi)

def mean_nll(theta, phi, points):
    return -log_likelihood(theta, phi, points) / max(len(points[1]), 1)  # the *mean*: a step size means the same at every N

def union(support, query):
    return torch.cat([support[0], query[0]]), torch.cat([support[1], query[1]])


def descend(loss, phi, K, alpha, first_order=False):
    """φ ← φ − α ∇ loss(φ), K times. The steps stay in the graph, so θ learns through them; first order: ∇ counts as a constant."""
    phi = phi.clone().requires_grad_()  # φ starts at a part of θ, but is not θ: the loss may depend on both
    for _ in range(K):
        (gradient,) = grad(loss(phi).sum(), phi, create_graph=not first_order)
        phi = phi - alpha * gradient
    return phi


def exact_adapt(theta, support):
    """p(φ | S_i, θ) = N( P⁻¹ (Xᵀy / noise² + Λ_θ μ_θ), P⁻¹ ),  P = XᵀX / noise² + Λ_θ,  Λ_θ = diag σ_θ⁻² (Bishop 2006, eq. 3.50)."""
    x, y = design(support[0]) / theta.noise, support[1] / theta.noise
    covariance = torch.linalg.inv(x.mT @ x + theta.sd.pow(-2).diag())
    return covariance @ (x.mT @ y + theta.sd.pow(-2) * theta.mean), covariance

def exact_loss(theta, support, query):
    """−log p(D_i | θ) = −log N( y; X μ_θ, X diag σ_θ² Xᵀ + noise² I ): empirical Bayes."""
    x, y = union(support, query)
    root = torch.linalg.cholesky(design(x) * theta.sd**2 @ design(x).mT + theta.noise**2 * torch.eye(len(y), dtype=y.dtype))
    z = torch.linalg.solve_triangular(root, (y - design(x) @ theta.mean)[:, None], upper=False)
    return 0.5 * z.square().sum() + root.diagonal().log().sum() + 0.5 * len(y) * math.log(2 * math.pi)


def complete_pooling_loss(theta, centre, support, query):
    """−log p(D_i | φ_c): one φ_c for all tasks, which is also q (Gelman & Hill 2007, chapter 12)."""
    return -log_likelihood(theta, centre, union(support, query))

def no_pooling_adapt(centre, support):
    """φ̂_i = φ_c + argmin ‖δ‖ over argmax_δ log p(S_i | φ_c + δ): least squares, as near to φ_c as there is one (chapter 12)."""
    x = design(support[0])
    return centre + torch.linalg.pinv(x) @ (support[1] - x @ centre)

def no_pooling_loss(theta, centre, support, query):
    """−log p(D_i | φ̂_i) + ½ log pdet H_i,  H_i = XᵀX / noise²: restricted maximum likelihood, for the noise alone."""
    both = union(support, query)
    x = design(both[0])
    singular = torch.linalg.svdvals(x)[: torch.linalg.matrix_rank(x)]
    return -log_likelihood(theta, no_pooling_adapt(centre, both).detach(), both) + (singular / theta.noise).log().sum()


def maml_adapt(theta, support, K, alpha, first_order=False):
    """φ_0 = μ_θ,  φ_k+1 = φ_k − α ∇_φ [ −1/N_S Σ_j log p(y_j | x_j, φ_k) ],  j ∈ S_i (Finn, Abbeel & Levine 2017, eq. 1)."""
    return descend(lambda phi: mean_nll(theta, phi, support), theta.mean, K, alpha, first_order)

def maml_loss(theta, support, query, K, alpha, first_order=False):
    """−1/N_Q Σ_j log p(y_j | x_j, φ_K),  j ∈ Q_i (algorithm 2, line 10). FOMAML (section 5.2): ``first_order``."""
    return mean_nll(theta, maml_adapt(theta, support, K, alpha, first_order), query)


def reptile_loss(theta, support, query, K, alpha):
    """½ ‖φ_0 − stop(φ_K)‖²,  K ≥ 2 steps on D_i: its gradient step is θ ← θ + ε (φ_K − θ) (Nichol et al. 2018). q: `maml_adapt`."""
    both = union(support, query)
    phi = maml_adapt(theta, both, K, alpha).detach()
    nll = mean_nll(theta, phi, both)  # the noise is not where φ starts: it learns by this, of which only the gradient counts
    return 0.5 * (theta.mean - phi).square().sum() + nll - nll.detach()


def llama_adapt(theta, support, K, alpha):
    """φ̂ ← φ̂ + α ∇ log p(S_i, φ̂ | θ) / max(N_S, 1), K times;  q = N( φ̂, (H_S + Λ_θ)⁻¹ ),  H_S = −∇² log p(S_i | φ̂) (Grant et al. 2018)."""
    phi = descend(lambda phi: -log_joint(theta, phi, support) / max(len(support[1]), 1), theta.mean, K, alpha)
    return phi, torch.linalg.inv(-jacrev(jacrev(lambda phi: log_joint(theta, phi, support)))(phi))

def llama_loss(theta, support, query, K, alpha):
    """−log p(D_i, φ̂ | θ) − D/2 log 2π + ½ log det P − ½ gᵀ P⁻¹ g,  P = H_D + Λ_θ,  g = ∇ log p(D_i, φ̂ | θ) (section 4.1's integral)."""
    both = union(support, query)
    phi, inverse = llama_adapt(theta, both, K, alpha)
    g = jacrev(lambda phi: log_joint(theta, phi, both))(phi)
    return -log_joint(theta, phi, both) - math.log(2 * math.pi) - 0.5 * torch.logdet(inverse) - 0.5 * g @ inverse @ g


def kl_normal(mean, sd, prior_mean, prior_sd):
    return ((prior_sd / sd).log() + (sd**2 + (mean - prior_mean) ** 2) / (2 * prior_sd**2) - 0.5).sum(-1)

def elbo(theta, mean, sd, points, noise, w=1.0):
    """E_q[ log p(points | φ) ] − w KL( q ‖ p(φ | θ) ),  q = N(mean, sd²), at the draws φ = mean + sd · noise ``(M, 2)``."""
    return log_likelihood(theta, mean + sd * noise, points).mean() - w * kl_normal(mean, sd, theta.mean, theta.sd)


# Four draws of mean 0 and covariance I, both exactly: over them the mean of any quadratic is its expectation.
WHITE = math.sqrt(2) * torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])

def abml_adapt(theta, support, noise, alpha, w=1.0):
    """(μ, σ) ← (μ, σ) + α ∇ L_S(μ, σ) / max(N_S, 1) from (μ_θ, σ_θ),  L_S: the `elbo` of S_i (Ravi & Beatson 2019, eq. 4).

    ``noise``: K times ``(M, 2)``, M draws for each step. A σ that steps past 0 counts by its size.
    """
    draws, n = iter(noise), max(len(support[1]), 1)
    start = torch.stack([theta.mean, theta.sd])
    mean, sd = descend(lambda q: -elbo(theta, q[0], q[1].abs(), support, next(draws), w) / n, start, len(noise), alpha)
    return mean, sd.abs()

def abml_loss(theta, support, query, noise, outer_noise, alpha, w=1.0):
    """−E_q[ log p(S_i ∪ Q_i | φ) ] + KL( q ‖ p(φ | θ) ) (eq. 3): q saw S_i alone. ``outer_noise (M, 2)``."""
    return -elbo(theta, *abml_adapt(theta, support, noise, alpha, w), union(support, query), outer_noise)


def black_box_adapt(theta, encoder, support):
    """φ = μ_θ + σ_θ u,  u ~ N( c, diag r² / (1 + Σ_j b_j²) ),  c = (I + Σ_j b_j b_jᵀ)⁻¹ Σ_j b_j t_j: q's mean and sd, without a step.

    ``encoder(x, y)`` sees each point as t_j ~ N(b_jᵀu, 1), an observation of u ~ N(0, I): b ``(N, 2)``, t ``(N,)``, and r.
    """
    b, t, r = encoder(*support)
    c = torch.linalg.solve(torch.eye(2, dtype=t.dtype) + b.mT @ b, b.mT @ t)
    return theta.mean + theta.sd * c, theta.sd * r / (1 + b.square().sum(0)).sqrt()

def black_box_loss(theta, encoder, points, noise, w=1.0):
    """−E_{q(φ|A)}[ log p(A | φ) ] + w KL( q(φ|A) ‖ p(φ|θ) ): with A on both sides the optimum is p(φ | A, θ). ``noise (M, 2)``."""
    return -elbo(theta, *black_box_adapt(theta, encoder, points), points, noise, w)


def bmaml_adapt(theta, phi, points, K, epsilon):
    """φ_m ← φ_m + ε/M Σ_n [ k(φ_n, φ_m) ∇ log p(S_i, φ_n | θ) + ∇_{φ_n} k(φ_n, φ_m) ], K times (Liu & Wang 2016, eq. 8).

    k(a, b) = exp( −‖a − b‖² / h ),  h = median over pairs of ‖φ_m − φ_n‖² / log(M + 1), a constant. ``phi (M, 2)``, M > 1.
    """
    phi, M = phi.clone().requires_grad_(), len(phi)
    for _ in range(K):
        (score,) = grad(log_joint(theta, phi, points).sum(), phi, create_graph=True)
        gap = phi[:, None] - phi  # [m, n]: φ_m − φ_n
        squares = gap.square().sum(-1)
        h = (squares.detach()[*torch.triu_indices(M, M, 1)].median() / math.log(M + 1)).clamp(min=1e-8)
        k = (-squares / h).exp()
        phi = phi + epsilon / M * (k @ score + (k[..., None] * 2 * gap / h).sum(1))
    return phi

def bmaml_loss(theta, starts, support, query, K, epsilon):
    """−1/N_Q Σ_j log 1/M Σ_m p(y_j | x_j, φ_m,K),  j ∈ Q_i; the starting points ``starts (M, 2)`` are learned, too."""
    return -log_predictive(theta, bmaml_adapt(theta, starts, support, K, epsilon), query).mean()

def bmaml_chaser_loss(theta, starts, support, query, K, epsilon, L=1):
    """Σ_m ‖φ_m,K − stop_grad(leader_m)‖²,  leader: L more steps on S_i ∪ Q_i (Kim, Yoon et al. 2018, section 3.2)."""
    fixed = Theta(*(v.detach() for v in theta))  # only the starting points can learn from it
    follower = bmaml_adapt(fixed, starts, support, K, epsilon)
    leader = bmaml_adapt(fixed, follower, union(support, query), L, epsilon).detach()
    nll = bmaml_loss(theta, starts.detach(), support, query, K, epsilon)  # θ learns by this, of which only the gradient counts
    return (follower - leader).square().sum() + nll - nll.detach()


def platipus_adapt(theta, gamma_p, support, noise, K, alpha):
    """φ_0 ~ p(φ_0 | S_i) = N( μ_θ − γ_p ∇ℓ(μ_θ, S_i), σ_θ² ), *then* adapted (Finn, Xu & Levine 2018, algorithm 2). ``noise (M, 2)``."""
    start = maml_adapt(theta, support, 1, gamma_p) + theta.sd * noise
    return descend(lambda phi: mean_nll(theta, phi, support), start, K, alpha)

def platipus_loss(theta, log_v_q, gamma_p, gamma_q, support, query, noise, K, alpha, w=1.0):
    """1/N_Q [ −E_q log p(Q_i | φ_K) + w KL( q ‖ p(φ_0 | S_i) ) ],  φ_0 ~ q = N( μ_θ − γ_q ∇ℓ(μ_θ, Q_i), v_q² ) (algorithm 1)."""
    p, q = maml_adapt(theta, support, 1, gamma_p), maml_adapt(theta, query, 1, gamma_q)
    phi = descend(lambda phi: mean_nll(theta, phi, support), q + log_v_q.exp() * noise, K, alpha)
    return mean_nll(theta, phi, query).mean() + w * kl_normal(q, log_v_q.exp(), p, theta.sd) / len(query[1])


def log_predictive(theta, phi, points):
    """log 1/M Σ_m p(y_j | x_j, φ_m) of each point, ``(N,)``, for draws ``phi (M, 2)`` of q: never the mean of the logs."""
    return torch.logsumexp(log_normal(points[1], phi @ design(points[0]).mT, theta.noise), 0) - math.log(len(phi))

def covered(theta, phi, points, level=0.9):
    """Which points lie in the mixture's central interval, ``(N,)``: those with (1 − level)/2 ≤ F(y) ≤ (1 + level)/2."""
    return (torch.special.ndtr((points[1] - phi @ design(points[0]).mT) / theta.noise).mean(0) - 0.5).abs() <= level / 2


def simulate(truth, N):
    x = 4 * torch.rand(N + 10) - 2
    y = design(x) @ (truth.mean + truth.sd * torch.randn(2)) + truth.noise * torch.randn(N + 10)
    return (x[:N], y[:N]), (x[N:], y[N:])

def draws(mean, spread):  # of a Normal, given its sd or its covariance
    return mean + torch.randn(200, 2) @ (spread.diag() if spread.dim() == 1 else torch.linalg.cholesky(spread)).mT


def main(steps=120):
    """Trains five learners on the same tasks, with 3 or 12 support points and noise 0.5, and scores them on held-out ones of each kind."""
    torch.manual_seed(0)
    truth = Theta(torch.tensor([1.0, -0.5]), torch.tensor([1.0, 0.5]).log(), torch.tensor(0.5).log())
    train, few, many = ([simulate(truth, N) for N in sizes] for sizes in ((3, 12) * 50, (3,) * 200, (12,) * 200))
    learners = {  # the loss for θ, and draws of q: a point estimate has one
        "complete pooling": (lambda t, S, Q: complete_pooling_loss(t, t.mean, S, Q), lambda t, S: t.mean[None]),
        "no pooling": (lambda t, S, Q: no_pooling_loss(t, t.mean, S, Q), lambda t, S: no_pooling_adapt(t.mean, S)[None]),
        "MAML": (lambda t, S, Q: maml_loss(t, S, Q, 10, 0.1), lambda t, S: maml_adapt(t, S, 10, 0.1)[None]),
        "ABML": (lambda t, S, Q: abml_loss(t, S, Q, [WHITE] * 10, WHITE, 0.05), lambda t, S: draws(*abml_adapt(t, S, [WHITE] * 10, 0.05))),
        "exact": (exact_loss, lambda t, S: draws(*exact_adapt(t, S))),
    }
    print(f"{'support points':18}{3:13}{12:18}\n{'':18}90% cover    NLL   90% cover    NLL   noise")
    for name, (loss, draw) in learners.items():
        theta = Theta(*(torch.zeros(size, requires_grad=True) for size in ((2,), (2,), ())))
        optimiser = torch.optim.Adam(theta, 0.05)
        for _ in range(steps):
            optimiser.zero_grad()
            torch.stack([loss(theta, *train[i]) for i in torch.randint(len(train), (5,))]).mean().backward()
            optimiser.step()
        print(f"{name:18}", end="")
        for tasks in few, many:
            found = [(draw(theta, S).detach(), Q) for S, Q in tasks]
            cover, log_p = (torch.cat([score(theta, *one) for one in found]).double().mean() for score in (covered, log_predictive))
            print(f"{cover:9.0%}{-log_p:7.2f}", end="   ")
        print(f"{theta.noise:5.2f}")


if __name__ == "__main__":
    torch.set_num_threads(1)  # threads only get in each other's way on tensors this small
    main()
