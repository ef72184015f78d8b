"""The recipes of images: every learner constructs, adapts and trains on tiny letters; the families by name; the benchmark's script."""

import dataclasses
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bayesmeta import compare, comparison, evaluate, meta_train
from bayesmeta.cli import main
from bayesmeta.comparison import RECIPES
from bayesmeta.learners import ProtoNet
from bayesmeta.recipes import image_recipe
from bayesmeta.tasks import Glyphs, Panel

SIZE = 10
NAMES = [
    "ProtoNet", "MatchingNet", "MAML", "FOMAML", "Reptile", "ANIL", "BlackBox", "Ensemble", "LLAMA", "ABML", "BMAML", "PLATIPUS",
    "BayesianBlackBox",
]  # fmt: skip
ALL_WEIGHTS = ["LLAMA-all", "ABML-all", "BMAML-all"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def tiny_letters(ways=3):
    return Glyphs(size=SIZE, ways=ways, shots=1, test_shots=2)


def tiny():
    torch.manual_seed(0)
    return image_recipe("Letters", tiny_letters(), filters=4, blocks=2, steps=2)


def omniglot(folder):
    """A folder with twelve made-up characters of 20 drawers, as Omniglot's npz has them."""
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 2, (12, 1, 28, 28)) * 255
    noise = rng.integers(0, 60, (12, 20, 28, 28))
    np.savez(
        folder / "omniglot28.npz", images=np.clip(kinds + noise, 0, 255).astype(np.uint8),
        part=np.repeat(["images_background", "images_evaluation"], 6), alphabet=np.repeat(["A", "B"], 6),
        character=np.array([f"character{k:02d}" for k in range(6)] * 2),
    )  # fmt: skip
    return folder


# --- each learner


def test_the_learners_and_which_run_unasked():
    recipe = tiny()
    assert list(recipe.learners) == NAMES + ALL_WEIGHTS and recipe.default == tuple(NAMES)
    assert {"glyphs", "omniglot"} <= set(comparison.FAMILIES)


@pytest.mark.parametrize("name", [*NAMES, *ALL_WEIGHTS])
def test_every_learner_trains_adapts_and_predicts(name):
    recipe = tiny()
    learner = recipe.learners[name](recipe.model)
    history = meta_train(learner, recipe.train, steps=2, tasks_per_step=2, generator=seeded(), compile=False)
    assert history.steps == 2 and np.isfinite(history.loss).all()
    episode = recipe.test.sample(3, generator=seeded(1))
    loss = learner.meta_loss(episode, generator=seeded())
    assert loss.shape == (3,) and loss.isfinite().all()
    result = evaluate({name: learner}, episode, num_draws=5).results[name]
    assert result.probs.shape == (3, 6, 3) and np.isfinite(result.metrics["nll"]).all()


def test_all_start_from_one_embedding():
    recipe = tiny()
    features = {
        name: [tuple(p.flatten().tolist()) for p in recipe.learners[name](recipe.model).model.network.parameters() if p.dim() == 4]
        for name in ("ProtoNet", "ANIL", "ABML")
    }  # fmt: skip
    assert features["ProtoNet"] == features["ANIL"] == features["ABML"] != []
    start = recipe.model.network.initial().tolist()
    assert start[: len(features["ANIL"][0])] == list(features["ANIL"][0])


def test_learners_do_not_share_what_they_train():
    recipe = tiny()
    one, other = (recipe.learners["ANIL"](recipe.model) for _ in range(2))
    before = [p.clone() for p in other.parameters()]
    meta_train(one, recipe.train, steps=1, tasks_per_step=2, generator=seeded(), compile=False)
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))


def test_prototypes_learn_letters_in_a_few_steps():
    """Well above chance, and above the embedding as it starts."""
    letters = Glyphs(size=14, ways=5, shots=1, test_shots=5)
    torch.manual_seed(0)
    recipe = image_recipe("Letters", letters, filters=8, blocks=2)
    learner = recipe.learners["ProtoNet"](recipe.model)
    held_out = recipe.test.sample(100, generator=seeded(1))

    def accuracy():
        return float(evaluate({"it": learner}, held_out).results["it"].metrics["accuracy"].mean())

    assert isinstance(learner, ProtoNet)
    before = accuracy()
    meta_train(
        learner, recipe.train, steps=60, tasks_per_step=4, generator=seeded(), compile=False,
        optimizer=lambda params: torch.optim.Adam(params, 1e-2),
    )  # fmt: skip
    assert accuracy() > max(0.45, before + 0.05)


# --- by name


@pytest.fixture
def small(monkeypatch):
    """The recipes with 2 filters."""
    def quick(make):
        def recipe(seed=0, **options):
            full = make(seed, **options)
            torch.manual_seed(seed)
            few = image_recipe(full.title, tiny_letters(ways=5), filters=2, blocks=2)
            return dataclasses.replace(few, train=full.train, test=full.test, tasks_per_step=2)

        return recipe

    monkeypatch.setattr(comparison, "RECIPES", RECIPES | {name: quick(RECIPES[name]) for name in ("glyphs", "omniglot")})


def test_letters_by_name(small, tmp_path, capsys):
    out = tmp_path / "out"
    names = ["ProtoNet", "MAML", "ABML"]
    assert main(["compare", "glyphs", "--steps", "1", "--tasks", "3", "--learners", *names, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert [line.split(":")[0] for line in printed.splitlines()[:3]] == [f"trained {name}" for name in names]
    assert "accuracy" in printed and (out / "report.html").exists()


def test_omniglot_by_name_from_a_folder_or_the_environment(small, tmp_path, monkeypatch):
    monkeypatch.setenv("BAYESMETA_DATA", str(omniglot(tmp_path)))
    here = compare("omniglot", learners=["ProtoNet"], steps=1, num_tasks=2)
    assert here.title.startswith("Omniglot") and any("2 filters" in note for note in here.notes)
    assert any(note.startswith("Transductive") for note in here.notes)
    monkeypatch.delenv("BAYESMETA_DATA")
    there = compare("omniglot", learners=["ProtoNet"], steps=1, num_tasks=2, root=tmp_path)
    np.testing.assert_array_equal(here.results["ProtoNet"].metrics["nll"], there.results["ProtoNet"].metrics["nll"])


def test_omniglot_without_data_is_one_plain_line(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("BAYESMETA_DATA", raising=False)
    assert main(["compare", "omniglot", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "BAYESMETA_DATA" in said and not (tmp_path / "out").exists()
    assert main(["compare", "omniglot", "--root", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "images_background.zip" in capsys.readouterr().err


def test_a_root_for_another_family_is_refused(tmp_path):
    with pytest.raises(ValueError, match="root: the folder of Omniglot's data, of no use to radon"):
        compare("radon", root=tmp_path)
    with pytest.raises(ValueError, match="of no use to a table"):
        compare(Panel.radon(), root=tmp_path)


# --- the benchmark


@pytest.mark.parametrize("learner", ["protonet", "maml", "maml-fc"])
def test_the_benchmark_runs_and_goes_on(learner, tmp_path, monkeypatch, capsys):
    omniglot(tmp_path)
    (tmp_path / "splits").mkdir()
    for name, lines in (("train", "A/character0"), ("val", "B/character0"), ("test", "B/character0")):
        first = 3 if name == "test" else 0
        numbers = range(6) if name == "train" else range(first, first + 3)
        (tmp_path / "splits" / f"{name}.txt").write_text("".join(f"{lines}{k}\n" for k in numbers))
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    arguments = ["omniglot", learner, "--root", str(tmp_path), "--out", str(tmp_path / "out"), "--ways", "5", "--filters", "2", "--moved"]
    arguments += ["--steps", "2", "--tasks", "2", "--parts", "2", "--episodes", "4"]
    monkeypatch.setattr(sys, "argv", arguments)
    printed = []
    for _ in range(2):
        runpy.run_module("benchmarks.omniglot", run_name="__main__")
        printed.append(capsys.readouterr().out)
    assert next(line for line in printed[0].splitlines() if line.startswith("accuracy")) in printed[1]
    rows = (tmp_path / "out" / f"{learner}-5way-1shot-seed0.csv").read_text().splitlines()
    assert [row.split(",")[6] for row in rows] == ["metric", "accuracy", "nll", "brier", "ece"]
