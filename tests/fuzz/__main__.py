"""`python -m tests.fuzz`: compare any number of random programs."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # test modules import each other by their own names

from fuzz.search import MismatchError, search

PROGRESS_S = 10.0


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m tests.fuzz", description="Compare random programs on simulated ranks with one device."
    )
    parser.add_argument("--programs", type=int, default=300, help="how many (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which (%(default)s)")
    parser.add_argument("--ranks", type=int, help="on how many simulated ranks (2 to 5)")
    parser.add_argument(
        "--jobs", type=int, default=1, help="processes, each with a seed of its own counted up from --seed (%(default)s)"
    )
    return parser.parse_args()


def in_jobs(options: argparse.Namespace) -> int:
    """Share the programs among processes; return whether any found a mismatch."""
    jobs = []
    for job in range(options.jobs):
        share = options.programs // options.jobs + (job < options.programs % options.jobs)
        ranks = [] if options.ranks is None else ["--ranks", str(options.ranks)]
        command = [sys.executable, "-m", "tests.fuzz", "--programs", str(share), "--seed", str(options.seed + job), *ranks]
        if share:
            jobs.append(subprocess.Popen(command))
    codes = [job.wait() for job in jobs]  # every job is waited for
    return int(any(codes))


def main() -> int:
    options = arguments()
    if options.jobs > 1:
        return in_jobs(options)
    start = last = time.monotonic()

    def state(counts: Counter[str]) -> str:
        num, seconds = sum(counts.values()), time.monotonic() - start
        parts = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
        return f"seed {options.seed}: {num} programs in {seconds:.0f} s ({seconds / max(num, 1):.2f} s each): {parts}"

    def progress(counts: Counter[str]) -> None:
        nonlocal last
        if time.monotonic() - last > PROGRESS_S:
            last = time.monotonic()
            say(state(counts))

    say(f"seed {options.seed}: {options.programs} programs")
    try:
        say(state(search(options.programs, options.seed, options.ranks, progress)))
    except MismatchError as mismatch:
        what = f"{type(mismatch.error).__name__}: {mismatch.error}"
        say(f"\nseed {options.seed}: a mismatch, shrunk to\n\n{mismatch.program.source()}\n{what}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
