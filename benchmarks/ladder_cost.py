"""What 16 buckets cost instead of one: bytes on disk, seconds to compile, and in both modes seconds to load and memory.

    python benchmarks/ladder_cost.py --model MODEL --output benchmarks/results/ladder_cost.json

Every compilation runs in a process and a cache of its own. Memory is Pss, in MiB, of a process that loaded the
artifact, warmed every bucket up and ran texts of all lengths; it was not the first on the machine, which measures costs
and packs weights, and its seconds to load leave out imports.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import circumstances, show, spread

_COMPILE = """
import sys
from hf_bucket.compile import CompileOptions, compile_model
from hf_bucket.source import Source
buckets = [(8, int(length)) for length in sys.argv[2].split(",")]
print(compile_model(Source(name=sys.argv[1]), CompileOptions(buckets=buckets)).folder)
"""

_LOAD = """
import json, re, sys, time
import hf_bucket
start = time.perf_counter()
runner = hf_bucket.load(sys.argv[1], mode=sys.argv[2], provider="CPUExecutionProvider")
seconds = time.perf_counter() - start
for _ in range(3):
    for words in range(1, runner.ladder.max_length - 2, 5):
        runner(["word " * words] * 16)
with open("/proc/self/smaps_rollup") as file:
    pss = int(re.search(r"^Pss: +([0-9]+) kB", file.read(), re.MULTILINE)[1])
print(json.dumps({"load_s": seconds, "pss_mib": pss / 1024}))
"""

_MODES = ("shared", "static")


def _run(code: str, *arguments: str, cache: Path) -> str:
    environment = {**os.environ, "HF_BUCKET_CACHE": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout.strip()


def measure(model: str, ladders: dict[str, list[int]], rounds: int) -> dict[str, object]:
    """Return size, compile time, and load time and memory by mode, per ladder, rounds interleaved."""
    seconds: dict[str, list[float]] = {name: [] for name in ladders}
    loaded: dict[str, dict[str, list[dict[str, float]]]] = {name: {mode: [] for mode in _MODES} for name in ladders}
    sizes: dict[str, int] = {}
    for _ in range(rounds):
        for name, lengths in ladders.items():
            with tempfile.TemporaryDirectory() as cache:
                start = time.perf_counter()
                folder = _run(_COMPILE, model, ",".join(map(str, lengths)), cache=Path(cache))
                seconds[name].append(time.perf_counter() - start)
                sizes[name] = sum(path.stat().st_size for path in Path(folder).iterdir())
                for mode in _MODES:
                    _run(_LOAD, folder, mode, cache=Path(cache))  # the first on this machine: it fills the cache
                    loaded[name][mode].append(json.loads(_run(_LOAD, folder, mode, cache=Path(cache))))
    return {
        name: {
            "lengths": lengths,
            "bytes": sizes[name],
            "compile_s": spread(seconds[name]),
            **{
                mode: {figure: spread([one[figure] for one in found]) for figure in ("load_s", "pss_mib")}
                for mode, found in loaded[name].items()
            },
        }
        for name, lengths in ladders.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint on the Hub or in a folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    ladders = {"1 bucket": [128], "16 buckets": list(range(8, 129, 8))}
    result = {**circumstances(), "ladders": measure(arguments.model, ladders, arguments.rounds)}
    show(result, arguments.output)


if __name__ == "__main__":
    main()
