"""`compare`: every learner on the same model, the same training tasks and the same held-out ones; one seed for everything."""

import csv
import dataclasses
import io
from importlib import resources

import numpy as np
import pyro
import pytest
import torch

from bayesmeta import HierarchicalModel, TrainingError, compare, comparison, evaluate, meta_train
from bayesmeta.comparison import is_csv
from bayesmeta.learners import ABML, MAML, NUTS, Exact
from bayesmeta.recipes import FAMILIES, RECIPES, hierarchical_regression, hierarchical_regression_without_level, panel_recipe
from bayesmeta.tasks import LinearGaussian, Panel

from .conftest import episode, radon_program


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def panel(groups=15, size=8, **options):
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(groups), size)
    x = rng.normal(size=(groups * size, 2))
    y = rng.normal(size=groups)[group] + x @ [0.5, -1.0] + 0.3 * rng.normal(size=groups * size)
    return Panel.from_arrays(group, x, y, num_support=3, **options)


def metrics(report, tmp_path, name="m.csv"):
    """Rows of metrics.csv but for the time, which is another every time."""
    rows = csv.DictReader(io.StringIO(report.to_csv(tmp_path / name).read_text()))
    return [tuple(row.values()) for row in rows if row["metric"] != "seconds"]


@pytest.fixture
def few_draws(monkeypatch):
    """A NUTS that is done in no time."""
    def quick(make):
        def recipe(seed=0):
            full = make(seed)
            learners = full.learners | {"NUTS": lambda model: NUTS(model, num_draws=8, warmup=8, chains=1)}
            return dataclasses.replace(full, learners=learners)

        return recipe

    monkeypatch.setattr(comparison, "RECIPES", {name: quick(make) for name, make in RECIPES.items()})


# --- what is compared


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("glyphs", "omniglot")])  # test_image_recipes.py
def test_every_family_with_its_own_learners(family):
    recipe = RECIPES[family]()
    names = [name for name in recipe.default if name != "NUTS"]
    lines = []
    report = compare(family, learners=names, steps=2, num_tasks=4, say=lines.append)
    assert list(report.results) == names
    assert all(np.isfinite(result.metrics["nll"]).any() for result in report.results.values())
    assert {name: len(history["loss"]) for name, history in report.histories.items()} == dict.fromkeys(names, 2)
    assert report.title == recipe.title
    assert [line.split(":")[0] for line in lines[:-1]] == [f"trained {name}" for name in names]
    assert lines[-1] == f"evaluating on {len(report.query_sizes)} held-out tasks"
    assert not pyro.get_param_store().keys()


def test_which_learners_run_unasked():
    for family in ("radon", "linear-gaussian"):
        assert RECIPES[family]().default == ("NoPooling", "CompletePooling", "MAML", "ABML", "NUTS", "Exact")
    assert RECIPES["sinusoid"]().default == ("NoPooling", "CompletePooling", "MAML", "ABML")
    for family in ("sine-or-line", "circles", "gp-rbf", "gp-matern", "gp-periodic"):
        assert RECIPES[family]().default == tuple(name for name in RECIPES[family]().learners if name not in ("NoPooling", "NUTS"))
    assert set(RECIPES) == set(FAMILIES)


def test_the_number_of_held_out_tasks_is_said_as_it_is():
    lines = []
    report = compare("radon", learners=["CompletePooling"], steps=1, num_tasks=5, say=lines.append)
    assert len(report.query_sizes) == 5
    assert lines[-1] == "evaluating on 5 held-out tasks"


def test_learners_stand_in_the_recipes_order_each_once():
    report = compare("radon", learners=["MAML", "NoPooling", "MAML"], steps=1)
    assert list(report.results) == ["NoPooling", "MAML"]


def test_company_changes_nothing(tmp_path):
    """Each learner has its own copy of the model: what another one did to θ does not matter."""
    alone = compare("radon", learners=["MAML"], steps=5)
    together = compare("radon", learners=["Exact", "ABML", "MAML"], steps=5)
    rows = [row for row in metrics(together, tmp_path) if row[0] == "MAML"]
    assert rows == metrics(alone, tmp_path)


def test_a_comparison_is_training_and_evaluation_put_together(tmp_path):
    """The same by hand: a learner of one's own on the recipe's parts."""
    recipe = RECIPES["radon"](3)
    learner = ABML(recipe.model, inner_steps=10, inner_lr=0.1)
    adam = lambda p: torch.optim.Adam(p, 0.02)  # noqa: E731
    history = meta_train(learner, recipe.train, steps=4, generator=seeded(3), optimizer=adam, clip=10.0)
    by_hand = evaluate({"ABML": learner}, recipe.test, seed=3)
    report = compare("radon", learners=["ABML"], steps=4, seed=3)
    assert report.histories["ABML"]["loss"].tolist() == history.loss
    assert metrics(report, tmp_path) == metrics(by_hand, tmp_path)


def test_no_steps_leave_learners_as_they_start():
    lines = []
    report = compare("linear-gaussian", learners=["Exact"], steps=0, num_tasks=4, say=lines.append)
    assert lines[0] == "Exact: untrained" and report.histories == {}


# --- seeds


def test_the_seed_fixes_everything(tmp_path):
    def run(seed, outside):
        torch.manual_seed(outside)  # the caller's own stream plays no part
        before = torch.get_rng_state()
        report = compare("sinusoid", learners=["MAML", "CompletePooling"], steps=2, num_tasks=4, seed=seed)
        assert torch.equal(before, torch.get_rng_state())
        return metrics(report, tmp_path)

    one, again, other = run(1, 10), run(1, 20), run(2, 10)
    assert one == again
    assert [row[2] for row in one] != [row[2] for row in other]


def test_the_seed_is_that_of_the_first_weights_too():
    def prediction(seed):
        report = compare("sinusoid", learners=["CompletePooling"], steps=0, num_tasks=2, seed=seed)
        return report.results["CompletePooling"].bands[0].after.mean.tolist()

    assert prediction(1) == prediction(1) != prediction(2)


def test_the_seed_draws_which_groups_are_held_out():
    """As `--seed` says: of data splits too."""
    names = [compare("radon", learners=["CompletePooling"], steps=0, seed=seed).task_names for seed in (0, 1)]
    assert names[0] != names[1]


# --- NUTS


@pytest.mark.filterwarnings("ignore:NUTS:RuntimeWarning")  # eight draws are few, and NUTS says so
@pytest.mark.parametrize(
    ("learners", "source"),
    [(["NUTS", "MAML", "Exact"], "Exact"), (["MAML", "NUTS"], "MAML"), (["NUTS", "NoPooling"], None), (["NUTS"], None)],
)
def test_nuts_takes_the_theta_that_another_learner_learned(few_draws, monkeypatch, learners, source):
    taken = {}
    monkeypatch.setattr(comparison, "evaluate", lambda adapters, *_, **options: taken.update(adapters, notes=options["notes"]))
    compare("linear-gaussian", learners=learners, steps=3)
    recipe = RECIPES["linear-gaussian"]()
    wanted = taken[source].model if source else recipe.model
    for a, b in zip(taken["NUTS"].model.parameters(), wanted.parameters(), strict=True):
        assert torch.equal(a, b)
    said = f"it uses the one that {source} learned" if source else "it starts with"
    assert any(said in note for note in taken["notes"])
    if source:
        assert not torch.equal(wanted.params["mean"], recipe.model.params["mean"])


@pytest.mark.filterwarnings("ignore:NUTS:RuntimeWarning")
def test_nuts_alone_is_scored(few_draws):
    report = compare("linear-gaussian", learners=["NUTS"], num_tasks=3)
    assert list(report.results) == ["NUTS"] and report.histories == {}
    assert np.isfinite(report.results["NUTS"].metrics["nll"]).all()


# --- models


def test_hierarchical_regression_is_the_radon_program(float64):
    """One feature: the same log joint as the README's program, φ packed alike."""
    e = episode()
    ours = HierarchicalModel(hierarchical_regression(torch.tensor([1.0, -0.5]), torch.ones(2), 1.0), example=e)
    readme = HierarchicalModel(radon_program, example=e)
    phi = torch.randn(5, 4, 2)
    torch.testing.assert_close(ours.log_joint(phi, e), readme.log_joint(phi, e), rtol=0, atol=1e-12)


def test_regression_without_a_level_is_the_linear_gaussian_family(float64):
    family = LinearGaussian(weight_mean=torch.zeros(2), weight_cov=torch.eye(2), noise=1.0, num_support=(0, 6))
    e = family.sample(5, generator=seeded())
    model = HierarchicalModel(hierarchical_regression_without_level(2), example=e)
    torch.testing.assert_close(Exact(model).log_evidence(e.support).detach(), family.log_evidence(e.support), rtol=0, atol=1e-11)


def test_panel_recipes_start_at_the_training_rows(float64):
    whole = panel()
    recipe = panel_recipe(whole)
    rows = np.concatenate([whole.rows(name)[1].numpy() for name in recipe.train.task_names()])
    params = recipe.model.params
    np.testing.assert_allclose(params["mean"].detach().numpy(), [rows.mean(), 0, 0], atol=1e-12)
    np.testing.assert_allclose(params["sd"].exp().detach().numpy(), 0.5 * rows.std(ddof=1), rtol=1e-12)
    np.testing.assert_allclose(params["noise"].exp().item(), rows.std(ddof=1), rtol=1e-12)
    assert recipe.model.dim == 3
    train, test = set(recipe.train.task_names()), set(recipe.test.task_names())
    assert train and test and not train & test


def test_a_panel_of_ones_own():
    report = compare(panel(), learners=["NoPooling", "Exact"], steps=3)
    assert report.title == "y by group"
    assert list(report.task_names) == panel().split("test").task_names()
    assert any("9 groups to train on, 3 held out, of 15" in note for note in report.notes)
    with pytest.raises(ValueError, match="this panel is the 'test' split already"):
        compare(panel().split("test"))


def test_a_target_that_never_changes_is_named():
    """There is nothing to learn, and no scale to start from."""
    y = np.full(40, 3.0)
    constant = Panel.from_arrays(np.repeat(np.arange(8), 5), np.arange(40.0), y, target_name="height", num_support=2)
    with pytest.raises(ValueError, match="height"):
        compare(constant, learners=["Exact"], steps=1)


def test_radon_holds_out_half_of_the_counties():
    recipe = RECIPES["radon"]()
    with (resources.files("bayesmeta.tasks") / "data" / "radon_mn.csv").open(encoding="utf-8") as file:
        counties = {row["county"] for row in csv.DictReader(file)}
    train, test = set(recipe.train.task_names()), set(recipe.test.task_names())
    assert train | test == counties and not train & test
    assert abs(len(train) - len(test)) <= 1


# --- errors


def test_mistyped_names_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"family: expected one of 'radon', .* got 'sinusiod'; did you mean 'sinusoid'\?"):
        compare("sinusiod")
    with pytest.raises(ValueError, match=r"learners: expected one of 'NoPooling', .* got 'NoPoling'; did you mean 'NoPooling'\?"):
        compare("radon", learners=["MAML", "NoPoling"])


@pytest.mark.parametrize(
    ("typed", "meant"), [("nuts", "NUTS"), ("maml", "MAML"), ("abml", "ABML"), ("exact", "Exact"), ("nopooling", "NoPooling")]
)
def test_names_in_another_case_are_known(typed, meant):
    try:
        report = compare("linear-gaussian", learners=[typed], steps=0, num_tasks=2)
    except ValueError as error:
        assert f"did you mean {meant!r}?" in str(error)
    else:
        assert list(report.results) == [meant]


def test_learners_that_do_not_suit_a_family_are_named():
    with pytest.raises(ValueError, match="got 'Exact'"):
        compare("sinusoid", learners=["Exact"])


def test_negative_numbers_are_refused():
    with pytest.raises(ValueError, match="steps >= 0"):
        compare("radon", learners=["MAML"], steps=-1)
    for num_tasks in (0, -3):
        with pytest.raises(ValueError, match="task"):
            compare("linear-gaussian", learners=["CompletePooling"], steps=0, num_tasks=num_tasks)


@pytest.mark.parametrize(
    ("name", "wanted"), [("radon", False), ("a.csv", True), ("folder/a", True), ("sine-or-line", False), ("csv", False)]
)
def test_what_counts_as_a_file(name, wanted):
    assert is_csv(name) == wanted


def test_a_learner_whose_training_fails_is_left_out_and_named(monkeypatch):
    """The others' minutes of work are kept."""
    recipe = RECIPES["linear-gaussian"]()
    wild = recipe.learners | {"MAML": lambda model: MAML(model, inner_steps=5, inner_lr=1e30)}
    monkeypatch.setitem(comparison.RECIPES, "linear-gaussian", lambda seed: dataclasses.replace(recipe, learners=wild))
    lines = []
    report = compare("linear-gaussian", learners=["MAML", "Exact"], steps=2, num_tasks=3, say=lines.append)
    assert list(report.results) == ["Exact"]
    assert lines[0].startswith("MAML left out, its training failed at step 1")
    assert any(note.startswith("MAML is left out: its training failed at step 1") for note in report.notes)
    with pytest.raises(TrainingError, match="step 1"):
        compare("linear-gaussian", learners=["MAML"], steps=2, num_tasks=3)


@pytest.mark.parametrize("name", [name for name in RECIPES["radon"]().learners if name != "NUTS"])
def test_every_learner_trains_on_a_panel_by_its_name_alone(name):
    """A user's program on a table; nothing changes but the learner's name."""
    report = compare("radon", learners=[name], steps=3)
    assert np.isfinite(report.results[name].metrics["nll"][report.query_sizes > 0]).all()
    assert len(report.histories[name]["loss"]) == 3


def test_all_means_all():
    report = compare(panel(), learners=["all"], steps=1)
    assert list(report.results) == list(panel_recipe(panel()).learners)
