"""What routing, padding and un-padding cost, as a share of the time spent inside sessions.

python benchmarks/overhead.py --model MODEL --data-dir GLUE --output benchmarks/results/overhead.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from record import circumstances, show, spread

from hf_bucket.artifact import Artifact
from hf_bucket.batch import Array
from hf_bucket.compile import CompileOptions, compile_model
from hf_bucket.encode import check_texts
from hf_bucket.glue import load_task
from hf_bucket.ladder import Bucket
from hf_bucket.runner import Runner, RunOptions
from hf_bucket.session import Session
from hf_bucket.session_ort import EngineOptions, open_sessions
from hf_bucket.source import Source


class Timed:
    """A session that adds up the seconds spent in another."""

    def __init__(self, session: Session, seconds: dict[str, float]) -> None:
        self.bucket = session.bucket
        self._session = session
        self._seconds = seconds

    def run(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        start = time.perf_counter()
        outputs = self._session.run(arrays)
        self._seconds["inside"] += time.perf_counter() - start
        return outputs

    def close(self) -> None:
        self._session.close()


def measure(artifact: Artifact, texts: list[object], rounds: int) -> dict[str, object]:
    """Return the seconds inside and outside sessions of every round over all texts, and what tokenising took."""
    seconds = {"inside": 0.0}

    def engine(artifact: Artifact, options: EngineOptions) -> dict[Bucket, Session]:
        return {bucket: Timed(session, seconds) for bucket, session in open_sessions(artifact, options).items()}

    one_by_one = RunOptions(engine=EngineOptions(workers=1))  # else runs at once would add up to more than the clock
    runner = Runner(artifact, one_by_one, engine=engine)
    checked = check_texts(texts)
    runner.run(runner.encode(checked))
    shares, insides, encodings = [], [], []
    for _ in range(rounds):
        start = time.perf_counter()
        features = runner.encode(checked)
        encodings.append(time.perf_counter() - start)
        seconds["inside"] = 0.0
        start = time.perf_counter()
        runner.run(features)
        total = time.perf_counter() - start
        insides.append(seconds["inside"])
        shares.append((total - seconds["inside"]) / seconds["inside"])
    return {
        "outside_share_of_inside": spread(shares),
        "inside_s": spread(insides),
        "tokenise_s": spread(encodings),
        "rows": len(texts),
    }


def run_overhead(artifact: Artifact, rounds: int) -> dict[str, object]:
    """Return how much longer a cell takes in a batch of one than in the ladder's largest, interleaved."""
    sessions = open_sessions(artifact, EngineOptions())
    length = artifact.manifest.ladder.lengths[0]
    small, large = (artifact.manifest.ladder.of_length(length)[index] for index in (0, -1))
    times: dict[Bucket, list[float]] = {small: [], large: []}
    for _ in range(rounds):
        for bucket in (small, large):
            shape = (bucket.batch_size, bucket.length)
            arrays = {
                spec.name: np.full(shape, spec.name != "token_type_ids", np.int64)
                for spec in artifact.manifest.signature.inputs
            }
            start = time.perf_counter()
            sessions[bucket].run(arrays)
            times[bucket].append((time.perf_counter() - start) / bucket.cells)
    slope = spread(times[large])["median"]
    extra = (spread(times[small])["median"] - slope) * small.cells / slope
    return {
        "seconds_per_cell": {bucket.name: spread(values) for bucket, values in times.items()},
        "extra_cells_per_run": extra,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint on the Hub or in a folder")
    parser.add_argument("--data-dir", required=True, type=Path, help="folder with mrpc/validation.parquet")
    parser.add_argument("--buckets", default="64,128", help="lengths, with commas (default: 64,128)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    buckets = [int(length) for length in arguments.buckets.split(",")]
    artifact = compile_model(Source(name=arguments.model), CompileOptions(buckets=buckets))
    texts: list[object] = list(load_task("mrpc", "validation", data_dir=arguments.data_dir).texts)
    result = {
        **circumstances(),
        "ladder": str(artifact.manifest.ladder),
        **measure(artifact, texts, arguments.rounds),
        "batch_of_one": run_overhead(artifact, 5 * arguments.rounds),
    }
    show(result, arguments.output)


if __name__ == "__main__":
    main()
