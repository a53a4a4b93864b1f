"""Systems take turns over the same texts: one round after another, each system once in every round, in its process."""

from __future__ import annotations

import json
import random
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench_data import PAD_TO, DataSet
from bench_figures import Measured
from bench_systems import System, Worker, WorkerError
from record import without_folders

from hf_bucket.session_ort import usable_cores

Start = Callable[[System], Worker]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One data set with one model.

    Attributes:
        model: folder of the checkpoint.
        model_name: in the result.
        rounds: timed passes of every system.
        single_rows: texts that are requested one at a time, dealt over the rounds.
        again: make exports anew, too.
        seed: of the order of systems in every round.
        build: folder for what is made on the way.
    """

    data: DataSet
    model: Path
    model_name: str
    max_length: int
    lengths: tuple[int, ...]
    rounds: int
    single_rows: tuple[int, ...]
    again: bool
    seed: int
    build: Path

    @property
    def texts_path(self) -> Path:
        """File through which workers get the texts."""
        return self.build / "texts" / f"{self.data.name}-{self.model_name}.json"

    def write_texts(self) -> None:
        """Write that file."""
        self.texts_path.parent.mkdir(parents=True, exist_ok=True)
        data = {"texts": self.data.texts, "calibration": self.data.calibration}
        self.texts_path.write_text(json.dumps(data), encoding="utf-8")

    def job(self, system: System) -> dict[str, Any]:
        """Return what ``worker_engines.Job`` takes."""
        longest = max(self.lengths)
        return {
            "engine": system.engine,
            "model": str(self.model.absolute()),
            "prepared": str(self._prepared(system)) if system.prepared else "",
            "data": str(self.texts_path.absolute()),
            "max_length": self.max_length,
            "full_length": PAD_TO if longest <= PAD_TO <= self.max_length else self.max_length,
            "threads": usable_cores(),
            "options": dict(system.options),
        }

    def _prepared(self, system: System) -> Path:
        # hf_bucket compiles for the lengths of the data set, the others once per model; one name stands for several
        # models, which the data set chooses among
        name = f"{system.prepared}-{self.data.name}" if system.engine == "hf_bucket" else system.prepared
        return (self.build / "prepared" / self.model_name / self.model.name / name).absolute()


class Turns:
    """Systems that take turns over a request's texts.

    A process stays loaded between its turns, standing still, as long as ``free_bytes`` says that there is room for
    another; else the one that has waited longest is ended, and loaded again when its turn comes.
    """

    def __init__(
        self, request: Request, systems: Sequence[System], start: Start, *, reserve_bytes: int = 0, say: Say
    ) -> None:
        self._request = request
        self._systems = {system.name: system for system in systems}
        self._start = start
        self._reserve_bytes = reserve_bytes
        self._say = say
        self._workers: dict[str, Worker] = {}  # the longest waiting first
        self._records = {system.name: Record() for system in systems}
        self._prepared: set[str] = set()
        self.failures: dict[str, str] = {}

    def run(self) -> dict[str, Measured]:
        """Return what every system did that finished; the others are in ``failures``."""
        try:
            for name in self._systems:
                self._guard(name, self._first)
            for number in range(self._request.rounds):
                for name in self._order(number):
                    self._guard(name, self._round, number)
        finally:
            for worker in self._workers.values():
                worker.close()
            self._workers.clear()
        return {name: self._records[name].measured() for name in self._alive()}

    def _alive(self) -> list[str]:
        return [name for name in self._systems if name not in self.failures]

    def _order(self, number: int) -> list[str]:
        """Return the systems in the order of a round, shuffled anew for each."""
        names = self._alive()
        random.Random(self._request.seed + number).shuffle(names)
        return names

    def _guard(self, name: str, act: Callable[..., str], *arguments: int) -> None:
        """Let a system act; if it fails, it is out, with the reason."""
        try:
            did = act(name, *arguments)
        except WorkerError as error:
            self.failures[name] = without_folders(str(error))
            worker = self._workers.pop(name, None)
            if worker is not None:
                worker.close()
            did = f"out: {self.failures[name]}"
        self._say(name, did, arguments[0] + 1 if arguments else 0, len(self._alive()))

    def _first(self, name: str) -> str:
        record, system = self._records[name], self._systems[name]
        record.prepare_s = self._prepare(system)
        worker = self._worker(name)
        path = self._request.texts_path.with_name("logits.npy").absolute()
        reply = worker.ask("verify", path=str(path))
        record.logits, record.cells, record.first_pass_s = np.load(path), reply["cells"], reply["seconds"]
        record.remember(reply["memory"])
        return f"loaded in {record.load_s[-1]:.1f} s, first pass {record.first_pass_s:.2f} s"

    def _round(self, name: str, number: int) -> str:
        record = self._records[name]
        again = name not in self._workers
        worker = self._worker(name)
        if again:
            worker.ask("warm")
        reply = worker.ask("run")
        record.seconds.append(reply["seconds"])
        record.labels = tuple(reply["labels"])
        record.remember(reply["memory"])
        rows = self._request.single_rows[number :: self._request.rounds]
        if rows:
            record.singles.extend(worker.ask("single", rows=list(rows))["seconds"])
        return f"{reply['seconds']:.2f} s"

    def _worker(self, name: str) -> Worker:
        """Return a loaded worker, the last in the queue."""
        worker = self._workers.pop(name, None)
        if worker is None:
            self._make_room()
            worker = self._start(self._systems[name])
            self._workers[name] = worker
            reply = worker.ask("load", **self._request.job(self._systems[name]))
            self._records[name].load_s.append(reply["seconds"])
            self._records[name].versions = reply["versions"]
            self._records[name].remember(reply["memory"])
        self._workers[name] = worker
        return worker

    def _make_room(self) -> None:
        while self._workers and free_bytes() < self._reserve_bytes:
            self._workers.pop(next(iter(self._workers))).close()

    def _prepare(self, system: System) -> float | None:
        """Let a process of its own export, so that the export is in nobody's memory and load time."""
        job = self._request.job(system)
        folder = Path(job["prepared"])
        fresh = folder.exists() and (not self._request.again or str(folder) in self._prepared)
        if not system.prepared or fresh:
            return None
        self._prepared.add(str(folder))
        shutil.rmtree(folder, ignore_errors=True)
        self._make_room()
        return prepare(system, job, self._start)


def prepare(system: System, job: Mapping[str, Any], start: Start) -> float:
    """Let a process of its own export what a system runs, and return its seconds."""
    worker = start(system)
    try:
        return float(worker.ask("prepare", **job)["seconds"])
    finally:
        worker.close()


class Record:
    """What one system has done so far."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.singles: list[float] = []
        self.load_s: list[float] = []
        self.logits: Any = None
        self.labels: tuple[str, ...] = ()
        self.cells: int | None = None
        self.memory: dict[str, int] = {}
        self.prepare_s: float | None = None
        self.first_pass_s = 0.0
        self.versions: dict[str, str] = {}

    def remember(self, memory: Mapping[str, int]) -> None:
        """Keep the largest of every figure of memory."""
        self.memory = {name: max(size, self.memory.get(name, 0)) for name, size in memory.items()}

    def measured(self) -> Measured:
        """Return it as a value."""
        return Measured(
            seconds=tuple(self.seconds),
            singles=tuple(self.singles),
            logits=self.logits,
            labels=self.labels,
            cells=self.cells,
            memory=self.memory,
            load_s=tuple(self.load_s),
            prepare_s=self.prepare_s,
            first_pass_s=self.first_pass_s,
            versions=self.versions,
        )


Say = Callable[[str, str, int, int], None]  # system, what it did, round (0: loading), systems still in


class Progress:
    """Lines on standard error: what was done, and how much is left.

    Args:
        clock: returns seconds.
    """

    def __init__(self, title: str, systems: int, rounds: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._title, self._systems, self._rounds, self._clock = title, systems, rounds, clock
        self._loaded = 0
        self._done = 0
        self._start = clock()

    def __call__(self, system: str, did: str, number: int, alive: int) -> None:
        """Print one line."""
        if number == 0:
            self._loaded += 1
            self._start = self._clock()
            where, left = f"loading {self._loaded} of {self._systems}", f"then {self._rounds} rounds"
        else:
            self._done += 1
            passes = max(0, alive * self._rounds - self._done)
            minutes = passes * (self._clock() - self._start) / self._done / 60
            where, left = f"round {number} of {self._rounds}", f"{passes} turns left, about {minutes:.0f} min"
        print(f"[{self._title}] {where}: {system}: {did}; {left}", file=sys.stderr, flush=True)


def free_bytes() -> int:
    """Return the memory that is available, as Linux estimates it; without such an estimate, plenty."""
    info = Path("/proc/meminfo")
    lines = info.read_text(encoding="ascii").splitlines() if info.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 1 << 62)
