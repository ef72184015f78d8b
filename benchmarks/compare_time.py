"""Seconds that `python -m bayesmeta compare` takes: eagerly, with compile="auto" and nothing on disk, and with all graphs there.

    python -m benchmarks.compare_time [family]            from the repository's root

One process after the other, the compiler's disk cache in a folder of their own, which a run with compile=True fills in between. By the
clock, and of the processor with the compilers that are started: beside other work go by the latter.
"""

import argparse
import dataclasses
import datetime
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time

import torch

from bayesmeta import comparison

MODES: dict[str, bool | str] = {"eager": False, "auto, nothing on disk": "auto", "compile=True": True, "auto, all on disk": "auto"}


def processor() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def train(family: str, mode: bool | str) -> None:
    make = comparison._recipe
    comparison._recipe = lambda *args: dataclasses.replace(make(*args), compile=mode)
    start, before = time.perf_counter(), processor()

    def say(line: str) -> None:
        nonlocal start, before
        now, used = time.perf_counter(), processor()
        if line.startswith("trained"):
            print(f"  {line.split(':')[0].removeprefix('trained '):16}{now - start:8.1f}{used - before:8.1f}", flush=True)
        start, before = now, used

    comparison.compare(family, say=say)
    say("trained the rest: evaluation")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="?", default="radon")
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.mode:
        train(options.family, MODES[options.mode])
        return
    where = f"{torch.get_num_threads()} threads on {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    print(f"{datetime.date.today()}, torch {torch.__version__}, {platform.machine()}, {where}; s by the clock, s of the processor")
    with tempfile.TemporaryDirectory() as folder:
        for mode in MODES:
            print(mode, flush=True)
            start, before = time.perf_counter(), processor()
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.compare_time", options.family, "--mode", mode]
            subprocess.run(command, check=True, env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder})
            print(f"  {'all, with start':16}{time.perf_counter() - start:8.1f}{processor() - before:8.1f}", flush=True)


if __name__ == "__main__":
    main()
