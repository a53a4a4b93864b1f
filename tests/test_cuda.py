"""CUDA behind the same buckets: the promises of the CPU provider, kept on a GPU, as one CUDA graph per bucket."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import text_of
from promises import LATE_S, TEXTS, answer_of_a_child, check_sixteen_threads, logits
from pyarrow.parquet import read_table
from test_every_architecture import SAME

import hf_bucket
from hf_bucket.artifact import GRAPH, Artifact
from hf_bucket.compile import CompileOptions, compile_model
from hf_bucket.errors import BucketWarning, ProviderError
from hf_bucket.probes import PROBES, load_probes, validate
from hf_bucket.session_ort import CUDA, EngineOptions, open_graph, open_recorded, open_sessions
from hf_bucket.source import Source

if CUDA not in onnxruntime.get_available_providers():
    pytest.skip("onnxruntime has no CUDA provider here", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def load(artifact: Artifact, **options: Any) -> hf_bucket.runner.Runner:
    return hf_bucket.load(artifact.folder, provider=CUDA, **options)


@pytest.mark.parametrize("mode", ["shared", "static", "auto"])
def test_every_text_has_the_answer_it_has_alone_on_the_cpu_provider(
    compiled: Artifact, plain: np.ndarray, mode: str
) -> None:
    before = set(threading.enumerate())
    runner = load(compiled, mode=mode)
    for order in (slice(None), slice(None, None, -1), slice(1, 4), slice(None)):  # the first records, others replay
        np.testing.assert_allclose(logits(runner, TEXTS[order]), plain[order], atol=1e-5)
    runner.close()
    assert set(threading.enumerate()) <= before
    np.testing.assert_allclose(logits(runner, TEXTS), plain, atol=1e-5)


def test_all_buckets_of_static_mode_share_one_session(compiled: Artifact) -> None:
    sessions = open_recorded(compiled, EngineOptions(provider=CUDA, mode="static"))
    (engine,) = {session.engine for session in sessions.values()}  # type: ignore[attr-defined]
    assert engine.session.get_provider_options()[CUDA]["enable_cuda_graph"] == "1"


# Decoders have operators that onnxruntime runs on the CPU only, the others one that returns as many rows as it finds.
NOT_RECORDED = {"bart", "bloom", "gemma", "gpt2", "llama", "mbart", "mistral", "mpt", "opt", "qwen2", "t5"}


@pytest.mark.parametrize("model_type", SAME)
def test_every_family_gives_torchs_answer_recorded_or_not(
    architectures: ModuleType, tmp_path: Path, model_type: str
) -> None:
    architectures.save(*architectures.build(model_type), tmp_path)
    compiled = compile_model(Source(name=str(tmp_path)), CompileOptions(buckets=[6, 13], batch_sizes=[1, 3]))
    reference, probes = load_probes(compiled.folder / PROBES)
    options = EngineOptions(provider=CUDA, mode="static")
    if model_type in NOT_RECORDED:
        with pytest.raises(ProviderError, match=r'use mode="shared"'):
            open_recorded(compiled, options)
        with pytest.warns(BucketWarning, match=r'mode="auto" is shared: '):
            load(compiled, mode="auto")
        options = EngineOptions(provider=CUDA)
    sessions = open_sessions(compiled, options)
    for _ in range(3):  # the first run records, others replay
        for bucket, session in sessions.items():
            validate(bucket, session, probes, compiled.manifest.signature, reference=reference, atol=1e-4)


def test_a_real_model_gives_torchs_labels(assets: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = assets / "models" / "minilm-mrpc"
    rows = read_table(assets / "data" / "glue" / "mrpc" / "validation.parquet").to_pylist()
    pairs = [(row["sentence1"], row["sentence2"]) for row in rows]
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        expected = np.concatenate([model(**tokenizer(*pair, return_tensors="pt")).logits.numpy() for pair in pairs])
    runner = hf_bucket.load(
        compile_model(Source(name=str(folder)), CompileOptions(buckets=[32, 64, 128], batch_sizes=[1, 32])).folder,
        provider=CUDA,
        mode="static",
    )
    got = np.stack([row["logits"] for row in runner(pairs)])
    np.testing.assert_allclose(got, expected, atol=5e-5)
    np.testing.assert_array_equal(got.argmax(axis=1), expected.argmax(axis=1))


@pytest.mark.parametrize("mode", ["shared", "static"])
def test_float32_is_float32_unless_the_user_says_otherwise(compiled: Artifact, mode: str) -> None:
    kept = open_graph(compiled.path(GRAPH), EngineOptions(provider=CUDA, mode=mode))  # type: ignore[arg-type]
    assert kept.session.get_provider_options()[CUDA]["use_tf32"] == "0"
    options = EngineOptions(provider=CUDA, mode=mode, provider_options={"use_tf32": "1"})  # type: ignore[arg-type]
    assert open_graph(compiled.path(GRAPH), options).session.get_provider_options()[CUDA]["use_tf32"] == "1"


@pytest.mark.parametrize("mode", ["shared", "static"])
def test_a_text_longer_than_any_bucket_runs_at_its_own_length(compiled: Artifact, mode: str) -> None:
    text = text_of(50)
    got = load(compiled, overflow="dynamic", mode=mode)([text])[0]["logits"]
    expected = hf_bucket.load(compiled.folder, overflow="dynamic", provider="CPUExecutionProvider")([text])
    np.testing.assert_allclose(got, expected[0]["logits"], atol=1e-5)


@pytest.mark.parametrize("mode", ["shared", "static"])
def test_sixteen_threads_get_the_sequential_answers(compiled: Artifact, plain: np.ndarray, mode: str) -> None:
    runner = load(compiled, mode=mode)
    check_sixteen_threads(runner, TEXTS, plain)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_process_opens_sessions_of_its_own_or_says_why_it_cannot(
    compiled: Artifact, plain: np.ndarray, method: str
) -> None:
    runner = load(compiled, mode="static")
    runner(TEXTS)
    got = answer_of_a_child(runner, TEXTS, method)
    if method == "fork":
        assert "CUDA was used before this process was forked" in got
    else:
        np.testing.assert_allclose(got, plain, atol=1e-5)


def test_nothing_but_onnxruntime_is_needed_to_find_cuda(compiled: Artifact) -> None:
    program = (
        "import sys, hf_bucket; runner = hf_bucket.load(sys.argv[1], provider='CUDAExecutionProvider', mode='static');"
        "print(len(runner(['a b', 'c'])), 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", program, str(compiled.folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LATE_S)
    assert done.stdout.split() == ["2", "False"], done.stdout + done.stderr


def test_int8_does_not_depend_on_neighbours_here_either(tiny_bert: Path) -> None:
    calibration = [text_of(length % 20 + 1, length * 7) for length in range(60)]
    options = CompileOptions(buckets=[8, 24], batch_sizes=[1, 4], quantize="int8", calibration=calibration)
    runner = load(compile_model(Source(name=str(tiny_bert)), options), mode="shared")
    texts = [text_of(length, 5 * length) for length in (2, 9, 4, 20, 7)]
    np.testing.assert_allclose(logits(runner, texts), np.concatenate([logits(runner, [t]) for t in texts]), atol=1e-5)


@pytest.mark.parametrize("mode", ["shared", "static"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_tf_32": "0"}, r"has no option use_tf_32; it has .*device_id.*use_tf32"),
        ({"device_id": "77"}, r"CUDAExecutionProvider with \{'device_id': '77'\} cannot open a graph that CPU"),
        ({"gpu_mem_limit": "1000"}, r"CUDAExecutionProvider with \{'gpu_mem_limit': '1000'\} cannot open a graph"),
    ],
)
def test_options_that_cannot_be_are_the_providers_fault_not_the_graphs(
    compiled: Artifact, mode: str, options: dict[str, str], message: str
) -> None:
    with pytest.raises(ProviderError, match=message):
        load(compiled, mode=mode, provider_options=options)
