"""hf_bucket and its rivals over the same texts in turns: strings in, labels out, end to end.

    python benchmarks/bench.py --data mrpc,sst2 --checkpoints minilm

Every system runs in a process and an environment of its own, and only one runs at a time. A data set that has a result
already is not measured again without ``--again``. A system that cannot be measured is listed with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench_data import CHECKPOINT_OF, DATA_SETS, PAD_TO, DataSet, Sizes, lengths_of, open_tokenizer
from bench_figures import Measured, Reference, Work, figures, table, without_folders
from bench_report import draw, write_page
from bench_systems import OURS, REFERENCE, ROOT, SYSTEMS, Place, System, Worker, WorkerError
from record import circumstances

from hf_bucket.session_ort import usable_cores

SCHEMA_VERSION = 1
ASSETS = "HF_BUCKET_TEST_ASSETS"
CHECKPOINTS = ("minilm", "bert-base", "default")

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
        worker = self._start(system)
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


def measure(
    request: Request, systems: Sequence[System], start: Start, *, reserve_bytes: int = 0, say: Say
) -> dict[str, Any]:
    """Return the result of one data set with one model, without its circumstances.

    Raises:
        WorkerError: the reference, or the machine's own speed, cannot be measured.
    """
    request.texts_path.parent.mkdir(parents=True, exist_ok=True)
    data = {"texts": request.data.texts, "calibration": request.data.calibration}
    request.texts_path.write_text(json.dumps(data), encoding="utf-8")
    before = matrix_product(start)
    reference = refer(request, start)
    turns = Turns(request, systems, start, reserve_bytes=reserve_bytes, say=say)
    measured = turns.run()
    after = matrix_product(start)
    peak = {library: max(gflops, after[library]) for library, gflops in before.items()}
    sizes = Sizes.of(request.model)
    work = Work(
        texts=len(request.lengths),
        tokens=sum(request.lengths),
        flops=sizes.flops(request.lengths),
        peak_gflops=max(peak.values()),
    )
    ours = measured.get(OURS)
    return {
        "peak_gflops": peak,
        "real_tokens": work.tokens,
        "useful_gflop": work.flops / 1e9,
        "sizes": asdict(sizes),
        "systems": {
            name: {
                "environment": system.environment or "project",
                "options": dict(system.options),
                **figures(measured[name], ours, reference=reference, work=work),
            }
            for name, system in ((system.name, system) for system in systems)
            if name in measured
        },
        "not_measured": turns.failures,
    }


def matrix_product(start: Start) -> dict[str, float]:
    """Return the machine's speed in GFLOP/s, by library."""
    worker = start(REFERENCE)
    try:
        gflops: dict[str, float] = worker.ask("peak", size=2048, repeats=10, threads=usable_cores())["gflops"]
    finally:
        worker.close()
    return gflops


def refer(request: Request, start: Start) -> Reference:
    """Return what plain torch says, one text at a time."""
    path = request.texts_path.with_name("reference.npy").absolute()
    worker = start(REFERENCE)
    try:
        worker.ask("load", **request.job(REFERENCE))
        worker.ask("verify", path=str(path))
        labels = worker.ask("run")["labels"]
    finally:
        worker.close()
    return Reference(logits=np.load(path), labels=tuple(labels))


def is_done(path: Path, *, systems: Sequence[str], settings: Mapping[str, Any]) -> bool:
    """Return whether a file holds the result of these systems with these settings.

    Raises:
        ValueError: it holds another.
    """
    if not path.exists():
        return False
    result = json.loads(path.read_text(encoding="utf-8"))
    found = {name: result.get(name) for name in settings}
    missing = set(systems) - set(result["systems"]) - set(result["not_measured"])
    if found == dict(settings) and not missing:
        return True
    what = f"with {found}" if found != dict(settings) else f"without {', '.join(sorted(missing))}"
    raise ValueError(f"{path} was measured {what}; pass --again to replace it, or --results for another folder")


def single_rows(n: int, wanted: int, seed: int) -> tuple[int, ...]:
    """Return ``wanted`` rows of ``n``, or all of them, always the same."""
    return tuple(random.Random(seed).sample(range(n), min(n, wanted)))


def command(argv: Sequence[str]) -> str:
    """Return what was typed, with folders of this project relative to it and no others."""
    words = [word.replace(f"{ROOT}{os.sep}", "") for word in argv]
    return str(without_folders(shlex.join(["python", *words])))


def model_folder(arguments: argparse.Namespace, name: str, data: str, place: Place) -> Path:
    """Return the folder of a checkpoint; BERT-base is made on the fly."""
    tuned: Path = arguments.models / CHECKPOINT_OF[data]
    if name == "default":
        return ROOT / "hf_bucket" / "default"
    if name == "minilm":
        return tuned
    folder = place.build / "models" / f"bert-base-{tuned.name}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        print(f"making {folder.name}", file=sys.stderr)
        worker = place.start(REFERENCE)
        try:
            worker.ask("random", like=str(tuned.absolute()), folder=str(folder.absolute()))
        finally:
            worker.close()
    return folder


def request_of(arguments: argparse.Namespace, data: str, checkpoint: str, place: Place) -> Request:
    """Read the data and tokenise them for their lengths."""
    model = model_folder(arguments, checkpoint, data, place)
    tokenizer = open_tokenizer(model)
    texts = DATA_SETS[data](arguments.data_dir, arguments.limit, tokenizer)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    max_length = min(512, int(config["max_position_embeddings"]))
    return Request(
        data=texts,
        model=model,
        model_name=checkpoint,
        max_length=max_length,
        lengths=tuple(lengths_of(tokenizer, texts.texts, max_length=max_length)),
        rounds=arguments.rounds,
        single_rows=single_rows(len(texts.texts), arguments.singles, arguments.seed),
        again=arguments.again,
        seed=arguments.seed,
        build=place.build,
    )


def bench(arguments: argparse.Namespace, systems: Sequence[System], data: str, checkpoint: str, place: Place) -> None:
    """Measure one data set with one model, unless that was done, and write the result and its chart."""
    path = arguments.results / f"bench-{data}-{checkpoint}.json"
    settings = {"limit": arguments.limit, "rounds": arguments.rounds, "seed": arguments.seed}
    names = [system.name for system in systems]
    if not arguments.again and is_done(path, systems=names, settings=settings):
        print(f"[{data}, {checkpoint}] measured already: {path}; --again measures it again", file=sys.stderr)
        return
    request = request_of(arguments, data, checkpoint, place)
    say = Progress(f"{data}, {checkpoint}", len(systems), arguments.rounds)
    measured = measure(request, systems, place.start, reserve_bytes=int(arguments.reserve_gb * 1e9), say=say)
    result = {
        "schema_version": SCHEMA_VERSION,
        "set": data,
        "model": checkpoint,
        **circumstances(),
        "command": command(sys.argv),
        **settings,
        "n": len(request.lengths),
        "max_length": request.max_length,
        **measured,
    }
    result = without_folders(result)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(aside, path)
    print(f"{data}, {checkpoint}\n\n{table(result)}\n")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments, with what is missing from the environment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=",".join(DATA_SETS), help="data sets, with commas (default: %(default)s)")
    parser.add_argument("--checkpoints", default="minilm,bert-base", help=f"of {', '.join(CHECKPOINTS)}")
    parser.add_argument("--only", action="append", help="system, or the beginning of some; may be given repeatedly")
    parser.add_argument("--limit", type=int, help="texts of every data set (default: all)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--singles", type=int, default=100, help="single requests in all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of systems")
    parser.add_argument("--again", action="store_true", help="measure, and export, what was done already")
    parser.add_argument("--models", type=Path, help=f"folder of the checkpoints (default: ${ASSETS}/models)")
    parser.add_argument("--data-dir", type=Path, help=f"folder with glue/ and longtail/ (default: ${ASSETS}/data)")
    parser.add_argument("--environments", type=Path, default=ROOT / "build" / "bench", help="of the rivals")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "bench", help="for exports, logs, models")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--page", type=Path, help="Markdown page to put all results into")
    parser.add_argument("--reserve-gb", type=float, default=6.0, help="memory to keep free (default: %(default)s)")
    parser.add_argument("--timeout-s", type=float, default=3600.0, help="for one pass (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="list the systems and stop")
    arguments = parser.parse_args(argv)
    for name, known in (("data", tuple(DATA_SETS)), ("checkpoints", CHECKPOINTS)):
        values = [value for value in getattr(arguments, name).split(",") if value]
        if set(values) - set(known):
            parser.error(f"--{name} is {','.join(values)}; use some of {', '.join(known)}")
        setattr(arguments, name, values)
    for name in ("limit", "rounds"):
        if (getattr(arguments, name) or 1) < 1 or getattr(arguments, name) == 0:
            parser.error(f"--{name} is {getattr(arguments, name)}; it must be at least 1")
    for name, folder in (("models", "models"), ("data_dir", "data")):
        if getattr(arguments, name) is None and not arguments.list and arguments.data:
            if ASSETS not in os.environ:
                parser.error(f"set {ASSETS} to the folder with models/ and data/, or pass --models and --data-dir")
            setattr(arguments, name, Path(os.environ[ASSETS]) / folder)
    return arguments


def chosen(only: Sequence[str] | None) -> list[System]:
    """Return the systems whose names begin as one of ``only`` does; all without it.

    Raises:
        ValueError: one of them is no beginning.
    """
    for beginning in only or ():
        if not any(system.name.startswith(beginning) for system in SYSTEMS):
            raise ValueError(f"no system begins with {beginning!r}; they are {'; '.join(one.name for one in SYSTEMS)}")
    return [one for one in SYSTEMS if only is None or any(one.name.startswith(beginning) for beginning in only)]


def main() -> int:
    arguments = parse()
    try:
        systems = chosen(arguments.only)
        if arguments.list:
            print("\n".join(system.name for system in systems))
            return 0
        place = Place(environments=arguments.environments, build=arguments.build, timeout_s=arguments.timeout_s)
        for checkpoint in arguments.checkpoints:
            for data in arguments.data:
                bench(arguments, systems, data, checkpoint, place)
        results = sorted(arguments.results.glob("bench-*-*.json"))
        for path in results:
            draw(json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".png"))
        if arguments.page:
            write_page(results, arguments.page)
    except (ValueError, OSError, WorkerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
