"""Devices and precision: one random stream on all devices, no tensor left on the wrong one, steps recorded on a GPU, bfloat16 by argument.

What needs a GPU is skipped without one. Without one PyTorch's "meta" device stands for another device: tensors with shapes and no values,
which cannot be mixed with those of the CPU either.
"""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.nn.utils import stateless

from bayesmeta import Episode, HierarchicalModel, compiling, evaluate, meta_train, tasks
from bayesmeta.agreement import difference, gradients_of
from bayesmeta.backends import MOST_RECORDINGS, SETTLED, Recorded, obstacle
from bayesmeta.compiled import Compiled
from bayesmeta.graphs import draw_noise_outside, trace
from bayesmeta.learners import ABML, MAML, NUTS, BayesianBlackBox, ProtoNet
from bayesmeta.likelihoods import Categorical, Gaussian
from bayesmeta.meta_gradient import MetaGradient
from bayesmeta.networks import PrototypeNetwork, WeightNetwork
from bayesmeta.randomness import DRAWS, DrawnOnCPU, rng
from bayesmeta.rewriting import overwrite

from .conftest import episode, hyper_program, radon_program
from .learners import test_contract as contract
from .learners import test_contract_classifiers as classifiers

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
pytestmark = pytest.mark.filterwarnings("ignore:NUTS:RuntimeWarning")
LEARNERS = [(name, model) for name in contract.LEARNERS for model in ("user program", "weight network") if name not in contract.SAMPLERS]
LEARNERS = [pair for pair in LEARNERS if pair[0] not in contract.QUADRATIC_ONLY or pair[1] == "user program"]
every_learner = pytest.mark.parametrize(("name", "model"), LEARNERS)


def generator(seed=5):
    return torch.Generator().manual_seed(seed)


def there(data, device):
    return type(data)(*(there(v, device) if isinstance(v, tuple) else v.to(device) for v in data))


# --- without a GPU: another device


@pytest.mark.parametrize("draw", [
    lambda d: torch.randn(3, device=d), lambda d: torch.rand(3, device=d), lambda d: torch.empty(3, device=d).normal_(),
    lambda d: torch.randint(9, (4,), device=d), lambda d: torch.randperm(7, device=d),
    lambda d: dist.Normal(torch.zeros(3, device=d), torch.ones(3, device=d), validate_args=False).rsample((2,)),
])  # fmt: skip
def test_what_is_drawn_for_another_device_is_the_cpus_own_stream(draw):
    here, elsewhere = generator(), generator()
    with rng(here):
        wanted = draw("cpu")
    with rng(elsewhere), DrawnOnCPU():
        found = draw("meta")
    assert found.device.type == "meta"
    assert found.shape == wanted.shape
    assert torch.equal(here.get_state(), elsewhere.get_state())


@pytest.mark.parametrize("model", contract.MODELS)
@pytest.mark.parametrize("name", [name for name in contract.LEARNERS if name not in contract.SAMPLERS | contract.ENSEMBLES | {"NoPooling"}])
def test_no_tensor_is_left_on_another_device(name, model):
    learner, e = contract.make(name, model)
    program = learner.model
    values = {n: v.detach().to("meta").requires_grad_(v.requires_grad) for n, v in (*learner.named_parameters(), *learner.named_buffers())}
    with stateless._reparametrize_module(learner, values, tie_weights=True), DrawnOnCPU():
        sets = [program.prepare(there(points, "meta")) for points in e]
        with program.data_ready(), pyro.validation_enabled(False):
            loss = learner.meta_loss(Episode(*sets), generator=generator())
            loss = loss.mean() + learner.global_loss()
            gradients = torch.autograd.grad(loss, [v for v in values.values() if v.requires_grad], allow_unused=True)
    assert {v.device.type for v in (loss, *gradients) if v is not None} == {"meta"}


def test_a_graph_takes_noise_in_moved_and_moves_its_constants_once():
    def function(x):
        with DrawnOnCPU():
            noise = torch.randn(3, 3, device=x.device) + torch.empty(3, 3, device=x.device).normal_()
        return [x @ torch.eye(3).to(x.device) + noise]

    x = torch.empty(3, 3, device="meta")
    module = trace(function, [x])
    noise = draw_noise_outside(module)
    assert {v.device.type for v in noise()} == {"meta"}
    assert not any("_to_copy" in str(node.target) or "copy_" in str(node.target) for node in module.graph.nodes)
    assert [name for name, _ in module.named_buffers()]
    assert module(x, *noise())[0].device.type == "meta"


def test_what_stands_in_the_way_of_recording():
    x = torch.ones(2, 2)
    module = trace(lambda x: [torch.linalg.cholesky(x)], [torch.eye(2)])
    assert obstacle(module, [x]) == "an input is on the CPU"
    assert "_linalg_check_errors" in obstacle(module, [])
    assert "rand" in obstacle(trace(lambda x: [x + torch.rand(2, 2)], [x]), [])
    assert obstacle(trace(lambda x: [x + 1], [x]), []) is None


def test_what_is_named_as_a_draw_exists():
    assert all(hasattr(torch.ops.aten, name) for name in DRAWS)


# --- bfloat16


def images(*, prototypes=False):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4))
    network = PrototypeNetwork(body, 4, 3) if prototypes else WeightNetwork(body)
    model = HierarchicalModel.from_network(network, Categorical(3))
    return ProtoNet(model) if prototypes else MAML(HierarchicalModel.from_network(WeightNetwork(body), Categorical(4)), inner_steps=2)


def pictures(device="cpu"):
    sets = []
    for shots in (2, 3):
        y = torch.arange(3).repeat(shots).expand(4, -1)
        sets += [torch.rand(4, 3 * shots, 1, 8, 8, generator=generator()) + y[..., None, None, None], y]
    return Episode.from_tuple(sets).to(device)


def line():
    torch.manual_seed(0)
    return ABML(HierarchicalModel.from_network(WeightNetwork(nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))), Gaussian()))


def radon():
    return MAML(HierarchicalModel(radon_program), inner_steps=2, inner_lr=0.02)


BFLOAT16 = {
    "images": (images, pictures), "prototypes": (lambda: images(prototypes=True), pictures), "draws": (line, episode),
    "radon": (radon, episode),
}  # fmt: skip
every_bfloat16 = pytest.mark.parametrize(("make", "data"), BFLOAT16.values(), ids=BFLOAT16)


def taken(make, data, **options):
    torch.manual_seed(0)
    learner = make()
    history = meta_train(learner, data(), steps=3, generator=generator(), **options)
    return learner, history.loss


@every_bfloat16
def test_training_in_bfloat16_is_near_float32_with_parameters_and_gradients_in_float32(make, data):
    learner, losses = taken(make, data, compile=False, autocast=torch.bfloat16)
    _, wanted = taken(make, data, compile=False)
    assert losses == pytest.approx(wanted, rel=0.03)
    assert all(p.dtype == torch.float32 for p in learner.parameters())
    assert all(p.grad.dtype == torch.float32 for p in learner.trained_parameters())
    if make is not radon:  # which has no matrix products
        assert losses != wanted
    # afterwards all is float32 again
    p = learner.adapt(data().support).predict(data().query.filled().x, 2, generator=generator())
    assert p.log_prob(data().query.filled().y).dtype == torch.float32


@every_bfloat16
def test_a_traced_step_in_bfloat16_is_the_eager_one_to_the_bit(make, data, monkeypatch):
    modules = []

    def backend(module, inputs):
        modules.append(module)
        return module

    monkeypatch.setattr(compiling, "inductor", backend)
    options = {"autocast": torch.bfloat16, "optimizer": lambda p: torch.optim.SGD(p, 1e-2)}
    assert taken(make, data, compile=True, **options)[1] == taken(make, data, compile=False, **options)[1]
    casts = [n for module in modules for n in module.graph.nodes if n.kwargs.get("dtype") == torch.bfloat16]
    assert modules and bool(casts) == (make is not radon)  # the casts are in the graphs


def test_the_likelihood_is_taken_in_float32():
    learner, data = images(prototypes=True), pictures()
    learner.materialise(data)
    model, seen = learner.model, []
    program = model.program.likelihood.register_forward_hook(lambda _, args, out: seen.append((args[0].dtype, out.logits.dtype)))
    hidden = model.network.features[0].register_forward_hook(lambda _, args, out: seen.append(out.dtype))
    phi, points = model.initial(data.support), model.prepare(data.support)
    with model.in_precision(torch.bfloat16):
        value = model.log_joint(phi, points)
    program.remove()
    hidden.remove()
    assert seen == [torch.bfloat16, (torch.float32, torch.float32)]
    assert value.dtype == torch.float32


def test_a_users_matrix_products_are_lowered_and_the_densities_are_not():
    kinds = []

    def program(points):
        weights = pyro.param("weights", torch.ones(3, 2))
        with pyro.plate("tasks", points.num_tasks):
            level = pyro.sample("level", dist.Normal(torch.zeros(()), 1.0))
            features = points.x.expand(*points.x.shape[:2], 3) @ weights
            kinds.append(features.dtype)
            pyro.sample("y", dist.Normal(level[..., None] + features.sum(-1), 1.0).to_event(1), obs=points.y)

    model, e = HierarchicalModel(program), episode()
    model.materialise(e)
    kinds.clear()
    with model.in_precision(torch.bfloat16):
        log_joint = model.log_joint(model.initial(e.support), e.support)
    assert kinds[-1] == torch.bfloat16
    assert log_joint.dtype == torch.float32


@pytest.mark.parametrize("wrong", [torch.float16, torch.float32, "bf16", True, torch.float64])
def test_another_precision_is_refused(wrong):
    with pytest.raises(ValueError, match=r"autocast: expected None or torch\.bfloat16"):
        meta_train(line(), episode(), steps=1, autocast=wrong)


def test_bfloat16_of_a_float64_model_is_refused():
    learner = line()
    learner.model.double()
    with pytest.raises(ValueError, match=r"autocast: expected a model in float32, got torch\.float64"):
        meta_train(learner, episode(), steps=1, autocast=torch.bfloat16)


@pytest.mark.slow
def test_a_compiled_step_in_bfloat16_is_near_the_eager_one():
    one, other = (taken(images, pictures, compile=compile, autocast=torch.bfloat16)[1] for compile in (True, False))
    assert one == pytest.approx(other, rel=0.02)


# --- with a GPU


def pair(name, model="user program"):
    """A learner on the CPU, the same on a GPU, and data."""
    torch.manual_seed(0)  # encoders start at random
    learner, e = classifiers.make(name) if name in classifiers.LEARNERS else contract.make(name, model)
    learner.materialise(e)
    if isinstance(e, Episode) and e.support.x.is_floating_point():
        learner = learner.double()
    return learner, copy.deepcopy(learner).to("cuda"), e.to(torch.float64)


def close(one, other, tolerance=1e-8):
    torch.testing.assert_close(one.detach().cpu(), other.detach().cpu(), rtol=tolerance, atol=tolerance)


@gpu
@pytest.mark.parametrize(("name", "model"), [*LEARNERS, *((name, "") for name in classifiers.LEARNERS)])
def test_a_gpu_gives_the_losses_and_gradients_of_the_cpu(name, model):
    here, other, e = pair(name, model)
    for one, two in zip(here.members or (here,), other.members or (other,), strict=True):
        losses = [x.meta_loss(e, generator=generator()) for x in (one, two)]
        assert losses[1].is_cuda
        close(*losses, 1e-8 if name != "NoPooling" else 1e-5)  # Newton's method with a Hessian all but singular magnifies rounding
        parts = zip(losses, (one, two), strict=True)
        gradients = [torch.autograd.grad(v.sum(), x.trained_parameters(), allow_unused=True) for v, x in parts]
        for a, b in zip(*gradients, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                close(a, b, 1e-6 if name != "NoPooling" else 1e-4)


@gpu
@pytest.mark.parametrize(("name", "model"), [*LEARNERS, *((name, "") for name in classifiers.LEARNERS)])
def test_a_gpu_adapts_predicts_and_is_scored(name, model):
    here, other, e = pair(name, model)
    predictives = []
    for learner in (here, other):
        posterior = learner.adapt(e.support, generator=generator())
        predictives.append(posterior.predict(e.query.filled().x, None if posterior.is_point else 6, generator=generator()))
    close(*(p.log_prob(e.query.filled().y) for p in predictives), 1e-6)
    report = evaluate({"cpu": here, "gpu": other}, e, num_draws=6)
    for metric, values in report.results["cpu"].metrics.items():
        torch.testing.assert_close(*(torch.tensor(v) for v in (values, report.results["gpu"].metrics[metric])), rtol=1e-5, atol=1e-5,
                                   equal_nan=True)  # fmt: skip


@gpu
@every_learner
def test_three_steps_on_a_gpu_are_the_cpus(name, model):
    runs = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        learner, e = contract.make(name, model)
        runs.append(meta_train(learner.double(), e.to(torch.float64), steps=3, device=device, generator=generator(), compile=False).loss)
        assert {p.device.type for p in learner.parameters()} == {device}
    assert runs[0] == pytest.approx(runs[1], rel=1e-6 if name != "NoPooling" else 1e-4)


@gpu
@every_learner
def test_a_recorded_step_is_the_eager_one(name, model, monkeypatch, recwarn):
    """Without the compiler: the kernels of the traced step, launched by one call; a RuntimeWarning would say that it stays eager."""
    monkeypatch.setattr(compiling, "inductor", lambda module, inputs: Recorded(module, module, inputs))
    runs = []
    for compile in (True, False):
        torch.manual_seed(0)
        learner, e = contract.make(name, model)
        runs.append(meta_train(learner.double(), e.to(torch.float64), steps=6, device="cuda", generator=generator(), compile=compile).loss)
    assert runs[0] == pytest.approx(runs[1], rel=1e-9)
    assert not [w for w in recwarn if "compile=True" in str(w.message)] or name == "NoPooling"


RECORDED = {"MAML", "FOMAML", "ABML", "BMAML", "BMAML predictive", "PLATIPUS", "Reptile", "BayesianBlackBox", "BlackBox"}


@gpu
@pytest.mark.parametrize("name", sorted(RECORDED))
def test_steps_are_recorded_and_follow_data_and_noise(name):
    learner, e = contract.make(name)
    e = e.to(torch.float64)
    learner.double().to("cuda")
    parameters = learner.trained_parameters()
    gradient = MetaGradient(learner, parameters, 1, generator(), compile=True)
    gradient.compiler.backend = lambda module, inputs: Recorded(module, module, inputs)
    for number in range(5):
        data = Episode(*(p._replace(y=p.y * (1 + 0.1 * number)) for p in e))
        before = gradient.generator.get_state()
        found = gradient(data, number, 100)
        loss, gradients = found.loss.clone(), [None if g is None else g.clone() for g in found.gradients]
        after = gradient.generator.get_state()
        gradient.generator.set_state(before)
        wanted = gradients_of(gradient.losses, parameters, 1, data)
        assert difference(found._replace(loss=loss, gradients=gradients), wanted) < 1e-9
        assert torch.equal(after, gradient.generator.get_state())
    (step,) = gradient.compiler.graphs.values()
    assert gradient.compiler.why_eager is None
    assert step.run.why_not is None
    assert step.run.recording is not None


@gpu
def test_kernels_that_cannot_be_recorded_are_launched_one_by_one():
    x = torch.rand(3, device="cuda")
    run = Recorded(lambda x: [x * x.sum().item()], trace(lambda x: [x + 1], [x]), [x])
    assert "captur" in run.why_not
    for value in (x, x + 1):
        torch.testing.assert_close(run(value)[0], value * value.sum())
    torch.rand(3, device="cuda")  # the GPU's own generator is not left in the middle of something
    again = Recorded(lambda x: [x + 1], trace(lambda x: [x + 1], [x]), [x])
    assert again.why_not is None
    torch.testing.assert_close(again(x + 5)[0], x + 6)


@gpu
@pytest.mark.parametrize("make", [line, radon, images, lambda: BayesianBlackBox(HierarchicalModel(hyper_program))],
                         ids=["ABML", "radon", "images", "amortized"])  # fmt: skip
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_compiled_steps_on_a_gpu(make, autocast):
    data = pictures if make is images else episode
    losses = [
        taken(make, data, compile=compile, autocast=autocast, device="cuda", num_tasks=4)[1] for compile in (True, False)
    ]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=0.03 if autocast else 1e-3)


@gpu
def test_compiled_adaptation_on_a_gpu():
    learner, e = line(), episode()
    learner.materialise(e)
    learner.to("cuda")
    compiled = Compiled(learner)
    first = compiled.adapt(e.support, generator=generator())
    kept = first.mean.clone()
    second = compiled.adapt(e.support._replace(y=e.support.y + 1), generator=generator())
    assert compiled.why_eager is None
    assert torch.equal(first.mean, kept)  # not written over
    assert not torch.equal(first.mean, second.mean)
    close(kept, learner.adapt(e.support, generator=generator()).mean, 1e-3)


@gpu
def test_training_goes_on_from_a_gpus_checkpoint_on_the_cpu_and_back(tmp_path):
    whole = taken(line, episode, compile=False)[1]
    path, learner = tmp_path / "run", line()
    for steps, device in ((1, "cuda"), (2, "cpu"), (3, "cuda")):
        history = meta_train(
            learner, episode(), steps=steps, device=device, generator=generator(), compile=False, checkpoint=path, resume=True
        )
    assert history.loss == pytest.approx(whole, rel=1e-4)


@gpu
def test_constants_of_a_program_go_where_its_data_are():
    def program(points):
        with pyro.plate("tasks", points.num_tasks):
            level = pyro.sample("level", dist.Normal(0.0, 1.0))
            rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0), 1.0))
            slope = pyro.sample("slope", dist.Normal(0.1 * level, torch.ones(points.num_tasks)))
            pyro.sample("y", dist.Normal(level[..., None] + slope[..., None] * points.x[..., 0], rate[..., None]).to_event(1), obs=points.y)

    learner = MAML(HierarchicalModel(program), inner_lr=0.01)
    learner.to("cuda")
    posterior = learner.adapt(episode().support)
    assert posterior.mean.is_cuda
    assert learner.model.prior(episode().support).sample((3,)).is_cuda


@gpu
@pytest.mark.parametrize("per_task", [False, True])
def test_nuts_on_a_gpu(per_task):
    model = HierarchicalModel(radon_program)
    model.to("cuda")
    posterior = NUTS(model, num_draws=20, warmup=20, chains=1, per_task=per_task).adapt(episode().support, generator=generator())
    assert posterior.draws().is_cuda
    evaluate({"NUTS": NUTS(model, num_draws=8, warmup=8, chains=1)}, episode())


@gpu
@pytest.mark.parametrize("family", [
    lambda: tasks.Sinusoid.maml(), lambda: tasks.SineOrLine(), lambda: tasks.GaussianProcess(),
    lambda: tasks.LinearGaussian(weight_mean=[0.0], weight_cov=[[1.0]], noise=0.5),
], ids=["sinusoid", "sine or line", "Gaussian process", "linear"])  # fmt: skip
def test_families_are_trained_on_and_reported_from_a_gpu(family, tmp_path):
    family, learner = family(), line()
    meta_train(learner, family, steps=2, device="cuda", generator=generator(), validation=family, validate_every=2, compile=False)
    report = evaluate(learner, family, num_tasks=12, num_draws=5)
    report.to_html(tmp_path / "report.html")
    assert "nll" in next(iter(report.results.values())).metrics


@gpu
def test_a_generator_on_the_gpu_is_refused():
    with pytest.raises(TypeError, match="expected one on the CPU"):
        meta_train(line(), episode(), steps=1, device="cuda", generator=torch.Generator("cuda"))


@gpu
def test_the_gpus_own_stream_is_left_alone():
    learner, e = line(), episode()
    learner.materialise(e)
    learner.to("cuda")
    torch.cuda.manual_seed(3)
    before = torch.cuda.get_rng_state()
    learner.meta_loss(e, generator=generator())
    learner.adapt(e.support).draws(4)
    assert torch.equal(before, torch.cuda.get_rng_state())


@gpu
def test_what_a_recorded_graph_writes_over_is_taken_where_it_stands():
    """Once it has stood there for some calls; where other tensors come, those before are left alone."""
    graph = trace(lambda state, x: [state + x, (state * x).sum()], [torch.zeros(3, device="cuda"), torch.ones(3, device="cuda")])
    overwrite(graph, {0: 0})
    run = Recorded(graph, graph, [torch.zeros(3, device="cuda"), torch.ones(3, device="cuda")])
    states, sums = [torch.full((3,), float(i), device="cuda") for i in range(3)], [[float(i)] * 3 for i in range(3)]
    for call, which in enumerate([0] * (SETTLED + 4) + [1] * (SETTLED + 4) + [0, 1, 2] * 3 + [2] * 30 + [0, 1]):
        x = torch.full((3,), 1.0 + call, device="cuda")
        wanted = sum(value * (1.0 + call) for value in sums[which])
        assert run(states[which], x)[-1].item() == wanted
        sums[which] = [value + 1.0 + call for value in sums[which]]
        assert [state.tolist() for state in states] == sums
    assert run.why_not is None and 5 <= run.recordings <= MOST_RECORDINGS
