"""OpenVINO's runtime behind the same buckets: the promises that onnxruntime keeps, kept by another engine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import text_of
from promises import LATE_S, TEXTS, answer_of_a_child, check_sixteen_threads, logits

import hf_bucket
from hf_bucket import engines, providers, session_ort
from hf_bucket.artifact import GRAPH, Artifact
from hf_bucket.compile import CompileOptions, compile_model
from hf_bucket.errors import ArtifactError, DependencyError, ProviderError
from hf_bucket.ladder import Bucket
from hf_bucket.runner import Runner, RunOptions
from hf_bucket.session import Session
from hf_bucket.session_openvino import open_openvino
from hf_bucket.session_ort import CPU, OPENVINO, EngineOptions, open_sessions, resolve_provider
from hf_bucket.source import Source

pytest.importorskip("openvino", reason='openvino is not installed; pip install "hf-bucket[openvino]"')
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def load(artifact: Artifact, **options: Any) -> hf_bucket.runner.Runner:
    return hf_bucket.load(artifact.folder, provider=OPENVINO, **options)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("mode", ["shared", "static"])
def test_every_text_has_the_answer_it_has_alone_on_the_cpu_provider(
    compiled: Artifact, plain: np.ndarray, mode: str, workers: int
) -> None:
    runner = load(compiled, mode=mode, workers=workers, measure_s=0.0)
    np.testing.assert_allclose(logits(runner, TEXTS), plain, atol=1e-5)
    np.testing.assert_allclose(logits(runner, TEXTS[::-1]), plain[::-1], atol=1e-5)
    runner.close()
    np.testing.assert_allclose(logits(runner, TEXTS), plain, atol=1e-5)


def test_a_text_longer_than_any_bucket_runs_at_its_own_length(compiled: Artifact) -> None:
    text = text_of(50)
    got = load(compiled, overflow="dynamic")([text])[0]["logits"]
    expected = hf_bucket.load(compiled.folder, overflow="dynamic")([text])[0]["logits"]
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_sixteen_threads_get_the_sequential_answers(compiled: Artifact, plain: np.ndarray) -> None:
    runner = load(compiled, workers=2)
    check_sixteen_threads(runner, TEXTS, plain)


FIRST_RUNS = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
import numpy as np
from hf_bucket.session_openvino import open_openvino

path, inputs = Path(sys.argv[1]), sys.argv[2:]
arrays = {name: np.ones((1, 8), dtype=np.int64) for name in inputs}
ready = Barrier(8)

def run(engine):
    ready.wait(60)
    return engine.run(["logits"], arrays)[0]

with ThreadPoolExecutor(8) as threads:
    engines = list(threads.map(lambda _: open_openvino(path, threads=1, streams=4, options={}), range(8)))
    sys.setswitchinterval(1e-6)
    answers = list(threads.map(run, engines))
assert len(answers) == 8 and all(np.array_equal(one, answers[0]) for one in answers)
"""


def test_the_first_runs_of_a_process_may_come_at_once(compiled: Artifact) -> None:
    """OpenVINO's bindings would wait for themselves: without ``_core``'s care most such processes hang."""
    graph, inputs = compiled.folder / GRAPH, compiled.manifest.signature.input_names
    subprocess.run([sys.executable, "-c", FIRST_RUNS, graph, *inputs], check=True, timeout=LATE_S)


OPENED: list[tuple[str, int]] = []


def engine(artifact: Artifact, options: EngineOptions) -> dict[Bucket, Session]:
    OPENED.append((options.provider, options.workers))
    return open_sessions(artifact, options)


@pytest.mark.parametrize(("one", "many"), [(OPENVINO, CPU), (CPU, OPENVINO)])
def test_two_providers_that_share_the_work_give_the_same_answers(
    compiled: Artifact, plain: np.ndarray, one: str, many: str
) -> None:
    OPENED.clear()
    asked = EngineOptions(provider=one, provider_of_many=many, workers=2)
    runner = Runner(compiled, RunOptions(engine=asked, overflow="dynamic"), engine=engine)
    assert [(one, 1), (many, 2)] == OPENED, "both when it is loaded: what fails does so there"
    np.testing.assert_allclose(logits(runner, TEXTS * 10), np.concatenate([plain] * 10), atol=1e-5)
    np.testing.assert_allclose(np.concatenate([logits(runner, [text]) for text in TEXTS]), plain, atol=1e-5)
    check_sixteen_threads(runner, TEXTS, plain)
    longer = hf_bucket.load(compiled.folder, overflow="dynamic")([text_of(50)])[0]["logits"]
    np.testing.assert_allclose(logits(runner, [text_of(50)])[0], longer, atol=1e-5)
    runner.close()
    np.testing.assert_allclose(logits(runner, TEXTS), plain, atol=1e-5)


@pytest.mark.filterwarnings("ignore:in this forked process the model runs on")
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize(("many", "one"), [(0.5, 1.5), (1.0, 0.5)], ids=["for many", "for one"])
def test_a_child_of_a_model_that_auto_put_on_openvino_for_one_use_answers(
    compiled: Artifact,
    plain: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    many: float,
    one: float,
) -> None:
    monkeypatch.setenv("HF_BUCKET_CACHE", str(tmp_path / "cache"))
    compared = providers.Comparison(provider=OPENVINO, many=many, one=one)
    monkeypatch.setattr(providers, "_compared", lambda *_: compared)
    monkeypatch.setattr(engines, "faster_at_once", lambda *_, **__: True)
    runner = hf_bucket.load(compiled.folder, workers=2, measure_s=0.1)
    np.testing.assert_allclose(logits(runner, TEXTS), plain, atol=1e-5)
    assert runner._engines._one.provider_of_many == (OPENVINO if many < one else CPU)
    np.testing.assert_allclose(answer_of_a_child(runner, TEXTS, method), plain, atol=1e-5)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_process_opens_sessions_of_its_own_or_says_why_it_cannot(
    compiled: Artifact, plain: np.ndarray, method: str
) -> None:
    runner = load(compiled)
    runner(TEXTS)
    got = answer_of_a_child(runner, TEXTS, method)
    if method == "fork":  # OpenVINO's threads do not survive it
        assert "OpenVINO was used before this process was forked" in got
    else:
        np.testing.assert_allclose(got, plain, atol=1e-5)


def test_int8_does_not_depend_on_neighbours_here_either(tiny_bert: Path) -> None:
    calibration = [text_of(length % 20 + 1, length * 7) for length in range(60)]
    options = CompileOptions(buckets=[8, 24], batch_sizes=[1, 4], quantize="int8", calibration=calibration)
    runner = load(compile_model(Source(name=str(tiny_bert)), options))
    texts = TEXTS[:-1]
    alone = np.concatenate([logits(runner, [text]) for text in texts])
    np.testing.assert_allclose(logits(runner, texts), alone, atol=1e-5)


def test_properties_reach_the_device_and_unknown_ones_are_answered_with_the_list(
    compiled: Artifact, plain: np.ndarray
) -> None:
    runner = load(compiled, provider_options={"INFERENCE_NUM_THREADS": "1"})
    np.testing.assert_allclose(logits(runner, TEXTS), plain, atol=1e-5)
    with pytest.raises(ProviderError, match=r"OpenVINO has no property NONSENSE; it has .*INFERENCE_NUM_THREADS"):
        load(compiled, provider_options={"NONSENSE": "1"})


def test_a_graph_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / GRAPH).write_bytes(b"no graph")
    with pytest.raises(ArtifactError, match=rf"{GRAPH} cannot be loaded by OpenVINO: "):
        open_openvino(tmp_path / GRAPH, threads=1, streams=1, options={})


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(session_ort.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ProviderError, match=r"'openvino' is not installed \(pip install hf-bucket\[openvino\]"):
        resolve_provider(OPENVINO)
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(DependencyError, match=r'pip install "hf-bucket\[openvino\]"'):
        open_openvino(tmp_path / GRAPH, threads=1, streams=1, options={})
