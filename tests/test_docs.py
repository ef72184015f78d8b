"""The pages say what is true: README code runs as pasted, the learner of the template keeps the contract, links lead somewhere."""

import re
import runpy
from pathlib import Path

import pytest
import torch

import bayesmeta
from bayesmeta import HierarchicalModel, evaluate, meta_train

from .conftest import episode, radon_program

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def code(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.S)


@pytest.mark.filterwarnings("ignore:NUTS:RuntimeWarning")  # a reader sees the warning; it fails nothing
def test_the_readmes_code_runs_as_pasted_block_after_block(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in code("README.md"):
        exec(block, names)  # the reader's own way
    assert (tmp_path / "report.html").stat().st_size > 100_000
    assert "ABML" in capsys.readouterr().out
    assert names["posterior"].sites(1000)["level"].shape == (1000, 17)


def test_the_template_of_extending_is_a_learner(float64):
    names = {"__name__": "bayesmeta_template"}
    exec(code("docs/extending.md")[0], names)
    model = HierarchicalModel(radon_program, example=episode())
    learner = names["MAP"](model, inner_steps=400, inner_lr=0.3)
    exact = bayesmeta.learners.Exact(model).adapt(episode().support)
    torch.testing.assert_close(learner.adapt(episode().support).mean, exact.mean.detach(), rtol=0, atol=1e-8)
    history = meta_train(names["MAP"](model), episode(), steps=3)
    assert history.steps == 3
    assert set(evaluate({"MAP": learner}, episode()).results) == {"MAP"}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_pictures_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", ["README.md", "docs/choosing.md"])
def test_every_learner_has_a_row(page):
    text = (ROOT / page).read_text()
    learners = [name for name in bayesmeta.learners.__all__ if not name.startswith("Abstract")]
    assert not [name for name in learners if f"`{name}`" not in text and f"`{name}(" not in text]


def test_the_changelog_names_the_version():
    assert f"## {bayesmeta.__version__}" in (ROOT / "CHANGELOG.md").read_text() or "## Unreleased" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("name", ["posterior_of_a_county.py"])  # radon.py is the README's code
def test_examples_run(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    assert "level" in capsys.readouterr().out
    assert (tmp_path / "runs" / "calibration.png").stat().st_size > 10_000
