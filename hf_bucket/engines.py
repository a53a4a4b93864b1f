"""The sessions of a runner: opened when first needed, chosen by the batches of a request, left behind by a fork."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from hf_bucket.artifact import Artifact
from hf_bucket.assign import Cost
from hf_bucket.costs import Batches, Clock, Costs, faster_at_once, key_of, measure, read_costs, spread, write_costs
from hf_bucket.ladder import Bucket
from hf_bucket.machine import machine_folder, measured_once, trim_heap
from hf_bucket.preflight import Trial
from hf_bucket.providers import after_fork
from hf_bucket.session import Session
from hf_bucket.session_ort import Dynamic, Engine, EngineOptions, in_use, named
from hf_bucket.settle import settle
from hf_bucket.workers import Workers

_ONE = Workers(1)


class Engines:
    """Sessions of one artifact. Many threads may use them; a forked child opens its own.

    A few batches run one after another, each on every core unless one thread was as fast; as many as there are workers,
    or more, run at once.

    Args:
        options: how sessions are made; what is ``"auto"`` in them is settled first.
        trial: how it is settled.
        batches: makes what a bucket runs on when it is warmed up and measured.
        make: makes the sessions of the ladder.
        dynamic: makes sessions of any shape.
        warmup: run every bucket once, smallest first, when its sessions are opened.

    Raises:
        LadderError: the sessions do not fit the memory.
        ProviderError, ArtifactError: they cannot be opened.
    """

    def __init__(
        self,
        artifact: Artifact,
        options: EngineOptions,
        trial: Trial,
        *,
        batches: Batches,
        make: Engine,
        dynamic: Dynamic,
        warmup: bool,
    ) -> None:
        self._artifact, self._asked = artifact, options
        self._batches, self._make, self._dynamic, self._warmup = batches, make, dynamic, warmup
        self._one = settle(artifact, options, trial).engine
        self._was_open = False
        self.use(Costs(seconds={}))
        self._begin()

    def _begin(self) -> None:
        """Hold nothing yet, in this process."""
        self._lock = threading.Lock()
        self._many = self._one.for_many_batches()
        self._workers = Workers(self._many.workers)
        self._opened: dict[tuple[int, int], Mapping[Bucket, Session]] = {}  # by threads of a run, and runs at once
        self._exact: Callable[[Bucket], Session] | None = None
        self._pid = os.getpid()  # last: other threads of a forked child look at it first

    def open(self) -> None:
        """Open what requests of one row run on; and of many, where that is another provider, which may fail."""
        self._leave_parent()
        with self._lock:
            self._sessions(self._one)
            if self._one.provider_of_many:
                self._sessions(self._many)

    def use(self, costs: Costs) -> None:
        """Choose sessions by what runs cost, from now on."""
        ladder = self._artifact.manifest.ladder
        self._at_once, self._quick = costs.at_once, costs.quick
        self._cost = costs.of(ladder).__getitem__ if costs.tell(ladder) else None

    def cost(self) -> Cost | None:
        """Return the seconds of a run by its bucket; None where nobody knows, or runs are too short to tell."""
        self._leave_parent()
        return self._cost

    def of_batches(self, batches: int = 1) -> tuple[Workers, Mapping[Bucket, Session]]:
        """Return what runs a request of some batches, and the sessions for it."""
        self._leave_parent()
        many = batches >= self._many.workers > 1 and self._at_once
        with self._lock:
            if many:
                return self._workers, self._sessions(self._many)
            sessions = self._sessions(self._one)
            if self._quick:
                quick = self._sessions(self._many)
                sessions = {bucket: (quick if bucket in self._quick else sessions)[bucket] for bucket in sessions}
            return _ONE, sessions

    def of_shape(self, bucket: Bucket) -> Session:
        """Return a session for a shape outside the ladder."""
        self._leave_parent()
        with self._lock:
            if self._exact is None:
                self._exact = self._dynamic(self._artifact, self._one, self._sessions(self._one))
                trim_heap()
            return self._exact(bucket)

    def measure(self, budget_s: float, *, again: bool, clock: Clock = time.perf_counter) -> Costs:
        """Return what a run of every bucket costs here: see ``Runner.measure``."""
        self._leave_parent()
        path, ladder = costs_path(self._artifact, self._one), self._artifact.manifest.ladder

        def read() -> Costs | None:
            kept = read_costs(path)
            return kept if key_of(ladder) in kept.ladders else None

        def measured() -> Costs:
            kept = Costs(seconds={}) if again else read_costs(path)
            costs = self._measured(kept, budget_s, clock)
            write_costs(path, costs)
            return kept.joined(costs)

        return measured_once(path, read, measured, again=again)

    def _measured(self, kept: Costs, budget_s: float, clock: Clock) -> Costs:
        """Return the costs of the buckets that none are kept of."""
        ladder = self._artifact.manifest.ladder
        with self._lock:
            one, many = self._sessions(self._one), self._sessions(self._many)
        sessions = {bucket: many[bucket] for bucket in spread(ladder) if bucket not in kept.seconds}
        alike = spread(ladder.smallest_batches())
        single = {bucket: one[bucket] for bucket in alike if bucket not in kept.alone}
        alone, at_once, workers = {}, kept.at_once, self._workers
        if workers.n == 1:
            seconds = measure(sessions, self._batches, budget_s=budget_s, clock=clock)
        else:
            seconds = measure(sessions, self._batches, budget_s=budget_s * 0.5, clock=clock)
            if not kept.seconds:
                at_once = faster_at_once(one, many, workers, self._batches, seconds, clock, budget_s=budget_s * 0.2)
            alone = measure(single, self._batches, budget_s=budget_s * 0.3, clock=clock)
        return Costs(seconds=seconds, alone=alone, at_once=at_once, ladders=frozenset({key_of(ladder)}))

    def close(self) -> None:
        """Release the sessions and end the worker threads; a later call opens them again.

        What sessions computed in, the process keeps for the next ones: one arena serves them all.
        """
        self._leave_parent()
        with self._lock:
            opened, self._opened, self._exact = self._opened, {}, None
            workers, self._workers = self._workers, Workers(self._many.workers)
        workers.close()
        for session in {id(session): session for sessions in opened.values() for session in sessions.values()}.values():
            session.close()

    def _sessions(self, options: EngineOptions) -> Mapping[Bucket, Session]:
        """Return the sessions made with these options; they are opened once."""
        workers = options.workers if options is self._many else 1
        key = options.threads, workers
        if key not in self._opened:
            if self._was_open:
                self._artifact.check_unchanged()  # it may be another one by now
            self._opened[key] = sessions = self._make(self._artifact, replace(options, workers=workers))
            if self._warmup and not (options is self._many and self._was_open):
                for bucket in self._artifact.manifest.ladder:
                    sessions[bucket].run(self._batches(bucket))
            trim_heap()
            self._was_open = True
        return self._opened[key]

    def _leave_parent(self) -> None:
        """In a forked child, let go of what the parent opened: its threads, and who held its locks, stayed there."""
        if self._pid != os.getpid():
            settled = after_fork(self._asked, self._one)
            if settled != self._one:  # what costs say is of other engines
                self.use(Costs(seconds={}))
            self._one = settled
            self._begin()


def costs_path(artifact: Artifact, engine: EngineOptions) -> Path:
    """Return the file of this machine's cache for what buckets of a model cost; all ladders of a model share it."""
    return machine_folder(artifact.graph_sha256()) / f"{named(engine)}-{engine.mode}-{in_use(engine)}.json"
