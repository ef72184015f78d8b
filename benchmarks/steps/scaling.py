"""How a step grows: sinusoid MAML in the number of tasks T and of inner steps K, BMAML in the number of particles M."""

from .workloads import Workload

WORKLOADS = [
    *(Workload(f"T = {t}", "sinusoid", t, 5) for t in (1, 4, 25, 100, 400, 1000)),
    *(Workload(f"K = {k}", "sinusoid", 25, k) for k in (1, 2, 5, 10, 20)),
    *(Workload(f"M = {m}", "bmaml", 25, 1, m) for m in (1, 2, 4, 16, 64)),
]
TITLES = {"T": "tasks (MAML, 5 inner steps)", "K": "inner steps (MAML, 25 tasks)", "M": "particles (BMAML, 25 tasks, 1 step)"}
