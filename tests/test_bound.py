"""Sessions on buffers that never move: the same answers run after run, and on a GPU as one CUDA graph per bucket."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from conftest import text_of

from hf_bucket.artifact import Artifact
from hf_bucket.compile import CompileOptions, compile_model
from hf_bucket.ladder import Bucket
from hf_bucket.runner import Runner, RunOptions
from hf_bucket.session_bound import BoundSession
from hf_bucket.session_ort import CUDA, EngineOptions, open_graph
from hf_bucket.source import Source

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

TEXTS = [text_of(length, 3 * length) for length in (1, 5, 6, 13, 14, 3, 2)]


@pytest.fixture(scope="module")
def compiled(tiny_bert: Path) -> Artifact:
    return compile_model(Source(name=str(tiny_bert)), CompileOptions(buckets=[8, 16], batch_sizes=[1, 3]))


def bound(artifact: Artifact, options: EngineOptions) -> dict[Bucket, BoundSession]:
    """What a GPU gets, on the processor."""
    return {
        bucket: BoundSession(bucket, open_graph(artifact.variant(bucket), options), "cpu")
        for bucket in artifact.manifest.ladder
    }


def logits(runner: Runner, texts: list[str]) -> np.ndarray:
    return np.stack([row["logits"] for row in runner(texts)])


@pytest.fixture(scope="module")
def plain(compiled: Artifact) -> np.ndarray:
    return logits(Runner(compiled), TEXTS)


def test_run_after_run_on_the_same_buffers_gives_the_answers_of_any_session(
    compiled: Artifact, plain: np.ndarray
) -> None:
    runner = Runner(compiled, engine=bound)
    for order in (slice(None), slice(None, None, -1), slice(1, 4)):
        np.testing.assert_allclose(logits(runner, TEXTS[order]), plain[order], atol=1e-5)
    runner.close()
    np.testing.assert_allclose(logits(runner, TEXTS), plain, atol=1e-5)


def test_threads_that_share_a_bucket_do_not_get_each_others_answers(compiled: Artifact, plain: np.ndarray) -> None:
    runner = Runner(compiled, engine=bound)

    def ask(number: int) -> None:
        row = number % len(TEXTS)
        np.testing.assert_allclose(logits(runner, [TEXTS[row]])[0], plain[row], atol=1e-5)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(100)))


def test_results_stay_when_the_buffer_is_used_again(compiled: Artifact) -> None:
    bucket = compiled.manifest.ladder.buckets[0]
    session = bound(compiled, EngineOptions())[bucket]
    names = compiled.manifest.signature.input_names
    first: Mapping[str, np.ndarray] = {name: np.ones((1, 8), dtype=np.int64) for name in names}
    kept = session.run(first)["logits"]
    before = kept.copy()
    session.run({**first, "input_ids": np.full((1, 8), 7)})
    np.testing.assert_array_equal(kept, before)


@pytest.mark.skipif(CUDA not in onnxruntime.get_available_providers(), reason="onnxruntime has no CUDA provider here")
def test_on_a_gpu_every_bucket_is_one_cuda_graph_with_the_same_answers(compiled: Artifact, plain: np.ndarray) -> None:
    runner = Runner(compiled, RunOptions(engine=EngineOptions(provider=CUDA, mode="static")))
    for _ in range(3):  # the first run captures, the others replay
        np.testing.assert_allclose(logits(runner, TEXTS), plain, atol=1e-3)
