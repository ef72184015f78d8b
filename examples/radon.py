"""The README's script: one Pyro program, two inference strategies, calibration side by side. About half a minute."""

import pyro
import pyro.distributions as dist
import torch

import bayesmeta as bm


def radon(points):
    mean = pyro.param("mean", torch.tensor([1.0, -0.5]))
    sd = pyro.param("sd", torch.ones(2), constraint=dist.constraints.positive)
    noise = pyro.param("noise", torch.tensor(1.0), constraint=dist.constraints.positive)
    with pyro.plate("tasks", points.num_tasks):
        level = pyro.sample("level", dist.Normal(mean[0], sd[0]))
        effect = pyro.sample("effect", dist.Normal(mean[1], sd[1]))
        y_hat = level[..., None] + effect[..., None] * points.x[..., 0]
        pyro.sample("y", dist.Normal(y_hat, noise).mask(points.mask).to_event(1), obs=points.y)


counties = bm.tasks.Panel.radon()  # or Panel.from_csv("radon.csv", group="county", features=["floor"], target="log_radon")
model = bm.HierarchicalModel(radon)
learner = bm.learners.ABML(model, inner_steps=5, inner_lr=0.1)  # swap the learner here: MAML, NoPooling, Exact, …
bm.meta_train(learner, counties.split("train"), steps=500, optimizer=lambda p: torch.optim.Adam(p, 0.02))

report = bm.evaluate({"ABML": learner, "NUTS": bm.learners.NUTS(model)}, counties.split("test"))
print(report.table())
report.to_html("report.html")
