"""Points and episodes: nothing is lost, nothing is made up, and the padding is never looked at."""

import numpy as np
import pytest
import torch

from bayesmeta import Episode, Points

from .conftest import episode, ragged

NAN, INF = float("nan"), float("inf")


def tasks_of(counts, features=(2,), outputs=(), seed=0):
    """Ragged tasks as a list of (x, y), drawn apart from the package."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, *features, generator=generator), torch.randn(n, *outputs, generator=generator)) for n in counts]


def in_padding(points, value):
    """The same points with ``value`` in all the padding of x and y."""
    def put(v):
        real = points.mask.view(*points.mask.shape, *(1,) * (v.dim() - 2))
        return torch.where(real, v, torch.full_like(v, value))

    return points._replace(x=put(points.x), y=put(points.y))


def same_bits(a, b):
    """Equal to the last bit, NaN and the sign of zero included."""
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


def same_points(a, b):
    return all((v is None and w is None) or same_bits(v, w) for v, w in zip(a, b, strict=True))


# --- ragged tasks


@pytest.mark.parametrize("counts", [(3, 5, 2, 8), (0, 3), (4, 0, 0), (0, 0), (1,)])
@pytest.mark.parametrize(("features", "outputs"), [((2,), ()), ((), ()), ((3, 4, 4), ()), ((1,), (2,))])
def test_ragged_tasks_come_back_as_they_went_in(counts, features, outputs):
    tasks = tasks_of(counts, features, outputs)
    points = Points.from_tasks(tasks)
    points.check_shapes()
    assert points.num_tasks == len(counts)
    assert points.num_points == max(counts)
    assert points.counts.tolist() == list(counts)
    assert points.mask.tolist() == [[j < n for j in range(max(counts))] for n in counts]
    assert points.x.shape == (len(counts), max(counts), *features)
    assert points.y.shape == (len(counts), max(counts), *outputs)
    for (x, y), (x_back, y_back) in zip(tasks, points.to_tasks(), strict=True):
        assert same_bits(x, x_back) and same_bits(y, y_back)


def test_to_tasks_reads_the_mask_and_not_the_first_columns():
    values = torch.arange(8.0).view(2, 4)
    points = Points.of(values[..., None], values, [[True, False, True, False], [False, False, False, True]])
    (x0, y0), (x1, y1) = points.to_tasks()
    assert x0[:, 0].tolist() == y0.tolist() == [0.0, 2.0]
    assert x1[:, 0].tolist() == y1.tolist() == [7.0]
    assert points.counts.tolist() == [2, 1]


def test_to_tasks_without_targets():
    tasks = Points.of(torch.zeros(2, 3, 1)).to_tasks()
    assert [(x.shape, y) for x, y in tasks] == [((3, 1), None)] * 2


def test_integer_labels_stay_integers_through_ragged_tasks():
    points = Points.from_tasks([(np.zeros((2, 1)), np.array([2, 0])), (np.zeros((1, 1)), np.array([1]))])
    assert points.y.dtype == torch.int64
    assert [y.tolist() for _, y in points.to_tasks()] == [[2, 0], [1]]


def test_tasks_of_whole_and_of_broken_numbers_are_not_truncated():
    """The first task happens to hold whole numbers: the second one's fractions must survive."""
    points = Points.from_tasks([([1, 2], [3, 4]), ([0.5], [0.7])])
    assert points.x[1, 0].item() == 0.5
    assert points.y[1, 0].item() == pytest.approx(0.7)


def test_ragged_tasks_name_the_one_that_is_wrong():
    good = (np.zeros((2, 1)), np.zeros(2))
    with pytest.raises(ValueError, match=r"task 1: x has shape \(2, 1\) and y \(3,\)"):
        Points.from_tasks([good, (np.zeros((2, 1)), np.zeros(3))])
    with pytest.raises(ValueError, match=r"x: expected the same shape of one point in every task, got \[\(1,\), \(2,\)\]"):
        Points.from_tasks([good, (np.zeros((2, 2)), np.zeros(2))])
    with pytest.raises(ValueError, match="y: expected the same shape of one point"):
        Points.from_tasks([good, (np.zeros((2, 1)), np.zeros((2, 1)))])
    with pytest.raises(ValueError, match="at least one task, got an empty list"):
        Points.from_tasks([])
    with pytest.raises(ValueError, match="support has 1 tasks, query 2: expected the same"):
        Episode.from_tasks([good], [good, good])


# --- what data may be


def test_numpy_takes_torchs_default_dtype():
    array = np.linspace(0, 1, 6).reshape(2, 3, 1)
    assert array.dtype == np.float64
    assert Points.of(array, array[..., 0]).x.dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    points = Points.of(array, array[..., 0])
    assert points.x.dtype == points.y.dtype == torch.float64
    assert np.array_equal(points.x.numpy(), array)


def test_tensors_keep_their_dtype():
    points = Points.of(torch.zeros(2, 3, 1, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.int32))
    assert points.x.dtype == torch.float64
    assert points.y.dtype == torch.int32


@pytest.mark.parametrize("order", ["fortran", "strided", "reversed", "big-endian"])
def test_numpy_arrays_in_any_memory_order(order):
    base = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    view = {
        "fortran": np.asfortranarray(base), "strided": base[:, ::2], "reversed": base[::-1, :, ::-1], "big-endian": base.astype(">f4"),
    }[order]  # fmt: skip
    assert order == "big-endian" or not view.flags.c_contiguous
    assert Points.of(view).x.tolist() == view.tolist()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_read_only_arrays_are_copied_without_a_warning(dtype):
    """A memory map or pandas with copy-on-write gives these; torch warns of them once per process, and on being written to it crashes."""
    array = np.ones((2, 3, 1), dtype=dtype)
    array.flags.writeable = False
    points = Points.of(array)
    points.x[0, 0] = 5.0
    assert array[0, 0, 0] == 1.0


def test_non_contiguous_tensors():
    x = torch.arange(12.0).view(3, 2, 2).transpose(0, 1)
    assert not x.is_contiguous()
    assert Points.of(x).filled().x.tolist() == x.tolist()


def test_nested_lists_and_masks_of_every_kind():
    for mask in ([[True, False]], np.array([[True, False]]), torch.tensor([[True, False]])):
        points = Points.of([[[1.0], [2.0]]], [[3, 4]], mask)
        assert points.mask.tolist() == [[True, False]]
        assert points.y.dtype == torch.int64
    assert Points.of([[[1.0], [2.0]]]).mask.tolist() == [[True, True]]


def test_objects_are_refused():
    ragged_objects = np.array([np.zeros(2), np.zeros(3)], dtype=object)
    with pytest.raises(TypeError, match="expected numbers, got an array of Python objects"):
        Points.of(ragged_objects)
    with pytest.raises(TypeError, match="Python objects"):
        Points.of(np.array([[None, 1.0]]))


def test_ragged_lists_are_sent_to_from_tasks():
    with pytest.raises((TypeError, ValueError), match="from_tasks"):
        Points.of([[[1.0], [2.0]], [[1.0]]])


def test_shapes_that_disagree_are_named():
    with pytest.raises(ValueError, match=r"x: expected shape \(T, N, \*I\) with at least 2 axes, got \(3,\)"):
        Points.of(torch.zeros(3))
    with pytest.raises(ValueError, match=r"y: expected shape \(T, N, ...\) = \(2, 3\) \+ ..., got \(2, 4\)"):
        Points.of(torch.zeros(2, 3, 1), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"mask: expected bool .*torch.int64 of shape \(2, 3\)"):
        Points.of(torch.zeros(2, 3, 1), None, torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"x: expected shape .* = \(2, 4\) \+ ..., got \(2, 3, 1\)"):
        Points.of(torch.zeros(2, 3, 1), None, torch.ones(2, 4, dtype=torch.bool))


# --- selecting, joining, moving


def test_select_takes_tasks_in_the_order_asked_for():
    points = ragged((3, 5, 2, 8), 2)
    for index in ([2, 0], torch.tensor([2, 0])):
        chosen = points.select(index)
        for task, (x, y) in zip((2, 0), chosen.to_tasks(), strict=True):
            assert same_bits(x, points.to_tasks()[task][0]) and same_bits(y, points.to_tasks()[task][1])
    assert same_points(points.select(slice(1, 3)), points.select([1, 2]))
    assert same_points(points.select(torch.tensor([True, False, False, True])), points.select([0, 3]))
    assert points._replace(y=None).select([1]).y is None
    e = episode().select([3, 1])
    assert same_points(e.support, episode().support.select([3, 1])) and same_points(e.query, episode().query.select([3, 1]))


def test_one_task_is_selected_with_its_axis_or_not_at_all():
    """`select(1)` must not hand back Points that have lost their task axis."""
    points = ragged((3, 5), 2)
    try:
        chosen = points.select(1)
    except (TypeError, ValueError, IndexError):
        return
    assert chosen.x.shape == (1, 5, 2)


def test_union_holds_every_point_once_support_first():
    e = episode((3, 0, 2), (1, 4, 0), features=2)
    both = e.union()
    assert both.num_points == e.support.num_points + e.query.num_points
    for task, (x, y) in enumerate(both.to_tasks()):
        (xs, ys), (xq, yq) = e.support.to_tasks()[task], e.query.to_tasks()[task]
        assert same_bits(x, torch.cat([xs, xq])) and same_bits(y, torch.cat([ys, yq]))
    x_only = Episode(*(p._replace(y=None) for p in e)).union()
    assert x_only.y is None and x_only.counts.tolist() == [4, 4, 2]


def test_union_refuses_what_does_not_belong_together():
    points = ragged((3, 2))
    with pytest.raises(ValueError, match="expected the same tasks, got 2 and 3"):
        points.union(ragged((1, 1, 1)))
    with pytest.raises(ValueError, match="one of the two sets has no y"):
        points.union(points._replace(y=None))


def test_to_changes_floats_and_nothing_else():
    points = Points(torch.randn(2, 3, 1), torch.randint(5, (2, 3)), torch.ones(2, 3, dtype=torch.bool))
    for moved in (
        points.to(torch.float64), points.to(dtype=torch.float64), points.to("cpu", torch.float64),
        points.to(torch.zeros((), dtype=torch.float64)), Episode(points, points).to(torch.float64).query,
    ):  # fmt: skip
        assert (moved.x.dtype, moved.y.dtype, moved.mask.dtype) == (torch.float64, torch.int64, torch.bool)
        assert torch.equal(moved.x.float(), points.x) and torch.equal(moved.y, points.y)
    assert points._replace(y=None).to(torch.float64).y is None
    assert points.to("meta").mask.device.type == points.to(device="meta").y.device.type == "meta"


# --- padding


@pytest.mark.parametrize("counts", [(3, 5, 2), (0, 3), (4, 0, 0)])
@pytest.mark.parametrize("outputs", [(), (2,)])
def test_filled_keeps_real_values_to_the_bit_and_leaves_no_nan(counts, outputs):
    points = Points.from_tasks(tasks_of(counts, (2,), outputs))
    zeros = points.filled()
    for value in (NAN, INF, 1e6):
        full = in_padding(points, value).filled()
        assert same_points(full, zeros)  # what stood in the padding left no trace
        assert full.x.isfinite().all() and full.y.isfinite().all()
        assert same_bits(full.x[full.mask], points.x[points.mask]) and same_bits(full.y[full.mask], points.y[points.mask])
        assert torch.equal(full.mask, points.mask)
    for task, n in enumerate(counts):  # a real point of the task itself, else of the first task that has one
        source = task if n else next(i for i, m in enumerate(counts) if m)
        for column in range(n, max(counts)):
            assert same_bits(zeros.x[task, column], points.x[source, 0])


def test_filled_where_nothing_is_real():
    empty = in_padding(Points(torch.zeros(2, 3, 1), torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)), NAN).filled()
    assert (empty.x == 0).all() and (empty.y == 1).all() and not empty.mask.any()
    none = Points(torch.zeros(2, 0, 4), torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool)).filled()
    assert (none.x.shape, none.y.shape, none.mask.shape) == ((2, 1, 4), (2, 1), (2, 1))
    assert not none.mask.any()
    assert Points(torch.zeros(2, 0, 4), None, torch.zeros(2, 0, dtype=torch.bool)).filled().y is None


def test_filled_keeps_integer_labels():
    points = Points.of(torch.zeros(1, 2, 1), torch.tensor([[2, 99]]), torch.tensor([[True, False]])).filled()
    assert points.y.dtype == torch.int64 and points.y.tolist() == [[2, 2]]


def test_no_gradient_comes_out_of_the_padding():
    x = torch.full((1, 3, 1), NAN).index_fill(1, torch.tensor([0]), 2.0).requires_grad_()
    points = Points(x, None, torch.tensor([[True, False, False]])).filled()
    (gradient,) = torch.autograd.grad((points.x**2 * points.mask[..., None]).sum(), x)
    assert gradient.flatten().tolist() == [4.0, 0.0, 0.0]


# --- checks


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_check_names_task_point_and_argument(value):
    e = episode((3, 5, 2), (2, 2, 2))
    e.check()
    x, y = e.support.x.clone(), e.query.y.clone()
    x[1, 4, 0], y[2, 1] = value, value
    with pytest.raises(ValueError, match=rf"support\.x: task 1, point 4: expected a finite number, got \[{value}\]"):
        e._replace(support=e.support._replace(x=x)).check()
    with pytest.raises(ValueError, match=rf"query\.y: task 2, point 1: expected a finite number of size at most 1e\+15, got {value}"):
        e._replace(query=e.query._replace(y=y)).check()
    with pytest.raises(ValueError, match=r"^points\.x: task 1"):
        e.support._replace(x=x).check()


def test_check_knows_the_largest_target():
    points = ragged((2, 2))
    at, above = points.y.clone(), points.y.clone()
    at[1, 0], above[1, 0] = -1e15, -1.01e15
    points._replace(y=at).check()
    with pytest.raises(ValueError, match=r"points\.y: task 1, point 0: .*at most 1e\+15"):
        points._replace(y=above).check()


def test_check_looks_at_every_output_and_feature():
    points = Points.from_tasks(tasks_of((2, 3), (2, 2), (2,)))
    x, y = points.x.clone(), points.y.clone()
    x[1, 2, 1, 0], y[0, 1, 1] = NAN, NAN
    with pytest.raises(ValueError, match=r"points\.x: task 1, point 2: expected a finite number, got \[\["):
        points._replace(x=x).check()
    with pytest.raises(ValueError, match=r"points\.y: task 0, point 1: "):
        points._replace(y=y).check()


def test_check_looks_at_real_points_only():
    for value in (NAN, INF, 1e30):
        in_padding(ragged((3, 1)), value).check()


def test_check_refuses_no_tasks_and_different_tasks():
    none = Points(torch.zeros(0, 3, 1), None, torch.zeros(0, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="support: expected at least one task, got none"):
        none.check("support")
    with pytest.raises(ValueError, match="support has 2 tasks, query 3: expected the same"):
        Episode(ragged((1, 2)), ragged((1, 2, 3))).check()
    with pytest.raises(ValueError, match="y: expected shape"):
        ragged((2, 2))._replace(y=torch.zeros(2, 3)).check()


# --- the forms of others


def full_episode(outputs=()):
    return Episode.from_tasks(tasks_of((3, 3), (2,), outputs), tasks_of((4, 4), (2,), outputs, seed=1))


@pytest.mark.parametrize("outputs", [(), (2,)])
def test_dict_and_tuple_round_trips(outputs):
    e = full_episode(outputs)
    batch = e.to_dict()
    assert list(batch) == ["train", "test"]
    assert batch["train"][0] is e.support.x and batch["test"][1] is e.query.y
    xc, yc, xt, yt = e.to_tuple()
    assert xc is e.support.x and yc is e.support.y and xt is e.query.x and yt is e.query.y
    for back in (Episode.from_dict(batch), Episode.from_tuple(e.to_tuple()), Episode.from_dict({**batch, "more": 1})):
        assert same_points(back.support, e.support) and same_points(back.query, e.query)
    assert back.num_tasks == 2


def test_dict_and_tuple_from_arrays_and_lists():
    x, y = np.zeros((1, 2, 1)), [[0, 1]]
    for e in (Episode.from_dict({"train": (x, y), "test": [x, y]}), Episode.from_tuple([x, y, x, y])):
        assert e.support.x.dtype == torch.float32 and e.query.y.dtype == torch.int64
        assert e.support.mask.all()


def test_padded_episodes_refuse_forms_without_a_mask():
    full = full_episode()
    for padded in (Episode(ragged((3, 2), 2), full.query), Episode(full.support, ragged((3, 2), 2))):
        for name in ("to_dict", "to_tuple"):
            with pytest.raises(ValueError, match=f"{name}: this episode has padded points and that form has no mask; use support.to_tasks"):
                getattr(padded, name)()


def test_wrong_forms_are_named():
    x = torch.zeros(1, 2, 1)
    with pytest.raises(ValueError, match=r"expected the keys 'train' and 'test', got \['test', 'trian'\]"):
        Episode.from_dict({"trian": (x,), "test": (x,)})
    with pytest.raises(ValueError, match=r"expected \(xc, yc, xt, yt\), got 3 entries"):
        Episode.from_tuple((x, x, x))
