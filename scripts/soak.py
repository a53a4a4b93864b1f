"""Ask a loaded artifact thousands of times for texts of mixed lengths, and state how its process's memory grows.

    python scripts/soak.py ARTIFACT --requests 20000 --out benchmarks/results/soak.json

It is the median growth of the resident memory over ten stretches of the second half of the requests, when every bucket
has long run once: what leaks grows in each of them, a block that the allocator takes once does in one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np

import hf_bucket

_SAMPLES = 400
_STRETCHES = 10


def resident_bytes() -> int:
    """Return the memory of this process that is in RAM."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def texts_of(chance: random.Random, words: list[str], longest: int, rows: int) -> list[str]:
    """Return ``rows`` texts whose lengths are spread evenly over the ladder."""
    return [" ".join(chance.choices(words, k=chance.randint(0, longest))) for _ in range(rows)]


def soak(folder: Path, n: int, seed: int = 0) -> dict[str, object]:
    """Return the growth of the resident memory, with what it was measured on."""
    chance = random.Random(seed)
    runner = hf_bucket.load(folder, overflow="truncate")
    largest = runner.ladder.max_length
    vocabulary = json.loads(runner.artifact.tokenizer_json())["model"]["vocab"]
    words = sorted(word for word in vocabulary if word.isalnum() and word.isascii())[-500:]
    every, samples = max(1, n // _SAMPLES), []
    start = time.perf_counter()
    for number in range(1, n + 1):
        rows = runner(texts_of(chance, words, largest - 4, 1 if number % 10 else 8))
        assert len(rows) == (1 if number % 10 else 8)
        if number % every == 0:
            samples.append((number, resident_bytes()))
    seconds = time.perf_counter() - start
    late = [(at, size) for at, size in samples if at > n // 2]
    stretches = np.array_split(np.array(late), max(1, min(_STRETCHES, len(late) // 2)))
    growth = median((sizes[-1] - sizes[0]) / (at[-1] - at[0]) for at, sizes in (one.T for one in stretches))
    return {
        "requests": n,
        "rows": runner.stats()["rows"],
        "buckets_run": sum(figures["rows"] > 0 for figures in runner.stats()["buckets"].values()),
        "bytes_per_request": round(float(growth), 2),
        "resident_bytes": {str(at): size for at, size in samples[:: max(1, len(samples) // 10)]},
        "seconds": round(seconds, 1),
        "ladder": str(runner.ladder),
        "artifact": folder.name,
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("hf-bucket", "onnxruntime", "tokenizers", "numpy")},
    }


def main() -> None:
    """Print the figures, or write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, help="folder that save_pretrained wrote")
    parser.add_argument("--requests", type=int, default=20000)
    parser.add_argument("--json", action="store_true", help="print everything, as JSON")
    parser.add_argument("--out", type=Path, help="write everything there")
    arguments = parser.parse_args()
    figures = soak(arguments.artifact, arguments.requests)
    if arguments.out:
        figures["command"] = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures) if arguments.json else f"{figures['bytes_per_request']} bytes per request")


if __name__ == "__main__":
    main()
