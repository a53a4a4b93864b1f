"""One system of the benchmark, in a process and an environment of its own: JSON lines in, JSON lines out.

Each line on standard input is ``{"do": command, ...}``, each line on standard output its answer; a failed command
answers ``{"error": ...}``. The process times only itself. It needs Python 3.10 and the packages of its own system,
never hf_bucket unless that is the system.

    prepare  job                 export what is slow to make, once and for all systems that share it -> seconds
    load     job                 -> seconds, memory, versions
    verify   path                a first pass, which warms up: logits to an .npy file -> cells, seconds, memory
    warm                         a pass that is not timed, after loading again
    run                          one pass over all texts -> seconds, labels, memory
    single   rows                one request at a time -> seconds of each, memory
    peak     size, repeats       -> GFLOP/s of float32 matrix products, of numpy and of torch
    random   like, folder        write a BERT-base of random weights with the tokenizer of ``like``
    quit
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from worker_engines import ENGINES, PREPARES, Job, read_data

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "onnxruntime",
    "onnxruntime-ep-openvino",
    "openvino",
    "optimum",
    "optimum-onnx",
    "optimum-intel",
    "sentence-transformers",
    "numpy",
)


def prepare(job: Job) -> dict[str, Any]:
    """Fill the job's ``prepared`` folder: written aside, then renamed into place."""
    folder, aside = Path(job.prepared), Path(f"{job.prepared}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    PREPARES[job.engine](job, aside)
    seconds = time.perf_counter() - start
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(aside, folder)
    return {"seconds": seconds}


def memory() -> dict[str, int]:
    """Return the resident set's peak and this process's proportional share of memory, in bytes; Linux only."""
    kilobytes: dict[str, str] = {}
    for name in ("status", "smaps_rollup"):
        path = Path("/proc/self") / name
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            kilobytes |= dict(line.split(":", 1) for line in lines if ":" in line)
    names = {"peak_bytes": "VmHWM", "pss_bytes": "Pss"}
    return {name: int(kilobytes[key].split()[0]) * 1024 for name, key in names.items() if key in kilobytes}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that take part."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def products(multiply: Callable[[], Any], *, size: int, repeats: int) -> float:
    """Return the GFLOP/s of the fastest of several products of two ``size`` x ``size`` matrices."""
    multiply()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        multiply()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds) / 1e9


def measure_peak(*, size: int, repeats: int, threads: int) -> dict[str, float]:
    """Return the best GFLOP/s of numpy's, torch's and onnxruntime's float32 matrix product, one thread per core."""
    import numpy as np
    import torch

    torch.set_num_threads(threads)
    left, right = np.random.default_rng(0).random((2, size, size), dtype=np.float32)
    left_tensor, right_tensor = torch.from_numpy(left), torch.from_numpy(right)
    return {
        "numpy": products(lambda: left @ right, size=size, repeats=repeats),
        "torch": products(lambda: left_tensor @ right_tensor, size=size, repeats=repeats),
        "onnxruntime": products(onnxruntime_product(left, right, threads), size=size, repeats=repeats),
    }


def onnxruntime_product(left: Any, right: Any, threads: int) -> Callable[[], Any]:
    """Return a call that multiplies by fixed weights, as models do."""
    import onnx
    import onnxruntime

    make, floats = onnx.helper, onnx.TensorProto.FLOAT
    graph = make.make_graph(
        [make.make_node("MatMul", ["left", "right"], ["product"])],
        "product",
        [make.make_tensor_value_info("left", floats, left.shape)],
        [make.make_tensor_value_info("product", floats, None)],
        [onnx.numpy_helper.from_array(right, "right")],
    )
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"left": left})


def write_random_model(like: Path, folder: Path) -> dict[str, Any]:
    """Write a BERT-base of random weights, seed 0, with the labels and the tokenizer of another checkpoint."""
    import torch
    import transformers

    torch.manual_seed(0)
    labels = transformers.AutoConfig.from_pretrained(like)
    config = transformers.BertConfig(vocab_size=30522, id2label=labels.id2label, label2id=labels.label2id)
    aside = Path(f"{folder}.part")
    shutil.rmtree(aside, ignore_errors=True)
    transformers.BertForSequenceClassification(config).save_pretrained(aside)
    for path in like.glob("tokenizer*"):
        shutil.copyfile(path, aside / path.name)
    os.replace(aside, folder)
    return {}


def reason(error: BaseException) -> str:
    """Return an error in one line, with the one that it came from at first: libraries hide it behind others."""
    first = error
    while (cause := first.__cause__ or first.__context__) is not None:
        first = cause
    words = [f"{type(one).__name__}: {(str(one).strip().splitlines() or [''])[0][:300]}" for one in (error, first)]
    return words[0] if first is error else f"{words[0]} (from {words[1]})"


class Server:
    """Answers commands; holds the engine and its texts once they are loaded."""

    def __init__(self) -> None:
        self._engine: Any = None
        self._texts: list[Any] = []

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """Do what a message says and return the answer."""
        command = message.pop("do")
        if command not in ("prepare", "load", "verify", "warm", "run", "single", "peak", "random"):
            raise ValueError(f"unknown command {command!r}")
        result: dict[str, Any] = getattr(self, f"_{command}")(**message)
        return result

    def _prepare(self, **job: Any) -> dict[str, Any]:
        return prepare(Job(**job))

    def _load(self, **fields: Any) -> dict[str, Any]:
        job = Job(**fields)
        self._texts = read_data(job)["texts"]
        start = time.perf_counter()
        self._engine = ENGINES[job.engine](job)
        return {"seconds": time.perf_counter() - start, "memory": memory(), "versions": versions()}

    def _verify(self, path: str) -> dict[str, Any]:
        import numpy as np

        start = time.perf_counter()
        logits, cells = self._engine.logits(self._texts)
        seconds = time.perf_counter() - start
        np.save(path, logits)
        return {"cells": cells, "seconds": seconds, "memory": memory()}

    def _warm(self) -> dict[str, Any]:
        self._engine.labels(self._texts)
        return {}

    def _run(self) -> dict[str, Any]:
        start = time.perf_counter()
        labels = self._engine.labels(self._texts)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "labels": labels, "memory": memory()}

    def _single(self, rows: list[int]) -> dict[str, Any]:
        seconds = []
        self._engine.labels([self._texts[rows[0]]])  # the first after a pass may wake threads
        for row in rows:
            start = time.perf_counter()
            self._engine.labels([self._texts[row]])
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds, "memory": memory()}

    def _peak(self, size: int, repeats: int, threads: int) -> dict[str, Any]:
        return {"gflops": measure_peak(size=size, repeats=repeats, threads=threads)}

    def _random(self, like: str, folder: str) -> dict[str, Any]:
        return write_random_model(Path(like), Path(folder))


def main() -> None:
    """Answer every line until ``quit`` or the end of the input."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print does not belong between the answers
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [path for path in sys.path if path != here]  # files beside this one shadow no package
    server = Server()
    for line in sys.stdin:
        message = json.loads(line)
        if message["do"] == "quit":
            return
        try:
            reply = server.answer(message)
        except Exception as error:  # noqa: BLE001 - whatever a rival raises is one row of the table
            reply = {"error": reason(error)}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
