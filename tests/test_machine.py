"""What the cache keeps for one machine: made once, checked when used, and done without where there is no cache."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnxruntime
import pytest
from conftest import text_of

import hf_bucket
from hf_bucket import machine, session_ort
from hf_bucket.artifact import GRAPH, WEIGHTS, Artifact
from hf_bucket.cache import MACHINES, cache_root, clear
from hf_bucket.compile import CompileOptions, compile_model
from hf_bucket.errors import ArtifactError, BucketWarning, ProviderError
from hf_bucket.session_ort import EngineOptions, Mode, open_sessions, packed_graph, resolve_provider
from hf_bucket.source import Source

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

TEXTS = [text_of(length) for length in (1, 5, 6, 13, 14, 3, 2)]


@pytest.fixture(scope="module")
def artifact(tiny_bert: Path) -> Artifact:
    options = CompileOptions(buckets=[8, 16], batch_sizes=[1, 3])
    return compile_model(Source(name=str(tiny_bert)), options, report=lambda line: None)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_BUCKET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def logits(artifact: Artifact, **options: object) -> np.ndarray:
    runner = hf_bucket.load(artifact.folder, **options)  # type: ignore[arg-type]
    found = np.stack([row["logits"] for row in runner(TEXTS)])
    runner.close()
    return found


@pytest.fixture
def plain(artifact: Artifact) -> np.ndarray:
    """What the artifact's own graph answers, a text at a time, without anything of ours around it."""
    engine = onnxruntime.InferenceSession(str(artifact.path(GRAPH)))
    encoder = hf_bucket.load(artifact.folder, warmup=False).encoder
    names = [value.name for value in engine.get_inputs()]
    columns = encoder(TEXTS).columns
    rows = [{name: np.array([columns[name][row]], dtype=np.int64) for name in names} for row in range(len(TEXTS))]
    return np.stack([engine.run(["logits"], row)[0][0] for row in rows])


@pytest.mark.parametrize("mode", ["shared", "static"])
@pytest.mark.parametrize("workers", [1, 2])
def test_packed_weights_give_the_graphs_own_answer(
    artifact: Artifact, plain: np.ndarray, own_cache: Path, mode: str, workers: int
) -> None:
    assert np.abs(logits(artifact, mode=mode, workers=workers) - plain).max() < 1e-5
    assert [path.name for path in own_cache.rglob(WEIGHTS)] == [WEIGHTS]


def test_weights_are_packed_once_and_every_session_maps_the_same_file(
    artifact: Artifact, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = packed_graph(artifact, EngineOptions())
    monkeypatch.setattr(machine, "write_folder", lambda *arguments: pytest.fail("packed again"))
    assert packed_graph(artifact, EngineOptions(mode="static", threads=1)) == first
    assert first is not None
    runner = hf_bucket.load(artifact.folder, mode="static", workers=2)
    runner(TEXTS)
    mapped = Path("/proc/self/maps")
    if mapped.exists():
        assert str(first.with_name(WEIGHTS)) in mapped.read_text(encoding="utf-8")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone", "no record", "record of nonsense"])
def test_a_packed_file_that_was_damaged_is_made_again(
    artifact: Artifact, plain: np.ndarray, own_cache: Path, damage: str
) -> None:
    path = packed_graph(artifact, EngineOptions())
    assert path is not None
    weights, record = path.with_name(WEIGHTS), path.with_name("files.json")
    content = weights.read_bytes()
    if damage == "truncated":
        weights.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        weights.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    elif damage == "gone":
        weights.unlink()
    elif damage == "no record":
        record.unlink()
    else:
        record.write_text(json.dumps({GRAPH: "nonsense"}), encoding="utf-8")
    assert np.abs(logits(artifact) - plain).max() < 1e-5
    assert weights.read_bytes() == content


def test_another_processor_or_onnxruntime_packs_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {machine.machine_key()}
    for change in (
        lambda: monkeypatch.setattr(machine, "_cpuinfo", lambda: {"model name": "Z80", "flags": "fpu"}),
        lambda: monkeypatch.setattr(machine, "_cpuinfo", lambda: {"model name": "Z80", "flags": "fpu avx"}),
        lambda: monkeypatch.setattr("onnxruntime.__version__", "9.9.9"),
    ):
        change()
        machine.machine_key.cache_clear()
        keys.add(machine.machine_key())
    monkeypatch.undo()
    machine.machine_key.cache_clear()
    assert len(keys) == 4


@pytest.fixture
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in the way of the cache, and a folder for what is temporary."""
    (tmp_path / "cache").write_text("in the way", encoding="utf-8")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("HF_BUCKET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(machine, "_here", {})
    return tmp_path / "temporary"


def test_without_a_cache_the_answer_is_the_same_and_one_warning_says_so(
    artifact: Artifact, plain: np.ndarray, no_cache: Path
) -> None:
    with pytest.warns(BucketWarning, match=r"cannot be written .*packing weights"):
        found = logits(artifact, mode="static", workers=2)
    assert np.abs(found - plain).max() < 1e-5
    assert np.abs(logits(artifact) - plain).max() < 1e-5  # without another warning: those are errors here
    assert len(list(no_cache.rglob(WEIGHTS))) == 1, "one copy for all sessions of the process"


def test_where_nothing_can_be_written_the_answer_is_the_same_and_warnings_say_what_it_costs(
    artifact: Artifact, plain: np.ndarray, no_cache: Path
) -> None:
    no_cache.rmdir()
    with pytest.warns(BucketWarning) as caught:
        found = logits(artifact, mode="static", workers=2)
    assert np.abs(found - plain).max() < 1e-5
    told = [str(warning.message) for warning in caught]
    assert len(told) == 2
    assert "no temporary folder can hold them either" in told[1]
    assert "every session packs weights of its own" in told[1]


def test_where_there_is_no_temporary_folder_at_all_the_answer_is_the_same(
    artifact: Artifact, plain: np.ndarray, no_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> str:
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("tempfile._get_default_tempdir", none)
    with pytest.warns(BucketWarning) as caught:
        assert np.abs(logits(artifact) - plain).max() < 1e-5
    assert "no temporary folder can hold them either" in str(caught[-1].message)


def test_a_disk_that_fills_up_while_weights_are_packed_is_no_fault_of_the_graph(
    artifact: Artifact, plain: np.ndarray, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime tells of it as of any graph that cannot be loaded."""
    start, packed = session_ort._start, []

    def full(path: Path, settings: Any, arguments: Any) -> Any:
        if settings.optimized_model_filepath:
            packed.append(path)
            raise ArtifactError("no space left")
        return start(path, settings, arguments)

    monkeypatch.setattr(session_ort, "_start", full)
    monkeypatch.setattr(machine, "_here", {})
    with pytest.warns(BucketWarning) as caught:
        assert np.abs(logits(artifact, mode="static", measure_s=0.0) - plain).max() < 1e-5
    assert [str(warning.message).partition(" (")[0] for warning in caught] == [
        f"the cache {own_cache} cannot be written",
        "no temporary folder can hold them either",
    ]
    assert len(packed) == 2, "in the cache once, and once in a temporary folder"


def test_two_that_measure_take_turns_and_the_second_finds_what_the_first_did(tmp_path: Path) -> None:
    path, inside, most, found = tmp_path / "cache" / "costs.json", [], [], []

    def measure() -> dict[str, float]:
        inside.append(1)
        most.append(sum(inside))
        time.sleep(0.1)
        machine.write_figures(path, {"seconds": 1.0})
        inside.pop()
        return {"seconds": 1.0}

    def measured() -> None:
        found.append(machine.measured_once(path, lambda: machine.read_figures(path) or None, measure, again=False))

    threads = [threading.Thread(target=measured) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, found) == ([1], [{"seconds": 1.0}] * 4)
    machine.measured_once(path, lambda: machine.read_figures(path) or None, measure, again=True)
    assert most == [1, 1], "again measures whatever is kept"


def test_nobody_waits_for_ever_for_another_that_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_PATIENCE_S", 0.05)

    def wait() -> None:
        waiting = threading.Thread(target=second, daemon=True)
        waiting.start()
        waiting.join(30)
        assert not waiting.is_alive()

    def measured(path: Path, measure: Callable[[], None]) -> None:
        machine.measured_once(path, lambda: None, measure, again=False)

    def second() -> None:
        modes = tmp_path / "modes.json"
        measured(modes, lambda: machine.write_figures(modes, {"seconds": 2.0}))

    measured(tmp_path / "costs.json", wait)
    assert machine.read_figures(tmp_path / "modes.json") == {"seconds": 2.0}


def test_many_threads_that_write_figures_leave_whole_ones(tmp_path: Path) -> None:
    def write(number: int) -> None:
        for _ in range(20):
            machine.write_figures(tmp_path / "costs.json", {"seconds": number})

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert machine.read_figures(tmp_path / "costs.json")["seconds"] in range(8)
    assert [path.name for path in tmp_path.iterdir()] == ["costs.json"]


def test_clearing_the_cache_takes_what_was_made_for_this_machine(artifact: Artifact, own_cache: Path) -> None:
    packed_graph(artifact, EngineOptions())
    assert (cache_root() / MACHINES).is_dir()
    clear()
    assert not (cache_root() / MACHINES).exists()


PACKING = """
import sys, hf_bucket
print("ready", flush=True)
sys.stdin.readline()
print(hf_bucket.load(sys.argv[1])(["w1 w2"])[0]["logits"].tolist())
"""


def test_two_processes_that_pack_at_once_agree(artifact: Artifact, own_cache: Path) -> None:
    pipe = subprocess.PIPE
    children = [
        subprocess.Popen([sys.executable, "-c", PACKING, str(artifact.folder)], stdin=pipe, stdout=pipe, text=True)
        for _ in range(2)
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    answers = [child.communicate("go\n", timeout=120)[0] for child in children]
    assert answers[0] == answers[1] != ""
    assert len(list(own_cache.rglob(WEIGHTS))) == 1


FORKING = """
import os, sys, time, hf_bucket
options = {"workers": 2, "threads": 2, "provider": "CPUExecutionProvider"}
runners = [hf_bucket.load(sys.argv[1], mode=mode, **options) for mode in ("shared", "static")]
texts = ["w1", "w2 w3", "w4 " * 12]
expected = [[row["logits"].tolist() for row in runner(texts)] for runner in runners]
time.sleep(0.3)  # until the engines' threads have gone to sleep: one that still spins lets itself be joined
for way in ("ask", "close", "drop", "ask"):
    child = os.fork()
    if child == 0:
        if way == "ask":
            assert [[row["logits"].tolist() for row in runner(texts)] for runner in runners] == expected
        if way == "close":
            for runner in runners:
                runner.close()
        del runners[:]
        os._exit(0)  # as multiprocessing ends its children; onnxruntime's own destructors hang after a fork
    print(way, os.waitpid(child, 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.parametrize("mode", ["shared", "static"])
def test_threads_that_wait_leave_the_cores_to_others(artifact: Artifact, mode: Mode) -> None:
    sessions = open_sessions(artifact, EngineOptions(mode=mode, threads=4))
    bucket, session = next(iter(sessions.items()))
    arrays = {
        name: np.ones((bucket.batch_size, *bucket.extent), np.int64) for name in artifact.manifest.signature.input_names
    }
    session.run(arrays)
    before = time.process_time()
    time.sleep(0.1)
    assert time.process_time() - before < 0.01, "seconds of processor that three idle threads took"


def test_a_child_lets_go_of_inherited_sessions_without_waiting_for_their_threads(artifact: Artifact) -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORKING, str(artifact.folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split("\n")[:-1] == ["ask 0", "close 0", "drop 0", "ask 0"]


# providers


def test_a_provider_that_is_a_plugin_is_registered_and_gets_its_devices(
    artifact: Artifact, plain: np.ndarray, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """onnxruntime's own CPU devices stand in for a plugin's: the calls are the same."""
    (tmp_path / "some_plugin.py").write_text("def get_library_path(): return 'here'", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(session_ort, "PLUGINS", {"CPUExecutionProvider": "some_plugin"})
    registered: list[tuple[str, str]] = []
    monkeypatch.setattr(session_ort, "_registered", {session_ort.CPU} - {session_ort.CPU})
    monkeypatch.setattr(session_ort, "_share_arena", lambda: None)
    monkeypatch.setattr(
        onnxruntime, "register_execution_provider_library", lambda *arguments: registered.append(arguments)
    )
    for _ in range(2):
        engine = session_ort.open_graph(artifact.path(GRAPH), EngineOptions(provider="CPUExecutionProvider"))
    assert registered == [("CPUExecutionProvider", "here")]
    assert engine.get_providers() == ["CPUExecutionProvider"]


class WithGpu:
    """onnxruntime's ``InferenceSession`` where there is one GPU; it remembers what it was opened with."""

    KNOWN: ClassVar = {"device_id": "0", "tunable_op_enable": "0", "use_tf32": "1", "enable_cuda_graph": "0"}
    opened: ClassVar[list[tuple[str, dict[str, str]]]] = []
    partly = False  # whether a part of every graph stays on the CPU

    def __init__(self, path: str, settings: object, *, providers: list[Any], **arguments: object) -> None:
        ((name, given),) = (entry if isinstance(entry, tuple) else (entry, {}) for entry in providers)
        if "broken" in path or (name == session_ort.CUDA and "too_large" in path):
            raise RuntimeError("broken graph, or a large one")
        if given.get("enable_cuda_graph") and self.partly:
            raise RuntimeError("This session cannot use the graph capture feature: not all nodes are on CUDA")
        if set(given) - set(self.KNOWN) or given.get("device_id", "0") != "0":
            raise RuntimeError("unknown provider option, or no such device")
        self.name, self._sess = name, object()
        self.opened.append((name, given))

    def get_provider_options(self) -> dict[str, dict[str, str]]:
        return {self.name: self.KNOWN}

    def get_providers(self) -> list[str]:
        return [self.name]


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> type[WithGpu]:
    monkeypatch.setattr(session_ort, "installed_providers", lambda: [session_ort.CUDA, "CPUExecutionProvider"])
    monkeypatch.setattr(session_ort, "_cuda_was_used", False)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", WithGpu)
    monkeypatch.setattr(WithGpu, "opened", [])
    return WithGpu


def test_what_a_provider_cannot_do_is_not_put_down_to_the_graph(artifact: Artifact, with_gpu: type[WithGpu]) -> None:
    def opened(path: Path, **options: str) -> Any:
        return session_ort.open_graph(path, EngineOptions(provider=session_ort.CUDA, provider_options=options))

    with pytest.raises(ProviderError, match=r"has no option device; it has device_id, tunable_op_enable, use_tf32$"):
        opened(artifact.path(GRAPH), device="0", device_id="0")
    with pytest.raises(ProviderError, match=r"with \{'device_id': '9'\} cannot open a graph that CPU.* no such device"):
        opened(artifact.path(GRAPH), device_id="9")
    with pytest.raises(ProviderError, match=r"CUDAExecutionProvider cannot open a graph that CPU.*or a large one"):
        opened(Path("too_large.onnx"))
    with pytest.raises(ArtifactError, match=r"cannot be loaded by onnxruntime: .*broken graph"):
        opened(Path("broken.onnx"), device="0")
    assert isinstance(opened(artifact.path(GRAPH), device_id="0").session, WithGpu)
    with pytest.raises(ProviderError, match=r"CUDA runs one batch after another; leave workers out, which was 2"):
        EngineOptions(provider=session_ort.CUDA, workers=2)
    with pytest.raises(ProviderError, match=r"device_id must be the number of a GPU, got 'first'"):
        EngineOptions(provider=session_ort.CUDA, provider_options={"device_id": "first"})


def test_cuda_computes_in_float32_and_records_its_runs_in_static_mode_only(
    artifact: Artifact, with_gpu: type[WithGpu]
) -> None:
    shared = EngineOptions(provider=session_ort.CUDA, provider_options={"device_id": "0"})
    session_ort.open_sessions(artifact, shared)
    sessions = session_ort.open_sessions(artifact, replace(shared, mode="static"))
    assert len(sessions) == len(artifact.manifest.ladder) > 1
    session_ort.open_sessions(artifact, replace(shared, provider_options={"use_tf32": "1"}))
    plain = {"use_tf32": "0", "device_id": "0"}
    assert [given for _, given in with_gpu.opened] == [
        plain,
        {**plain, "enable_cuda_graph": "1"},  # one session for every bucket
        {"use_tf32": "1"},
    ]
    with pytest.raises(ProviderError, match=r'enable_cuda_graph is what mode="static" does on CUDA; leave the option'):
        replace(shared, provider_options={"enable_cuda_graph": "1"})


def test_what_was_measured_on_one_gpu_is_not_used_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, name in enumerate(("NVIDIA B100", "NVIDIA A10")):
        (tmp_path / "gpus" / f"0000:0{number}").mkdir(parents=True)
        information = tmp_path / "gpus" / f"0000:0{number}" / "information"
        information.write_text(f"Model: \t\t {name}\nIRQ:   \t\t 50\n", encoding="utf-8")
    assert machine._gpus(tmp_path) == ["NVIDIA B100", "NVIDIA A10"]
    assert machine._gpus(tmp_path / "none") == []
    keys = []
    for gpus in ([], ["NVIDIA B100"]):
        monkeypatch.setattr(machine, "_gpus", lambda driver, gpus=gpus: gpus)
        keys.append(machine.machine_key.__wrapped__())
    assert keys[0] != keys[1]


def test_a_model_that_cuda_cannot_record_is_refused_in_static_mode_with_the_reason(
    artifact: Artifact, with_gpu: type[WithGpu], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = EngineOptions(provider=session_ort.CUDA, mode="static")

    def refused(why: str) -> None:
        with pytest.raises(ProviderError, match=rf'^in static mode, as CUDA graphs, {why}; use mode="shared"$'):
            open_sessions(artifact, options)

    with monkeypatch.context() as patch:
        patch.setattr(with_gpu, "partly", True)
        refused("CUDAExecutionProvider cannot run this model, part of which stays on the CPU")
    with monkeypatch.context() as patch:
        patch.setattr(session_ort, "_ONNXRUNTIME", (1, 30))
        patch.setattr(onnxruntime, "__version__", "1.30.2")
        refused("CUDAExecutionProvider needs onnxruntime 1.31, here is 1.30.2")
    assert open_sessions(artifact, options)
    monkeypatch.setattr(session_ort, "_NOT_RECORDED", {b'"\x06MatMul': "MatMul"})  # as it lies in this graph
    refused("CUDAExecutionProvider cannot run this model, which has the operator MatMul")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("used", [True, False])
def test_after_a_fork_cuda_is_refused_if_the_parent_used_it(
    artifact: Artifact, with_gpu: type[WithGpu], used: bool
) -> None:
    options = EngineOptions(provider=session_ort.CUDA)
    if used:
        session_ort.open_graph(artifact.path(GRAPH), options)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            session_ort.open_graph(artifact.path(GRAPH), options)
            os.write(write, b"opened")
        except ProviderError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    late = threading.Timer(60.0, os.kill, (child, signal.SIGKILL))
    late.start()
    os.waitpid(child, 0)
    late.cancel()
    os.close(write)
    with os.fdopen(read) as said:
        expected = "CUDA was used before this process was forked" if used else "opened"
        assert said.read().startswith(expected)
    if used:
        session_ort.open_graph(artifact.path(GRAPH), options)  # the parent goes on


@pytest.mark.parametrize("provider", ["auto", "CPUExecutionProvider"])
def test_options_that_no_provider_would_read_are_refused_with_the_list_of_providers(provider: str) -> None:
    with pytest.raises(ProviderError, match=rf"'{provider}' takes no provider_options, got a, b; name .* one of .*CPU"):
        EngineOptions(provider=provider, provider_options={"b": "1", "a": "2"})


def test_a_plugin_without_a_device_says_whom_it_found(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "other_plugin.py").write_text("def get_library_path(): return 'here'", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(session_ort, "PLUGINS", {"OpenVINOExecutionProvider": "other_plugin"})
    monkeypatch.setattr(session_ort, "_registered", {session_ort.CPU})
    monkeypatch.setattr(onnxruntime, "register_execution_provider_library", lambda *arguments: None)
    with pytest.raises(ProviderError, match=r"finds nothing to run on among \[.*\]: .* Intel processors only"):
        session_ort.open_graph(artifact.path(GRAPH), EngineOptions(provider="OpenVINOExecutionProvider"))


def test_a_plugin_that_is_not_installed_is_named_with_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_ort, "PLUGINS", {"OpenVINOExecutionProvider": "no_such_package"})
    with pytest.raises(ProviderError, match=r"pip install hf-bucket\[openvino\].* use \"auto\" or one of .*CPU"):
        resolve_provider("OpenVINOExecutionProvider")


def test_weights_that_the_manifest_does_not_list_are_refused(artifact: Artifact, tmp_path: Path) -> None:
    shutil.copytree(artifact.folder, tmp_path / "copy")
    manifest = tmp_path / "copy" / "bucket_config.json"
    data = json.loads(manifest.read_text(encoding="utf-8"))
    del data["sha256"], data["files"][WEIGHTS]
    manifest.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"does not list model\.onnx\.data, which model.*takes its weights from"):
        hf_bucket.load(tmp_path / "copy")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"labels": ["a"]}, "names 1 labels, its graph returns 2 logits", id="a label too few"),
        pytest.param({"labels": []}, "no labels", id="no labels"),
        pytest.param({"max_length": 10}, "max_length 10 and a bucket of 16 tokens", id="a maximum under a bucket"),
        pytest.param({"max_length": -1}, "max_length -1", id="a negative maximum"),
        pytest.param({"vocab_size": 2}, "vocab_size 2 and pad_id 3 of input_ids", id="padding outside the vocabulary"),
        pytest.param({"dtype": "float32"}, "input input_ids of float32, expected int64", id="fractions as tokens"),
        pytest.param({"name": "bla"}, "an input 'bla', expected one of", id="an input nobody knows"),
    ],
)
def test_a_manifest_whose_values_cannot_be_is_refused(
    artifact: Artifact, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    shutil.copytree(artifact.folder, tmp_path / "copy")
    manifest = tmp_path / "copy" / "bucket_config.json"
    data = json.loads(manifest.read_text(encoding="utf-8"))
    del data["sha256"]
    holder = data["signature"]["inputs"][0] if change.keys() <= {"dtype", "name"} else data
    manifest.write_text(json.dumps(data | change if holder is data else data), encoding="utf-8")
    if holder is not data:
        holder.update(change)
        manifest.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ArtifactError, match=message):
        hf_bucket.load(tmp_path / "copy")(["w1"])
