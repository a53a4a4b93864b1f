"""What a CUDA graph per bucket is worth on a GPU: MRPC by plain torch, by shared mode and by static mode.

    python benchmarks/cuda.py --model MODEL --data-dir GLUE --output benchmarks/results/cuda.json

Strings in, labels out, in one process, interleaved round by round; float32, and TF32 nowhere. Single requests are the
first texts one by one. A system's answers are compared with those of torch on the CPU, every text alone.
"""

from __future__ import annotations

import argparse
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from record import circumstances, show, spread
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

import hf_bucket
from hf_bucket.compile import CompileOptions, compile_model
from hf_bucket.glue import load_task
from hf_bucket.session_ort import CUDA
from hf_bucket.source import Source

Pair = tuple[str, str]
System = Callable[[Sequence[Pair]], np.ndarray]

BATCH, LONGEST = 32, 128


class Torch:
    """transformers as it is: texts sorted by length, in batches."""

    def __init__(self, model: str, device: str, batch: int) -> None:
        self._model = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32).eval().to(device)
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._device, self._batch = device, batch

    def __call__(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Return the logits of every pair, of shape ``(pairs, labels)``."""
        order = sorted(range(len(pairs)), key=lambda row: len(pairs[row][0]) + len(pairs[row][1]))
        found: dict[int, np.ndarray] = {}
        with torch.inference_mode():
            for start in range(0, len(order), self._batch):
                rows = order[start : start + self._batch]
                first, second = zip(*(pairs[row] for row in rows), strict=True)
                encoded = self._tokenizer(
                    first, second, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"
                )
                found.update(zip(rows, self._model(**encoded.to(self._device)).logits.cpu().numpy(), strict=True))
        return np.stack([found[row] for row in range(len(pairs))])


def open_systems(model: str) -> dict[str, System]:
    """Return what is compared, by name."""
    options = CompileOptions(buckets=list(range(16, LONGEST + 1, 16)), batch_sizes=[1, 8, BATCH])
    folder = compile_model(Source(name=model), options).folder
    piped = pipeline("text-classification", model=model, device="cuda:0", dtype=torch.float32)

    column = piped.model.config.label2id

    def run_pipeline(pairs: Sequence[Pair]) -> np.ndarray:
        texts = [{"text": first, "text_pair": second} for first, second in pairs]
        return np.array(
            [
                [one["score"] for one in sorted(row, key=lambda one: column[one["label"]])]
                for row in piped(texts, batch_size=BATCH, function_to_apply="none", top_k=None, truncation=True)
            ]
        )

    def bucketed(mode: str) -> System:
        runner = hf_bucket.load(folder, provider=CUDA, mode=mode, overflow="truncate")
        return lambda pairs: np.stack([row["logits"] for row in runner(pairs)])

    return {
        "hf_bucket static": bucketed("static"),
        "hf_bucket shared": bucketed("shared"),
        f"torch, sorted, batch {BATCH}": Torch(model, "cuda:0", BATCH),
        f"transformers pipeline, batch {BATCH}": run_pipeline,
    }


def measure(systems: dict[str, System], pairs: Sequence[Pair], expected: np.ndarray, rounds: int, singles: int) -> Any:
    """Return throughput, single requests and answers by system; rounds and requests take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    alone: dict[str, list[float]] = {name: [] for name in systems}
    answers = {name: run(pairs) for name, run in systems.items()}  # the first pass warms up
    for _ in range(rounds):
        for name, run in systems.items():
            start = time.perf_counter()
            run(pairs)
            seconds[name].append(time.perf_counter() - start)
    for pair in pairs[:singles]:
        for name, run in systems.items():
            start = time.perf_counter()
            run([pair])
            alone[name].append(time.perf_counter() - start)
    fastest = median(seconds["hf_bucket static"])
    return {
        name: {
            "texts_per_s": spread([len(pairs) / second for second in seconds[name]]),
            "hf_bucket_static_is_faster": median(seconds[name]) / fastest,
            "single_p50_ms": float(np.percentile(alone[name], 50) * 1000),
            "single_p99_ms": float(np.percentile(alone[name], 99) * 1000),
            "max_abs_delta_logit": float(np.abs(answers[name] - expected).max()),
            "label_flips": int((answers[name].argmax(axis=1) != expected.argmax(axis=1)).sum()),
        }
        for name in systems
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint on the Hub or in a folder")
    parser.add_argument("--data-dir", required=True, type=Path, help="folder with mrpc/validation.parquet")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--singles", type=int, default=100)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    pairs = [
        (str(text[0]), str(text[1])) for text in load_task("mrpc", "validation", data_dir=arguments.data_dir).texts
    ]
    expected = Torch(arguments.model, "cpu", 1)(pairs)
    systems = measure(open_systems(arguments.model), pairs, expected, arguments.rounds, arguments.singles)
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    result = {
        **circumstances(),
        "gpu": subprocess.run(query, check=True, stdout=subprocess.PIPE, text=True).stdout.strip(),
        "texts": len(pairs),
        "singles": arguments.singles,
        "systems": systems,
    }
    show(result, arguments.output)


if __name__ == "__main__":
    main()
