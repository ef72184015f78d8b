"""What a county's posterior looks like: draws in the program's own units, a predictive, Pyro's and ArviZ's doors."""

from pathlib import Path

import pyro.infer
import torch
from matplotlib.figure import Figure

import bayesmeta as bm
from bayesmeta.recipes import hierarchical_regression

generator = torch.Generator().manual_seed(0)
counties = bm.tasks.Panel.radon(num_support=3)
model = bm.HierarchicalModel(hierarchical_regression(torch.tensor([1.3, -0.6]), torch.tensor([0.4, 0.3]), 0.8))
learner = bm.learners.Exact(model)  # empirical Bayes: θ by maximum marginal likelihood, φ in closed form
bm.meta_train(learner, counties.split("train"), steps=300, optimizer=lambda p: torch.optim.Adam(p, 0.02), generator=generator)

test = counties.split("test")
support, query = test.episodes(generator=generator)
posterior = learner.adapt(support)
level = posterior.sites(1000, generator=generator)["level"]  # (1000, T)
for name, mean, sd in zip(test.task_names(), level.mean(0), level.std(0), strict=True):
    print(f"{name:20} level {mean:.2f} ± {sd:.2f}")

x = torch.tensor([0.0, 1.0]).view(1, 2, 1).expand(support.num_tasks, -1, -1)  # basement, first floor
predictive = posterior.predict(x, 1000, generator=generator)
print("90% of homes in the first county, basement and first floor:", *(v[0].tolist() for v in predictive.interval(0.9)))
print("share of the predictive variance from not knowing the county:", (predictive.decompose().phi / predictive.variance).mean().item())

draws = pyro.infer.Predictive(model, guide=posterior.guide(), num_samples=100)(support)  # Pyro takes the same objects
print("Pyro's Predictive:", {name: tuple(value.shape) for name, value in draws.items()})

report = bm.evaluate({"Exact": learner, "MAML": bm.learners.MAML(model, inner_steps=5)}, test)
ax = report.plot("calibration", ax=Figure(figsize=(6, 4), layout="constrained").subplots())
Path("runs").mkdir(exist_ok=True)
ax.figure.savefig("runs/calibration.png", dpi=150)
