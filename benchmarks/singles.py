"""Requests of one text each: several processes of every system, a few requests at a time, in turns.

    python benchmarks/singles.py --data longtail --checkpoints bert-base --singles 100 --processes 3 \
        --only hf_bucket --only optimum-intel

Two processes of one and the same system differ by up to a quarter, for as long as they live, and the machine's speed
drifts: a table of ``bench.py``, where every system has one process and its requests come one after the other, cannot
tell a few hundredths apart. Here every system has several, all stay loaded, and each answers the same texts. All other
arguments are those of ``bench.py``, which compares the answers too; its rounds, page and list there are none of, and
what it exported is taken as it is.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench import chosen, parse, request_of
from bench_systems import OURS, Place, System, Worker, WorkerError
from bench_turns import Request, Start, prepare
from record import circumstances, show, spread, without_folders

_AT_A_TIME = 5  # requests of one process before the next has its turn


def measure(request: Request, systems: Sequence[System], start: Start, processes: int) -> dict[str, list[list[float]]]:
    """Return the seconds of every request of every process, by system. Shape: (process, row).

    Raises:
        WorkerError: a system cannot be measured.
    """
    request.write_texts()
    shuffled, rows = random.Random(request.seed), request.single_rows
    turns = [rows[first : first + _AT_A_TIME] for first in range(0, len(rows), _AT_A_TIME)]
    workers: list[tuple[str, Worker]] = []
    try:
        for number in range(processes):
            for system in systems:
                job = request.job(system)
                if system.prepared and not Path(job["prepared"]).exists():
                    prepare(system, job, start)
                worker = start(system)
                workers.append((system.name, worker))
                print(f"loading {system.name}, process {number + 1}", file=sys.stderr, flush=True)
                worker.ask("load", **job)
                worker.ask("single", rows=list(rows))  # what a system does on first sight of a length is not timed
        seconds: dict[Worker, list[float]] = {worker: [] for _, worker in workers}
        for turn in turns:
            shuffled.shuffle(workers)
            for _, worker in workers:
                seconds[worker] += worker.ask("single", rows=list(turn))["seconds"]
        return {system.name: [seconds[worker] for name, worker in workers if name == system.name] for system in systems}
    finally:
        for _, worker in workers:
            worker.close()


def figures(seconds: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, Any]:
    """Return per system the p50 of all its requests and of each process, and its time over hf_bucket's, text by text.

    Of a text, that is the median of the system's processes over the median of hf_bucket's.
    """
    per_row = {name: [median(row) for row in zip(*found, strict=True)] for name, found in seconds.items()}
    result = {}
    for name, found in seconds.items():
        ratios = [one / ours for one, ours in zip(per_row[name], per_row[OURS], strict=True)]
        result[name] = {
            "p50_ms": 1e3 * median(one for process in found for one in process),
            "processes_p50_ms": [1e3 * median(process) for process in found],
            "x_hf_bucket": spread(ratios),
        }
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=3, help="of every system (default: %(default)s)")
    own, rest = parser.parse_known_args()
    if own.processes < 1:
        parser.error(f"--processes is {own.processes}; it must be at least 1")
    arguments = parse(rest)
    refused = [name for name in ("again", "list", "page") if getattr(arguments, name)]
    if refused or arguments.singles < 1:
        parser.error(f"--{refused[0]} is bench.py's only" if refused else "--singles must be at least 1")
    place = Place(environments=arguments.environments, build=arguments.build, timeout_s=arguments.timeout_s)
    try:
        systems = chosen(arguments.only, arguments.without)
        if OURS not in [system.name for system in systems]:
            raise ValueError(f"without {OURS} there is nothing to compare with; pass --only {OURS} too")
        for checkpoint in arguments.checkpoints:
            for data in arguments.data:
                request = request_of(arguments, data, checkpoint, place)
                before = circumstances()
                found = figures(measure(request, systems, place.start, own.processes))
                result = {"set": data, "model": checkpoint, **before, "n": len(request.single_rows), "systems": found}
                show(without_folders(result), arguments.results / f"singles-{data}-{checkpoint}.json")
    except (ValueError, OSError, WorkerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
