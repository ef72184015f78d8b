"""Seconds that `python -m bayesmeta compare` takes: eagerly, with compile="auto" and nothing on disk, and with all graphs there.

    python -m benchmarks.compare_time [family]            from the repository's root

A run with compile=True fills a folder for the compiler's disk cache; then the three run at the same time, so that other work on the machine
weighs on all of them alike. By the clock, and of the processor with the compilers that are started; NoPooling is eager in each.
"""

import argparse
import dataclasses
import os
import resource
import subprocess
import sys
import tempfile
import time

from bayesmeta import comparison
from benchmarks.machine import facts

FILL = "compile=True"
MODES: dict[str, bool | str] = {FILL: True, "eager": False, "auto, nothing on disk": "auto", "auto, all on disk": "auto"}


def processor() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def train(family: str, mode: bool | str) -> None:
    make, begin = comparison._recipe, time.perf_counter()
    comparison._recipe = lambda *args: dataclasses.replace(make(*args), compile=mode)
    start, before = begin, processor()

    def say(line: str) -> None:
        nonlocal start, before
        now, used = time.perf_counter(), processor()
        if line.startswith("trained"):
            print(f"  {line.split(':')[0].removeprefix('trained '):16}{now - start:8.1f}{used - before:8.1f}", flush=True)
        start, before = now, used

    comparison.compare(family, say=say)
    say("trained the rest: evaluation")
    print(f"  {'all, with start':16}{time.perf_counter() - begin:8.1f}{processor():8.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="?", default="radon")
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.mode:
        train(options.family, MODES[options.mode])
        return
    print(f"{facts()}; s by the clock, s of the processor")
    with tempfile.TemporaryDirectory() as full, tempfile.TemporaryDirectory() as empty:
        print(FILL, finished(started(options.family, FILL, full)), sep="\n", flush=True)
        runs = {mode: started(options.family, mode, full if "all on disk" in mode else empty) for mode in MODES if mode != FILL}
        for mode, run in runs.items():
            print(mode, finished(run), sep="\n", flush=True)


def started(family: str, mode: str, folder: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.compare_time", family, "--mode", mode]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder})


def finished(run: subprocess.Popen[str]) -> str:
    told = run.communicate()[0]
    if run.returncode:
        raise SystemExit(run.returncode)
    return told


if __name__ == "__main__":
    main()
