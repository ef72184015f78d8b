"""Where and when a benchmark runs, for the first line of what it prints."""

import datetime
import os
import platform

import torch


def facts(processor: str = platform.machine()) -> str:
    """Date, torch's version, what computes, threads, cores and load."""
    cores = f"{torch.get_num_threads()} threads on {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores"
    return f"{datetime.date.today()}, torch {torch.__version__}, {processor}, {cores}, load {os.getloadavg()[0]:.1f}"
