"""Panels: every row of every group is used, once; splits are by group; scaling looks at training rows only."""

import csv
from importlib import resources

import numpy as np
import pytest
import torch

from bayesmeta.tasks import Panel

SOURCE = resources.files("bayesmeta.tasks") / "data" / "radon_mn.csv"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def raw():
    """County name -> its rows (floor, log radon), read apart from the package."""
    counties = {}
    with SOURCE.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            counties.setdefault(row["county"], []).append((float(row["floor"]), float(row["log_radon"])))
    return counties


def as_rows(*sets):
    """All real points as sorted rows (x..., y)."""
    return sorted((*x.tolist(), y.item()) for xs, ys in sets for x, y in zip(xs, ys, strict=True))


def simple(counts, **options):
    """Groups g0, g1, ... of the given sizes; x counts the rows from 0 on, y = 10 x."""
    group = [f"g{i}" for i, n in enumerate(counts) for _ in range(n)]
    x = np.arange(len(group), dtype=float)
    return Panel.from_arrays(group, x, 10 * x, **options)


def test_radon_is_all_there(raw):
    panel = Panel.radon(dtype=torch.float64)
    assert (panel.num_rows, panel.num_tasks, panel.num_rows_missing) == (919, 85, 0)
    assert panel.task_names() == list(raw)
    assert panel.feature_names == ("floor",) and panel.target_name == "log_radon"
    for name, rows in raw.items():
        assert as_rows(panel.rows(name)) == sorted(rows)


@pytest.mark.parametrize("num_support", [0, 5, (2, 9), 0.3, 1000])
def test_support_and_query_are_exactly_the_group_s_rows(raw, num_support):
    panel = Panel.radon(num_support=num_support, dtype=torch.float64)
    support, query = panel.episodes(generator=seeded())
    for name, seen, asked in zip(panel.task_names(), support.to_tasks(), query.to_tasks(), strict=True):
        assert as_rows(seen, asked) == sorted(raw[name])
        assert len(asked[0]) >= 1
        if isinstance(num_support, float):
            assert len(seen[0]) == min(int(num_support * len(raw[name])), len(raw[name]) - 1)
        elif isinstance(num_support, int):
            assert len(seen[0]) == min(num_support, len(raw[name]) - 1)
        else:
            assert min(2, len(raw[name]) - 1) <= len(seen[0]) <= min(9, len(raw[name]) - 1)


def test_one_row_groups_have_no_support_and_one_query(raw):
    panel = Panel.radon()
    support, query = panel.episodes(generator=seeded())
    single = [i for i, name in enumerate(panel.task_names()) if len(raw[name]) == 1]
    assert len(single) == 3
    assert support.counts[single].tolist() == [0, 0, 0] and query.counts[single].tolist() == [1, 1, 1]
    assert panel.num_short == sum(len(rows) - 1 < 5 for rows in raw.values())


def test_each_call_draws_a_new_split():
    panel = simple([20], num_support=5)
    drawn = torch.stack([panel.episodes(generator=seeded(s)).support.x[0, :, 0] for s in range(400)])
    times = torch.bincount(drawn.flatten().long(), minlength=20)
    assert times.sum() == 2000 and times.min() > 60 and times.max() < 145  # each row 100 times, sd 8.7
    firsts = torch.bincount(drawn[:, 0].long(), minlength=20)
    assert firsts.min() > 2


def test_sample_gives_whole_groups_without_replacement(raw):
    panel = Panel.radon(dtype=torch.float64)
    support, query = panel.sample(85, generator=seeded())
    drawn = [as_rows(*both) for both in zip(support.to_tasks(), query.to_tasks(), strict=True)]
    assert sorted(drawn) == sorted(sorted(rows) for rows in raw.values())
    assert drawn != [sorted(rows) for rows in raw.values()]


def test_more_tasks_than_groups_come_again_with_splits_of_their_own():
    support, query = simple([8], num_support=4).sample(50, generator=seeded())
    assert len({tuple(sorted(y.tolist())) for y in support.y}) > 10
    for seen, asked in zip(support.to_tasks(), query.to_tasks(), strict=True):
        assert sorted(seen[1].tolist() + asked[1].tolist()) == [10.0 * i for i in range(8)]


def test_random_support_sizes_take_every_value():
    counts = simple([30] * 4, num_support=(2, 5)).sample(400, generator=seeded()).support.counts
    assert set(counts.tolist()) == {2, 3, 4, 5}
    assert torch.bincount(counts)[2:].min() > 60


def test_max_query_and_min_query():
    support, query = simple([4, 30], num_support=3, min_query=2, max_query=6).episodes(generator=seeded())
    assert support.counts.tolist() == [2, 3] and query.counts.tolist() == [2, 6]
    assert query.num_points == 6 and support.num_points == 3
    for seen, asked in zip(support.to_tasks(), query.to_tasks(), strict=True):
        assert not set(seen[1].tolist()) & set(asked[1].tolist())


def test_splits_are_disjoint_and_complete(raw):
    panel = Panel.radon(seed=3)
    parts = [panel.split(name) for name in ("train", "val", "test")]
    names = [name for part in parts for name in part.task_names()]
    assert len(names) == 85 and set(names) == set(raw)
    assert [part.num_tasks for part in parts] == [51, 17, 17]
    assert sum(part.num_rows for part in parts) == 919
    assert panel.split("validation").task_names() == parts[1].task_names()
    for part in parts:
        assert part.episodes(generator=seeded()).union().mask.sum() == part.num_rows
        for name in part.task_names():
            assert torch.equal(part.rows(name)[1], panel.rows(name)[1])
    assert Panel.radon(seed=3).split("test").task_names() == parts[2].task_names()
    assert Panel.radon(seed=4).split("test").task_names() != parts[2].task_names()


def test_splits_that_cannot_be():
    with pytest.raises(ValueError, match="'val' has no groups: 1 are too few"):
        simple([5]).split("val")
    with pytest.raises(ValueError, match=r"expected one of .* got 'tests'"):
        simple([5] * 9).split("tests")
    with pytest.raises(ValueError, match="is the 'train' split already"):
        simple([5] * 9).split("train").split("train")
    with pytest.raises(ValueError, match="'val' has no groups"):
        simple([5] * 9, fractions=(0.5, 0, 0.5)).split("val")
    with pytest.raises(ValueError, match="no groups to train on"):
        simple([5] * 9, fractions=(0, 0.5, 0.5), standardize=True)


def test_scaling_is_of_the_training_rows_and_inverts(raw):
    panel, plain = Panel.radon(standardize=True, dtype=torch.float64), Panel.radon(dtype=torch.float64)
    training = np.array([row for name in plain.split("train").task_names() for row in raw[name]])
    everything = np.array([row for rows in raw.values() for row in rows])
    scale = panel.scaling
    np.testing.assert_allclose(scale.x.mean, training[:, :1].mean(0), rtol=1e-12)
    np.testing.assert_allclose([scale.y.mean, scale.y.sd], [training[:, 1].mean(), training[:, 1].std()], rtol=1e-12)
    assert abs(everything[:, 1].mean() - scale.y.mean) > 1e-3  # the test rows would have been seen
    assert panel.target_scale == pytest.approx(training[:, 1].std())
    assert panel.split("test").scaling is scale
    for name in panel.split("test").task_names():
        (x, y), (x_plain, y_plain) = panel.split("test").rows(name), plain.rows(name)
        assert torch.allclose(scale.x.inverse(x), x_plain, rtol=0, atol=1e-12)
        assert torch.allclose(scale.y.inverse(y), y_plain, rtol=0, atol=1e-12)
        assert torch.allclose(scale.y.forward(y_plain), y, rtol=0, atol=1e-12)
    scaled = torch.cat([panel.rows(name)[1] for name in panel.split("train").task_names()])
    assert scaled.mean().abs() < 1e-12 and abs(scaled.std(correction=0) - 1) < 1e-12


def test_changing_test_rows_does_not_change_the_scaling():
    counts = [5] * 10
    first = simple(counts, standardize=True)
    group = [f"g{i}" for i, n in enumerate(counts) for _ in range(n)]
    x = np.arange(50.0)
    y = np.where(np.isin(group, first.split("test").task_names()), 1e6, 10 * x)
    second = Panel.from_arrays(group, x, y, standardize=True)
    assert torch.equal(first.scaling.y.mean, second.scaling.y.mean)
    assert torch.equal(first.scaling.y.sd, second.scaling.y.sd)


def test_a_constant_column_gets_sd_one():
    panel = Panel.from_arrays(
        ["a", "a", "b", "b"], [[0.1, 1], [0.1, 2], [0.1, 3], [0.1, 5]], [1, 2, 3, 4], standardize=True
    )
    assert panel.scaling.x.sd[0] == 1 and panel.scaling.x.sd[1] != 1
    assert panel.rows("a")[0][:, 0].abs().max() < 1e-6


def test_without_standardisation_the_scaling_does_nothing():
    panel = Panel.radon()
    assert panel.target_scale == 1
    assert torch.equal(panel.scaling.y.inverse(torch.tensor([3.0])), torch.tensor([3.0]))


def test_exposure_is_the_last_feature_as_a_log_and_never_scaled():
    panel = Panel.from_arrays(
        ["a"] * 3 + ["b"] * 3, np.arange(6.0), [0, 3, 1, 4, 2, 7], exposure=[1, 10, 100, 1, 10, 1000],
        standardize=True, target_type="int", fractions=(1, 0, 0),
    )  # fmt: skip
    x, y = panel.rows("b")
    assert panel.feature_names == ("x0", "log(exposure)")
    assert torch.allclose(x[:, 1].exp(), torch.tensor([1.0, 10.0, 1000.0]))
    assert y.dtype == torch.int64 and y.tolist() == [4, 2, 7] and panel.target_scale == 1
    assert panel.scaling.x.sd[0] != 1
    assert panel.episodes(generator=seeded()).query.y.dtype == torch.int64


def test_missing_values_are_dropped_and_counted():
    nan = float("nan")
    panel = Panel.from_arrays(["a", "a", "b", "c", "a"], [1, nan, 3, nan, 5], [1, 2, nan, 4, 5])
    assert panel.task_names() == ["a"] and panel.num_rows == 2 and panel.num_rows_missing == 3
    assert panel.rows("a")[0][:, 0].tolist() == [1, 5]
    assert panel.num_groups_missing == 2
    assert "3 rows with a missing value left out, 2 groups with no other" in panel.summary()
    with pytest.raises(ValueError, match="every row lacks a value"):
        Panel.from_arrays(["a"], [nan], [1])


def test_missing_rows_of_the_splits_add_up():
    x = np.arange(40.0)
    x[::7] = np.nan
    panel = Panel.from_arrays(np.repeat(np.arange(10), 4), x, np.ones(40))
    assert panel.num_rows_missing == 6
    assert sum(panel.split(name).num_rows_missing for name in ("train", "val", "test")) == 6


def test_groups_need_not_stand_together():
    panel = Panel.from_arrays(["b", "a", "b", "a", "b"], [1, 2, 3, 4, 5], [10, 20, 30, 40, 50])
    assert panel.task_names() == ["b", "a"]
    assert panel.rows("b")[1].tolist() == [10, 30, 50] and panel.rows("a")[1].tolist() == [20, 40]


def test_summary_says_what_is_there():
    text = Panel.radon(standardize=True).summary()
    for part in ("radon_mn.csv: 85 groups by county_fips, 919 rows", "floor", "log_radon", "min 1, median 5, max 116",
                 "46 of 85", "0 rows with a missing value", "train 51, val 17, test 17"):  # fmt: skip
        assert part in text
    assert "this is 'val'" in Panel.radon().split("val").summary()
    assert (
        repr(Panel.radon().split("val")) == "Panel(17 groups by county_fips, 128 rows, target 'log_radon', split 'val')"
    )


def test_an_unknown_group_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="no group 'AITKINN'; did you mean 'AITKIN'"):
        Panel.radon().rows("AITKINN")


def test_frame():
    class Frame(dict):
        @property
        def columns(self):
            return list(self)

    frame = Frame(g=np.array(["a", "a", "b"], dtype=object), x=[1.0, None, 3.0], y=np.array([True, False, True]))
    panel = Panel.from_frame(frame, group="g", features=["x"], target="y", target_type="int")
    assert panel.num_rows == 2 and panel.num_rows_missing == 1
    assert panel.rows("b")[1].tolist() == [1]
    with pytest.raises(ValueError, match="frame: no column 'gg'; did you mean 'g'"):
        Panel.from_frame(frame, group="gg", features=["x"], target="y")
    with pytest.raises(ValueError, match="frame, row 0, column 'g': expected a number, got 'a'"):
        Panel.from_frame(frame, group="g", features=["g"], target="y")
    with pytest.raises(ValueError, match="frame, row 1, column 'x': expected the name of a group, got 'None'"):
        Panel.from_frame(frame, group="x", features=["y"], target="y")
    with pytest.raises(TypeError, match=r"expected an object with columns, .* got list"):
        Panel.from_frame([1], group="g", features=["x"], target="y")


def test_pandas_frame_agrees_with_the_file():
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    with resources.as_file(SOURCE) as path:
        frame = pandas.read_csv(path)
    panel = Panel.from_frame(frame, group="county_fips", group_name="county", features=["floor"], target="log_radon")
    packaged = Panel.radon()
    assert panel.task_names() == packaged.task_names()
    first, second = (p.sample(20, generator=seeded()) for p in (panel, packaged))
    assert all(
        torch.equal(a, b) for a, b in zip([*first.support, *first.query], [*second.support, *second.query], strict=True)
    )


def test_tensors_as_arrays():
    panel = Panel.from_arrays(torch.tensor([1, 1, 2]), torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([1, 2, 3]))
    assert panel.task_names() == ["1", "2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_support": -1}, "num_support"),
        ({"num_support": 1.5}, r"num_support: expected a fraction in \[0, 1\)"),
        ({"min_query": 0}, "min_query=0"),
        ({"max_query": 1, "min_query": 2}, "max_query=1"),
        ({"fractions": (0.5, 0.2, 0.2)}, "fractions: expected three numbers"),
        ({"target_type": "str"}, "target_type"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        simple([5, 5], **options)
    with pytest.raises(TypeError, match="num_suport"):
        simple([5, 5], num_suport=3)


def test_arrays_that_do_not_fit():
    with pytest.raises(ValueError, match=r"got \(2,\), \(3, 1\), \(3,\)"):
        Panel.from_arrays(["a", "b"], [1, 2, 3], [1, 2, 3])
    with pytest.raises(ValueError, match="expected rows, got none"):
        Panel.from_arrays([], np.empty((0, 1)), [])
    with pytest.raises(ValueError, match=r"arrays, row 1, column 'y': expected a whole number, got 0\.5"):
        Panel.from_arrays(["a", "b"], [1, 2], [1, 0.5], target_type="int")
    with pytest.raises(ValueError, match="arrays, row 0, column 'x0': expected a finite number, got inf"):
        Panel.from_arrays(["a", "b"], [np.inf, 2], [1, 0.5])
    with pytest.raises(ValueError, match="feature_names: expected 1 names, got 2"):
        Panel.from_arrays(["a", "b"], [1, 2], [1, 0.5], feature_names=["u", "v"])


def test_standardize_is_yes_or_no():
    with pytest.raises(TypeError, match="standardize: expected True or False, got 'features'"):
        Panel.from_arrays(np.repeat(np.arange(8), 5), np.arange(40.0), np.arange(40.0), standardize="features")
