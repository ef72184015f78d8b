"""Coverage of modes and of labels against loops, and what each kind of posterior scores."""

import math

import pytest
import torch

from bayesmeta.metrics import label_coverage, mode_coverage

S, M, T, N = 20, 3, 4, 6


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scene():
    """Draws scattered about modes, some near none; a full row, padded ones and an empty one."""
    modes = 2 * normal(M, T, N)
    which = torch.randint(M, (S, T), generator=torch.Generator().manual_seed(1))
    draws = modes[which, torch.arange(T)] + 0.7 * normal(S, T, N, seed=2)
    mask = torch.arange(N) < torch.tensor([N, 4, 1, 0])[:, None]
    return draws, modes, mask


def by_loops(draws, modes, mask, tolerance, least, present):
    covered, shares = [], torch.full((len(modes), T), math.nan, dtype=torch.float64)
    for t in range(T):
        real = [j for j in range(N) if mask[t, j]]
        there = [m for m in range(len(modes)) if present[m, t]]
        counts = dict.fromkeys(range(len(modes)), 0)
        for draw in draws:
            if not real:
                continue
            rms = {m: math.sqrt(sum((draw[t, j] - modes[m, t, j]).item() ** 2 for j in real) / len(real)) for m in there}
            if rms and min(rms.values()) <= tolerance:
                counts[min(rms, key=rms.get)] += 1
        if real:
            shares[:, t] = torch.tensor([counts[m] / len(draws) for m in range(len(modes))], dtype=torch.float64)
        found = [counts[m] / len(draws) >= least for m in there]
        covered.append(sum(found) / len(found) if real and found else math.nan)
    return torch.tensor(covered, dtype=torch.float64), shares


@pytest.mark.parametrize("tolerance", [math.inf, 0.8])
@pytest.mark.parametrize("least", [0.05, 0.3])
@pytest.mark.parametrize("some", [False, True])
def test_modes_by_loops(tolerance, least, some):
    draws, modes, mask = scene()
    present = torch.ones(M, T, dtype=torch.bool)
    if some:
        present = torch.tensor([[1, 0, 0, 1], [1, 1, 0, 1], [0, 1, 0, 1]], dtype=torch.bool)
    got = mode_coverage(draws, modes, mask, tolerance=tolerance, least=least, present=present if some else None)
    covered, shares = by_loops(draws, modes, mask, tolerance, least, present)
    torch.testing.assert_close(got.covered, covered, rtol=0, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(got.shares, shares, rtol=0, atol=1e-12, equal_nan=True)
    assert len(set(got.shares[:, :3].flatten().tolist())) > 2


def two_modes():
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    return torch.stack([x.sin(), x])[:, None].expand(2, 3, 9), torch.ones(3, 9, dtype=torch.bool)


def test_what_kinds_of_posterior_score():
    modes, mask = two_modes()
    half = (modes[0] - modes[1]).square().mean(-1).sqrt()[0].item() / 2
    noise = 0.01 * normal(40, 3, 9)
    both = modes[torch.arange(40) % 2] + noise
    one = modes[torch.zeros(40, dtype=torch.long)] + noise
    between = modes.mean(0) + noise
    unlikely = modes[(torch.arange(40) == 0).long()] + noise  # 1 of 40 draws is less than 5%
    for draws, covered, shares in (
        (both, 1.0, [0.5, 0.5]), (one, 0.5, [1.0, 0.0]), (between, 0.0, [0.0, 0.0]), (unlikely, 0.5, [0.975, 0.025])
    ):
        got = mode_coverage(draws, modes, mask, tolerance=0.9 * half)
        torch.testing.assert_close(got.covered, torch.full((3,), covered, dtype=torch.float64))
        torch.testing.assert_close(got.shares, torch.tensor(shares, dtype=torch.float64)[:, None].expand(2, 3))
    # without a tolerance the draws between are of the nearer mode, by chance
    assert mode_coverage(between, modes, mask).shares.sum(0).tolist() == [1.0, 1.0, 1.0]


def test_a_tolerance_for_each_task():
    modes, mask = two_modes()
    draws = modes[:1] + 0.5
    got = mode_coverage(draws, modes, mask, tolerance=torch.tensor([0.4, 0.5 + 1e-9, 1.0]))
    assert got.shares[0].tolist() == [0.0, 1.0, 1.0]


def test_modes_that_coincide_share_their_draws():
    modes, mask = two_modes()
    same = modes[:1].expand(2, -1, -1)
    got = mode_coverage(same[:1], same, mask)
    assert got.covered.tolist() == [1.0] * 3 and got.shares.tolist() == [[1.0] * 3] * 2


def test_nan_in_the_padding_is_not_seen_and_at_a_point_is_no_mode():
    draws, modes, mask = scene()
    hidden = (v.masked_fill(~mask, torch.nan) for v in (draws, modes))
    for a, b in zip(mode_coverage(draws, modes, mask), mode_coverage(*hidden, mask), strict=True):
        assert torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))
    broken = draws.clone()
    broken[:5, 0, 0], broken[5:8, 0, 1] = torch.nan, torch.inf
    shares = mode_coverage(broken, modes, mask).shares
    assert shares[:, 0].sum().item() == pytest.approx(12 / S)
    assert torch.equal(shares[:, 1:3], mode_coverage(draws, modes, mask).shares[:, 1:3])


def test_wrong_arguments_of_modes():
    draws, modes, mask = scene()
    with pytest.raises(ValueError, match=r"draws \(S, T, N\) and modes \(M, T, N\), got"):
        mode_coverage(draws, modes[:, :2], mask)
    with pytest.raises(ValueError, match=r"least: expected a share .* got 0"):
        mode_coverage(draws, modes, mask, least=0)
    with pytest.raises(ValueError, match=r"present: expected bool of shape \(M, T\) = \(3, 4\)"):
        mode_coverage(draws, modes, mask, present=torch.ones(4, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="bool mask of one shape"):
        mode_coverage(draws, modes, mask[:, :3])


def test_labels_by_loops():
    draws = torch.sigmoid(2 * normal(S, T, N))
    truth = torch.sigmoid(2 * normal(T, N, seed=1))
    mask = torch.arange(N) < torch.tensor([N, 4, 1, 0])[:, None]
    got = label_coverage(draws, truth, mask, possible=0.4, least=0.4)
    found, right = [], []
    for t in range(T):
        opened, given = set(), set()
        for j in range(N):
            for label in (0, 1):
                share = sum(int((draw[t, j] > 0.5).item() == label) for draw in draws) / S
                chance = truth[t, j].item() if label else 1 - truth[t, j].item()
                opened |= {(j, label)} if mask[t, j] and chance >= 0.4 else set()
                given |= {(j, label)} if mask[t, j] and share >= 0.4 else set()
        found.append(len(opened & given) / len(opened) if opened else math.nan)
        right.append(len(opened & given) / len(given) if given else math.nan)
    torch.testing.assert_close(got[0], torch.tensor(found, dtype=torch.float64), rtol=0, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(got[1], torch.tensor(right, dtype=torch.float64), rtol=0, atol=1e-12, equal_nan=True)
    assert all(((v > 0) & (v < 1)).any() for v in got)


def test_what_kinds_of_labelling_score():
    truth, mask = torch.tensor([[0.5, 0.99, 0.01, 0.4]]), torch.ones(1, 4, dtype=torch.bool)
    spread = torch.tensor([[[0.9, 0.9, 0.1, 0.8]], [[0.1, 0.9, 0.1, 0.2]]])  # open where the truth is
    sure = spread[:1].expand(2, -1, -1)
    ignorant = torch.tensor([[[0.9] * 4], [[0.1] * 4]])
    assert [v.item() for v in label_coverage(spread, truth, mask)] == [1.0, 1.0]
    assert [v.item() for v in label_coverage(sure, truth, mask)] == pytest.approx([4 / 6, 1.0])
    assert [v.item() for v in label_coverage(ignorant, truth, mask)] == pytest.approx([1.0, 6 / 8])


def test_labels_behind_the_mask_are_not_seen():
    draws, truth = torch.sigmoid(normal(S, T, N)), torch.sigmoid(normal(T, N, seed=1))
    mask = torch.arange(N) < torch.tensor([N, 4, 1, 0])[:, None]
    hidden = (v.masked_fill(~mask, torch.nan) for v in (draws, truth))
    for a, b in zip(label_coverage(draws, truth, mask), label_coverage(*hidden, mask), strict=True):
        assert torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))
        assert a[3].isnan() and not a[:3].isnan().any()


def test_wrong_arguments_of_labels():
    draws, truth, mask = torch.rand(S, T, N), torch.rand(T, N), torch.ones(T, N, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"draws \(S, T, N\) and truth \(T, N\), got"):
        label_coverage(draws[:, :2], truth, mask)
    with pytest.raises(ValueError, match=r"possible: expected a number in \(0, 0.5\], got 0.6"):
        label_coverage(draws, truth, mask, possible=0.6)
