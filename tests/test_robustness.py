"""Under shift and outside of the episode: the rows are those of evaluation and of the metrics on the tasks that were asked for."""

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from bayesmeta import HierarchicalModel, evaluate, out_of_episode, under_shift
from bayesmeta.learners import ABML, BlackBox, Ensemble, ProtoNet
from bayesmeta.likelihoods import Categorical, Gaussian
from bayesmeta.metrics import auroc
from bayesmeta.networks import HeadNetwork, PrototypeNetwork, WeightNetwork
from bayesmeta.posteriors import FunctionPosterior
from bayesmeta.tasks import FewShot, Glyphs, Shifted

WAYS, SIZE, TASKS = 3, 10, 6


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def letters():
    return Glyphs(size=SIZE, ways=WAYS, shots=2, test_shots=3).split("test")


def features():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(SIZE * SIZE, 5), nn.Tanh())


def prototypes():
    return ProtoNet(HierarchicalModel.from_network(PrototypeNetwork(features(), 5, WAYS), Categorical(WAYS)))


def head():
    return HierarchicalModel.from_network(HeadNetwork(features(), 5, WAYS), Categorical(WAYS))


def ask(**options):
    return {"num_tasks": TASKS, "seed": 3, **options}


# --- shift


def test_rows_are_those_of_evaluate_on_the_shifted_family(letters):
    learners = {"protonet": prototypes(), "abml": ABML(head(), inner_steps=1)}
    rows = under_shift(learners, letters, kinds=("blur", "noise"), severities=(0, 1), num_draws=5, **ask())
    assert len(rows) == 2 * 2 * 2 * 5
    for kind in ("blur", "noise"):
        report = evaluate(learners, Shifted(letters, kind, severity=1), num_draws=5, examples=0, **ask())
        wanted = {(row["learner"], row["metric"]): (row["estimate"], row["lower"], row["upper"]) for row in report.summary()}
        for row in rows:
            if (row["shift"], row["severity"]) == (kind, 1.0) and row["metric"] != "confidence":
                assert (row["estimate"], row["lower"], row["upper"]) == wanted[row["learner"], row["metric"]]
        for name in learners:
            confidence = next(row for row in rows if (row["shift"], row["severity"], row["learner"], row["metric"])
                              == (kind, 1.0, name, "confidence"))  # fmt: skip
            assert confidence["estimate"] == pytest.approx(float(report.results[name].probs.max(-1).mean()), abs=1e-7)
            assert confidence["lower"] < confidence["estimate"] < confidence["upper"]


def test_no_shift_is_the_same_for_all_kinds_and_evaluated_once(letters, monkeypatch):
    calls = []
    monkeypatch.setattr("bayesmeta.robustness.evaluate", lambda *a, **o: calls.append(a[1].severity) or evaluate(*a, **o))
    rows = under_shift(prototypes(), letters, kinds=("blur", "inversion"), severities=(0, 0.5), **ask())
    assert calls == [0, 0.5, 0.5]

    def at_none(kind):
        return [{**row, "shift": ""} for row in rows if (row["shift"], row["severity"]) == (kind, 0)]

    assert at_none("blur") == at_none("inversion") != []


def test_shifted_support_is_another_thing(letters):
    def accuracy(on):
        rows = under_shift(prototypes(), letters, kinds=("inversion",), severities=(1,), on=on, **ask(num_tasks=40))
        return next(row["estimate"] for row in rows if row["metric"] == "accuracy")

    assert accuracy("both") > accuracy("query") + 0.1  # all inverted alike: classes are told apart as before


def test_padded_points_have_no_confidence(letters):
    letters = Glyphs(size=SIZE, ways=WAYS, shots=2, test_shots=(1, 4)).split("test")
    learner = prototypes()
    rows = under_shift(learner, letters, kinds=("blur",), severities=(0,), **ask())
    result = evaluate(learner, Shifted(letters, "blur", severity=0), examples=0, **ask()).results["ProtoNet"]
    by_hand = [result.probs[t, result.labels[t] >= 0].max(-1).mean() for t in range(TASKS)]
    assert next(row["estimate"] for row in rows if row["metric"] == "confidence") == pytest.approx(np.mean(by_hand), abs=1e-7)


def test_a_task_without_an_answer_leaves_no_mean_confidence(letters):
    class Broken(BlackBox):
        def adapt_over_theta(self, support, *, num_theta=10, generator=None):
            def rule(support, x, mask):
                logits = torch.zeros(1, *x.shape[:2], WAYS)
                logits[0, 0] = torch.nan
                return dist.Categorical(logits=logits, validate_args=False)

            return FunctionPosterior(self.model, rule, self.prepared(support))

    rows = under_shift(Broken(head()), letters, kinds="blur", severities=0, **ask())
    found = {row["metric"]: row["estimate"] for row in rows}
    assert np.isnan(found["confidence"]) and np.isnan(found["nll"])


# --- detection


def test_area_under_the_curve_of_every_score(letters):
    learner = ABML(head(), inner_steps=1)
    rows = out_of_episode({"it": learner}, letters, num_draws=7, task_chunk=TASKS, **ask())
    d, generator = letters.detection(TASKS, generator=seeded(3)), seeded(3)
    p = learner.adapt_over_theta(d.support, generator=generator).predict(d.query.x, 7, generator=generator, mask=d.query.mask)
    draws = torch.stack([fn.probs for fn in p.components]).flatten(0, 1)
    mean = draws.mean(0)
    entropy = -(mean * mean.log()).sum(-1)
    information = entropy + (draws * draws.log()).sum(-1).mean(0)
    for row, values in zip(rows, (mean.amax(-1), -entropy, -information), strict=True):
        wanted = auroc(values, values, mask_in=d.query.mask & d.inside, mask_out=d.query.mask & ~d.inside)
        assert row["auroc"] == pytest.approx(float(wanted), abs=2e-3)  # ties at float's last digit
        assert row["lower"] <= row["auroc"] <= row["upper"]
    assert [row["score"] for row in rows] == ["confidence", "entropy", "information"]


def test_one_who_knows_tells_all_apart_and_one_point_has_no_information(letters):
    outside = FewShot(torch.ones(40, SIZE, SIZE), torch.arange(40) % 4, splits={"test": range(4)}, ways=3, test_shots=2)

    class Knows(BlackBox):
        def adapt_over_theta(self, support, *, num_theta=10, generator=None):
            def rule(support, x, mask):
                white = (x.flatten(2).mean(-1) > 0.99)[..., None]
                return dist.Categorical(logits=torch.where(white, 0.0, torch.tensor([5.0, 0.0, 0.0]))[None])

            return FunctionPosterior(self.model, rule, self.prepared(support))

    rows = out_of_episode({"it": Knows(head())}, letters, outside=outside, **ask())
    found = {row["score"]: row["auroc"] for row in rows}
    assert found["confidence"] == found["entropy"] == 1.0 and np.isnan(found["information"])


def test_members_that_disagree_have_information(letters):
    rows = out_of_episode(Ensemble(head(), BlackBox, size=2), letters, **ask())
    assert {row["learner"] for row in rows} == {"Ensemble"}
    assert np.isfinite([row["auroc"] for row in rows]).all()


def test_chunks_change_nothing_where_nothing_is_drawn(letters):
    whole, parts = (out_of_episode(prototypes(), letters, task_chunk=size, **ask()) for size in (TASKS, 4))
    for one, other in zip(whole[:2], parts[:2], strict=True):
        assert one["auroc"] == pytest.approx(other["auroc"], abs=2e-3)


# --- errors


def test_bad_input_gets_a_clear_error(letters):
    with pytest.raises(ValueError, match=r"kinds: expected one of 'rotation', .* got 'blurr'; did you mean 'blur'"):
        under_shift(prototypes(), letters, kinds=("blurr",))
    with pytest.raises(ValueError, match="num_tasks: expected a whole number of at least 1, got 0"):
        under_shift(prototypes(), letters, num_tasks=0)
    with pytest.raises(ValueError, match="num_tasks: expected a whole number of at least 1, got 0"):
        out_of_episode(prototypes(), letters, num_tasks=0)
    for bad in ({"kinds": ()}, {"severities": ()}):
        with pytest.raises(ValueError, match="expected one kind and one severity at least"):
            under_shift(prototypes(), letters, **bad)
    with pytest.raises(TypeError, match="family: expected a family of tasks, got Episode"):
        under_shift(prototypes(), letters.sample(2, generator=seeded()))
    with pytest.raises(ValueError, match="task_chunk: expected a whole number of at least 1, got 0"):
        out_of_episode(prototypes(), letters, task_chunk=0)
    with pytest.raises(ValueError, match="adapters: expected at least one, got none"):
        out_of_episode({}, letters)
    with pytest.raises(TypeError, match=r"adapters\['a'\]: expected a learner, got int"):
        out_of_episode({"a": 3}, letters)
    with pytest.raises(TypeError, match=r"family: expected few-shot tasks of images .* got Shifted"):
        out_of_episode(prototypes(), Shifted(letters, "blur", severity=1))
    with pytest.raises(TypeError, match=r"outside: expected few-shot tasks of images .* got int"):
        out_of_episode(prototypes(), letters, outside=3)
    regression = BlackBox(HierarchicalModel.from_network(WeightNetwork(nn.Sequential(nn.Flatten(), nn.Linear(SIZE * SIZE, 1))), Gaussian()))
    with pytest.raises(ValueError, match="expected a model of classes"):
        under_shift(regression, letters, num_tasks=2)
    with pytest.raises(ValueError, match="expected a model of classes"):
        out_of_episode(regression, letters, num_tasks=2)
