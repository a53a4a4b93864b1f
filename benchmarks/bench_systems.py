"""The systems that are compared, one row each, and the processes they run in."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, Protocol

from bench_environments import python_of

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
OURS = "hf_bucket"
PROJECT = ""  # the environment that runs the benchmark itself


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One row of the table.

    Attributes:
        engine: a key of ``worker_engines.ENGINES``.
        environment: a table of ``environments.toml``, or ``PROJECT``.
        options: of the engine; for hf_bucket the keywords of its ``pipeline``.
        prepared: what it exports first is kept under this name, which systems may share; empty if it exports nothing.
    """

    name: str
    engine: str
    environment: str = PROJECT
    options: Mapping[str, Any] = field(default_factory=dict)
    prepared: str = ""


REFERENCE = System(name="torch, one at a time", engine="torch", options={"batch_size": 1, "sort": False})

# hf_bucket's own variants: keywords of hf_bucket.pipeline. The first is the one that all others are compared with.
_AUTO = {"buckets": "auto", "n_buckets": 64}
BUCKETED: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        OURS: _AUTO,
        "hf_bucket provider=CPUExecutionProvider": {**_AUTO, "provider": "CPUExecutionProvider"},
        "hf_bucket mode=static": {"buckets": "auto", "n_buckets": 16, "mode": "static"},
        "hf_bucket int8": {**_AUTO, "quantize": "int8"},
    }
)


def _sorted(
    name: str, engine: str, *, sizes: Sequence[int] = (32, 8), options: Mapping[str, Any] | None = None, **place: str
) -> list[System]:
    """Return a rival that sorts texts by length, in batches of 32, and in smaller ones, which pad less."""
    return [
        System(
            name=f"{name}, sorted{'' if n == 32 else f', batch {n}'}",
            engine=engine,
            options={**(options or {}), "batch_size": n},
            **place,
        )
        for n in sizes
    ]


def _rivals() -> list[System]:
    pipelines = [
        System(name=f"transformers pipeline, batch {n}", engine="pipeline", options={"batch_size": n})
        for n in (1, 8, 32)
    ]
    torches = [
        System(name="torch, all padded alike", engine="torch", options={"sort": False, "pad": "all"}),
        *_sorted("torch", "torch"),
        System(name="torch.compile, sorted", engine="torch", options={"compile": True}),
    ]
    exported = [
        system
        for label, sizes, options, prepared in (
            ("ONNX", [32], {"format": "onnx"}, "exported-onnx"),
            ("ONNX fused", [32], {"format": "onnx", "ort_fusions": "cpu"}, "exported-onnx-fused"),
            ("OpenVINO", [32, 8], {"format": "openvino"}, "exported-openvino"),
        )
        for system in _sorted(
            f"transformers ExportedModel {label}", "exported", sizes=sizes, options=options, prepared=prepared
        )
    ]
    optimum = []
    for engine in ("optimum-onnx", "optimum-intel"):
        place = {"environment": engine.replace("-", "_"), "prepared": engine}
        through = {"through": "pipeline", "batch_size": 32}
        optimum += [
            System(name=f"{engine}, pipeline, batch 32", engine=engine, options=through, **place),
            *_sorted(engine, engine, options={"through": "batches"}, **place),
        ]
    encoders = [
        System(
            name=f"sentence-transformers {backend}",
            engine="cross-encoder",
            environment=environment,
            options={"backend": backend},
            prepared="" if backend == "torch" else f"cross-encoder-{backend}",
        )
        for backend, environment in (("torch", "st"), ("onnx", "st_onnx"), ("openvino", "st_openvino"))
    ]
    return [*pipelines, *torches, *exported, *optimum, *encoders]


SYSTEMS: tuple[System, ...] = (
    *(
        System(name=name, engine="hf_bucket", options=options, prepared=name.replace(" ", "-"))
        for name, options in BUCKETED.items()
    ),
    *_rivals(),
)


class WorkerError(Exception):
    """A system that cannot be measured; the message is the reason in its row."""


class Worker(Protocol):
    """A system's process."""

    def ask(self, do: str, **message: Any) -> dict[str, Any]:
        """Send a command and return the answer.

        Raises:
            WorkerError: the command failed, or the process ended or took too long.
        """

    def close(self) -> None:
        """End the process."""


class ProcessWorker:
    """A worker that runs ``worker.py``; it stands still except while it is asked.

    Args:
        python: of the system's environment.
        log: file for what it prints.
        cache: where hf_bucket compiles to, whatever ``HF_BUCKET_CACHE`` says.
        timeout_s: for one answer.

    Raises:
        WorkerError: there is no such Python.
    """

    def __init__(self, python: Path, *, ours: bool, log: Path, cache: Path, timeout_s: float) -> None:
        if not python.exists():
            raise WorkerError(f"its environment {python.parents[1].name} is missing; run make bench-environments")
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log, self._timeout_s = log, timeout_s
        with log.open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                [str(python), str(HERE / "worker.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                encoding="utf-8",
                env=_environment(ours=ours, cache=cache),
                start_new_session=True,
            )
        self._pause()

    def ask(self, do: str, **message: Any) -> dict[str, Any]:
        """Let the process run until it has answered."""
        self._signal("SIGCONT")
        timer = threading.Timer(self._timeout_s, self._signal, ["SIGKILL"])
        timer.start()
        try:
            stdin, stdout = self._pipes()
            stdin.write(json.dumps({"do": do, **message}) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if not line:
            raise WorkerError(self._last_words(do))
        self._pause()
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise WorkerError(str(reply["error"]))
        return reply

    def close(self) -> None:
        """End the process and whatever it started."""
        self._signal("SIGKILL")
        self._process.wait()
        for pipe in self._pipes():
            try:
                pipe.close()
            except BrokenPipeError:
                continue

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise TypeError("the worker was started without pipes")
        return stdin, stdout

    def _pause(self) -> None:
        self._signal("SIGSTOP")

    def _signal(self, name: str) -> None:
        if hasattr(os, "killpg"):
            try:
                os.killpg(self._process.pid, getattr(signal, name))
            except ProcessLookupError:
                return
        elif name == "SIGKILL":
            self._process.kill()

    def _last_words(self, do: str) -> str:
        code = self._process.wait()
        lines = [line for line in self._log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        words = f": {lines[-1].strip()[:200]}" if lines else ""
        return f"its process ended with code {code} during {do!r} (or took over {self._timeout_s:.0f} s){words}"


def _environment(*, ours: bool, cache: Path) -> dict[str, str]:
    """Return a worker's environment variables: offline, and this project's code only where it is the system."""
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    variables |= {"HF_HUB_OFFLINE": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "TOKENIZERS_PARALLELISM": "true"}
    variables["HF_BUCKET_CACHE"] = str(cache)
    return variables | ({"PYTHONPATH": str(ROOT)} if ours else {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where workers find their environments and leave their files.

    Attributes:
        environments: folder of the rivals' environments.
        build: folder for exports, logs and models made on the fly.
    """

    environments: Path
    build: Path
    timeout_s: float = 3600.0

    @property
    def cache(self) -> Path:
        """Folder that hf_bucket compiles to."""
        return (self.build / "cache").absolute()

    def start(self, system: System) -> Worker:
        """Start a system's process."""
        python = Path(sys.executable)
        if system.environment != PROJECT:
            python = python_of(self.environments.absolute() / system.environment)
        log = self.build / "logs" / f"{system.name.replace(' ', '-').replace(',', '')}.log"
        return ProcessWorker(
            python,
            ours=system.engine == "hf_bucket",
            log=log,
            cache=self.cache,
            timeout_s=self.timeout_s,
        )
