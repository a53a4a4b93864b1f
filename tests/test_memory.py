"""What a ladder takes in memory, what is there, and that a ladder that cannot fit is refused before anything runs."""

from __future__ import annotations

import ctypes
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import fake_artifact, fake_engine
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_bucket
from hf_bucket import engines, preflight, settle
from hf_bucket import finish as finishing
from hf_bucket.artifact import GRAPH, WEIGHTS, Artifact, variant_name
from hf_bucket.cli import main
from hf_bucket.compile import CompileOptions, compile_model
from hf_bucket.errors import InputError, LadderError
from hf_bucket.ladder import Bucket, make_ladder
from hf_bucket.machine import available_bytes, trim_heap, usable_cores
from hf_bucket.manifest import FileRecord, Manifest
from hf_bucket.memory import ARENA, SESSION, Footprint, Mode, check_fits, footprint
from hf_bucket.runner import Runner, RunOptions
from hf_bucket.session import FakeSession, Session
from hf_bucket.session_ort import CPU, EngineOptions
from hf_bucket.source import Source

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

KB, MB = 1024, 1_000_000


# what a ladder takes


@pytest.fixture(scope="module")
def artifact(tiny_bert: Path) -> Artifact:
    options = CompileOptions(buckets=[8, 16, 64], batch_sizes=[1, 3])
    return compile_model(Source(name=str(tiny_bert)), options, report=lambda line: None)


def test_a_compiled_model_knows_the_memory_of_every_bucket(artifact: Artifact) -> None:
    memory = artifact.manifest.memory
    assert list(memory) == [bucket.name for bucket in artifact.manifest.ladder]
    for bucket in artifact.manifest.ladder:
        inputs, hidden = 3 * bucket.cells * 8, bucket.cells * 32 * 4
        assert memory[bucket.name] > inputs + 2 * hidden, "more than one layer's input and output"
    by_rows = [memory[f"b3_s{length}"] / memory[f"b1_s{length}"] for length in (8, 16, 64)]
    assert by_rows == pytest.approx([3, 3, 3], rel=0.1), "three rows compute in three times the memory of one"
    assert memory["b1_s64"] > 4 * memory["b1_s16"], "attention grows with the square"


def test_another_ladder_of_the_same_model_has_its_own_memory(artifact: Artifact, tiny_bert: Path) -> None:
    options = CompileOptions(buckets=[16, 32], batch_sizes=[1])
    other = compile_model(Source(name=str(tiny_bert)), options, report=lambda line: None)
    assert list(other.manifest.memory) == ["b1_s16", "b1_s32"]
    assert other.manifest.memory["b1_s16"] == artifact.manifest.memory["b1_s16"]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Two buckets of 1 and 10 MB, 100 MB of weights, variants of 1 and 2 kB and a graph of 5 kB."""
    made = fake_artifact(tmp_path_factory.mktemp("fake"), make_ladder([(1, 8), (4, 16)])).manifest
    sizes = {WEIGHTS: 100 * MB, GRAPH: 5000, "model_b1_s8.onnx": 1000, "model_b4_s16.onnx": 2000}
    files = {name: FileRecord(size=size, sha256="") for name, size in sizes.items()}
    return replace(made, files=files, memory={"b1_s8": MB, "b4_s16": 10 * MB})


@settings(deadline=None)
@given(at_once=st.integers(1, 64), sets=st.integers(1, 2), mode=st.sampled_from(["shared", "static"]))
def test_weights_count_once_activations_per_batch_at_once_and_graphs_per_session(
    manifest: Manifest, at_once: int, sets: int, mode: Mode
) -> None:
    found = footprint(manifest, mode=mode, at_once=at_once, sets=sets)
    graphs = sets * SESSION * (3000 if mode == "static" else 5000)
    assert found.total == pytest.approx(100 * MB + graphs + at_once * ARENA[mode] * 10 * MB)
    assert found.largest == "b4_s16"


def test_a_bucket_of_unknown_memory_is_left_out(manifest: Manifest) -> None:
    assert footprint(replace(manifest, memory={"b1_s8": MB})).largest == "b1_s8"
    found = footprint(replace(manifest, memory={}))
    assert (found.largest, found.total) == (None, 100 * MB + SESSION * 5000)


# whether it fits

NEEDED = Footprint(weights=90 * MB, sessions=2 * MB, activations={"b1_s8": MB, "b8_s64": 4 * MB}, at_once=2)


@pytest.mark.parametrize("available", [None, 100 * MB, 100 * MB + 1], ids=["unknown", "just enough", "more"])
def test_a_ladder_that_fits_passes(available: int | None) -> None:
    check_fits(NEEDED, available)


def test_a_ladder_that_lacks_a_byte_is_refused_with_the_numbers() -> None:
    numbers = (
        "the ladder needs 100.0 MB of memory: weights 90.0 MB, sessions 2.0 MB, and its largest bucket b8_s64 4.0 MB "
        "for each of 2 batches at once; 99.0 MB are there. Drop b8_s64, choose smaller batch_sizes or fewer workers"
    )
    with pytest.raises(LadderError, match=re.escape(numbers)):
        check_fits(NEEDED, 99 * MB)
    with pytest.raises(LadderError, match="the ladder needs 100"):
        check_fits(NEEDED, 100 * MB - 1)


def test_weights_alone_that_do_not_fit_are_refused() -> None:
    with pytest.raises(LadderError, match=r"needs 90\.0 MB of memory for its weights, 1\.0 MB are there"):
        check_fits(Footprint(weights=90 * MB, sessions=0, activations={}), MB)


def test_nothing_is_opened_for_a_ladder_that_does_not_fit(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    def opens(artifact: Artifact, options: EngineOptions) -> dict:
        pytest.fail("sessions were opened")

    monkeypatch.setattr(preflight, "available_bytes", lambda: 10_000)
    with pytest.raises(LadderError, match="largest bucket b3_s64"):
        Runner(artifact, engine=opens)
    with pytest.raises(LadderError, match="largest bucket b3_s64"):
        Runner(artifact, RunOptions(engine=EngineOptions(mode="auto"), measure_s=1.0), engine=opens)


def test_a_limit_of_the_users_takes_the_place_of_the_machines(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LadderError, match=r"0\.0 MB are there"):
        hf_bucket.load(artifact.folder, memory_bytes=1)
    with pytest.raises(LadderError, match=r"0\.0 MB are there"):
        hf_bucket.pipeline(model=artifact.folder, memory_bytes=1)
    with pytest.raises(LadderError, match=r"0\.0 MB are there"):
        hf_bucket.BucketedModelForSequenceClassification.from_pretrained(artifact.folder, memory_bytes=1)
    monkeypatch.setattr(preflight, "available_bytes", lambda: 1)
    assert len(hf_bucket.load(artifact.folder, memory_bytes=10**9)(["w1"])) == 1


def test_more_workers_need_more(artifact: Artifact) -> None:
    one = preflight.takes(artifact, EngineOptions(workers=1, threads=1))
    four = preflight.takes(artifact, EngineOptions(workers=4, threads=1))
    assert four.sessions == 2 * one.sessions, "those of many batches at once, and those of a few"
    assert four.total - four.sessions - (one.total - one.sessions) == 3 * one.activations["b3_s64"]


@pytest.mark.parametrize(
    ("providers", "copies"),
    [(("other", None), 2), (("other", CPU), 1), ((CPU, "other"), 1), ((CPU, None), 0)],
    ids=["one provider", "of one row", "of many batches", "the CPU's"],
)
def test_a_provider_other_than_the_cpus_packs_the_weights_for_every_use_that_it_has(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, providers: tuple[str, str | None], copies: int
) -> None:
    monkeypatch.setattr("hf_bucket.session_ort.installed_providers", lambda: [CPU, "other"])
    once = preflight.takes(artifact, EngineOptions(provider=CPU, workers=2))
    one, many = providers
    found = preflight.takes(artifact, EngineOptions(provider=one, provider_of_many=many, workers=2))
    assert (found.weights, found.sessions) == ((1 + copies) * once.weights, once.sessions)


def test_on_cuda_static_mode_takes_what_shared_mode_does(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """All buckets of one session have the weights once."""
    monkeypatch.setattr("hf_bucket.session_ort.installed_providers", lambda: ["CUDAExecutionProvider", "other"])
    modes = ("shared", "static")
    options = EngineOptions(provider="CUDAExecutionProvider")
    shared, static = (preflight.takes(artifact, replace(options, mode=mode)) for mode in modes)
    assert static == shared
    other = preflight.takes(artifact, EngineOptions(provider="other", mode="static"))
    assert other.weights == (len(artifact.manifest.ladder) + 1) / 2 * shared.weights


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "1 GB"])
def test_a_limit_that_is_none_is_refused(value: object) -> None:
    with pytest.raises(InputError, match="memory_bytes must be a number of bytes of at least 1"):
        RunOptions(memory_bytes=value)  # type: ignore[arg-type]


def test_compiling_stops_before_it_runs_a_bucket_that_cannot_fit(
    tiny_bert: Path, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finishing, "available_bytes", lambda: 10_000)
    monkeypatch.setattr(finishing, "check_buckets", lambda artifact: pytest.fail("a bucket was run"))
    with pytest.raises(LadderError, match=r"largest bucket b5_s33 .* Drop b5_s33"):
        compile_model(Source(name=str(tiny_bert)), CompileOptions(buckets=[(5, 33)]), report=lambda line: None)


def test_inspect_shows_memory_per_bucket_and_in_all(artifact: Artifact, capfd) -> None:
    assert main(["inspect", str(artifact.folder)]) == 0
    out = capfd.readouterr().out
    peak = artifact.manifest.memory["b3_s64"]
    assert re.search(rf"b3_s64 +{peak / 1e6:.2f} MB +{ARENA['shared'] * peak / 1e6:.2f} MB", out)
    assert re.search(r"shared: [\d.]+ MB = weights .* for a batch of b3_s64", out)
    assert main(["inspect", str(artifact.folder), "--json"]) == 0
    data = json.loads(capfd.readouterr().out)
    running, sizes = data["running"], artifact.manifest.files
    assert data["memory"] == dict(artifact.manifest.memory)
    assert running["weights"] == sizes[WEIGHTS].size
    modes: tuple[Mode, ...] = ("shared", "static")
    for mode in modes:
        batch = running[mode]["activations"]["b3_s64"]
        assert batch == round(ARENA[mode] * peak)
        expected = running["weights"] + running[mode]["sessions"] + running["at_once"] * batch
        assert running[mode]["total"] == expected
    variants = sum(sizes[variant_name(bucket)].size for bucket in artifact.manifest.ladder)
    assert running["static"]["sessions"] / running["shared"]["sessions"] == pytest.approx(variants / sizes[GRAPH].size)


# what is there


def system(root: Path, files: Mapping[str, object]) -> Path:
    """A file system that holds what a kernel would say."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n", encoding="utf-8")
    return root


MEMINFO = {"proc/meminfo": "MemTotal:       9000 kB\nMemFree:        10 kB\nMemAvailable:    5000 kB"}
SECOND = {**MEMINFO, "proc/self/cgroup": "0::/a/b"}
FIRST = {**MEMINFO, "proc/self/cgroup": "3:cpu,cpuacct:/x\n2:memory:/a\n0::/"}


@pytest.mark.parametrize(
    ("files", "kilobytes"),
    [
        pytest.param({}, None, id="nothing known"),
        pytest.param(MEMINFO, 5000, id="no cgroup"),
        pytest.param({"proc/meminfo": "MemFree: 10 kB"}, None, id="an old kernel"),
        pytest.param(SECOND | {"sys/fs/cgroup/a/b/memory.max": "max"}, 5000, id="no limit"),
        pytest.param(
            SECOND | {"sys/fs/cgroup/a/b/memory.max": 3000 * KB, "sys/fs/cgroup/a/b/memory.current": 1000 * KB},
            2000,
            id="its own cgroup",
        ),
        pytest.param(
            SECOND | {"sys/fs/cgroup/a/memory.max": 3000 * KB, "sys/fs/cgroup/a/memory.current": 1500 * KB},
            1500,
            id="a cgroup above",
        ),
        pytest.param(
            SECOND | {"sys/fs/cgroup/memory.max": 3000 * KB, "sys/fs/cgroup/memory.current": 2500 * KB},
            500,
            id="the root, as a container sees it",
        ),
        pytest.param(
            SECOND
            | {
                "sys/fs/cgroup/memory.max": 3000 * KB,
                "sys/fs/cgroup/memory.current": 2500 * KB,
                "sys/fs/cgroup/memory.stat": f"anon 7\ninactive_file {300 * KB}\nactive_file {200 * KB}\nfile 9",
            },
            1000,
            id="cached files can go",
        ),
        pytest.param(
            SECOND | {"sys/fs/cgroup/memory.max": 1000 * KB, "sys/fs/cgroup/memory.current": 2000 * KB},
            0,
            id="over its limit",
        ),
        pytest.param(
            SECOND | {"sys/fs/cgroup/memory.max": 9000 * KB, "sys/fs/cgroup/memory.current": 0}, 5000, id="the system's"
        ),
        pytest.param(
            FIRST
            | {
                "sys/fs/cgroup/memory/a/memory.limit_in_bytes": 800 * KB,
                "sys/fs/cgroup/memory/a/memory.usage_in_bytes": 100 * KB,
            },
            700,
            id="version 1",
        ),
        pytest.param(
            FIRST
            | {
                "sys/fs/cgroup/memory/memory.limit_in_bytes": 2**63 - 4096,
                "sys/fs/cgroup/memory/memory.usage_in_bytes": 100 * KB,
            },
            5000,
            id="version 1 without a limit",
        ),
        pytest.param(SECOND | {"sys/fs/cgroup/memory.max": 10}, 5000, id="half of the figures"),
    ],
)
def test_what_is_there_is_the_least_of_what_system_and_cgroups_leave(
    tmp_path: Path, files: Mapping[str, object], kilobytes: int | None
) -> None:
    expected = None if kilobytes is None else kilobytes * KB
    assert available_bytes(system(tmp_path, files)) == expected


QUOTA = "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_quota_us"
PERIOD = "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_period_us"


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        pytest.param({}, 8, id="nothing known"),
        pytest.param(SECOND, 8, id="no controller"),
        pytest.param(SECOND | {"sys/fs/cgroup/a/b/cpu.max": "max 100000"}, 8, id="no limit"),
        pytest.param(SECOND | {"sys/fs/cgroup/a/b/cpu.max": "50000 100000"}, 1, id="half a core"),
        pytest.param(SECOND | {"sys/fs/cgroup/a/b/cpu.max": "150000 100000"}, 2, id="a core and a half"),
        pytest.param(SECOND | {"sys/fs/cgroup/a/b/cpu.max": "1600000 100000"}, 8, id="more than there are"),
        pytest.param(SECOND | {"sys/fs/cgroup/a/cpu.max": "300000 100000"}, 3, id="a cgroup above"),
        pytest.param(SECOND | {"sys/fs/cgroup/cpu.max": "300000 100000"}, 3, id="the root, as a container sees it"),
        pytest.param(
            SECOND | {"sys/fs/cgroup/a/b/cpu.max": "400000 100000", "sys/fs/cgroup/a/cpu.max": "200000 100000"},
            2,
            id="the least of several",
        ),
        pytest.param(SECOND | {"sys/fs/cgroup/a/b/cpu.max": "many"}, 8, id="something else"),
        pytest.param(FIRST | {QUOTA: -1, PERIOD: 100000}, 8, id="version 1 without a limit"),
        pytest.param(FIRST | {QUOTA: 250000, PERIOD: 100000}, 3, id="version 1"),
        pytest.param(
            FIRST | {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": 50000, "sys/fs/cgroup/cpu/cpu.cfs_period_us": 100000},
            1,
            id="version 1 in a container, mounted under its own name",
        ),
        pytest.param(FIRST | {"sys/fs/cgroup/memory/a/cpu.max": "50000 100000"}, 8, id="another controller's folder"),
    ],
)
def test_cores_are_the_least_of_what_affinity_and_quotas_allow(
    tmp_path: Path, files: Mapping[str, object], cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert usable_cores(system(tmp_path, files)) == cores


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot pin a process to a core")
def test_a_process_that_is_pinned_to_one_core_uses_one() -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert usable_cores() == 1
        assert EngineOptions().for_many_batches().workers == 1
    finally:
        os.sched_setaffinity(0, before)


def test_this_system_has_some_memory_left_if_it_tells() -> None:
    found = available_bytes()
    assert found is None or found > 0
    assert (found is None) == (not Path("/proc/meminfo").exists())


def test_where_only_static_mode_fits_auto_is_that(artifact: Artifact) -> None:
    large = dict.fromkeys(artifact.manifest.memory, 50 * MB)
    artifact = replace(artifact, manifest=replace(artifact.manifest, memory=large))
    options = EngineOptions(workers=1)
    shared, static = (preflight.takes(artifact, replace(options, mode=mode)).total for mode in ("shared", "static"))
    assert static < shared, "graphs of fixed shapes compute in less"
    for available, mode in ((shared - 1, "static"), (shared, "shared"), (None, "shared")):
        trial = preflight.Trial(budget_s=0.0, available=available)
        assert settle.settle(artifact, replace(options, mode="auto"), trial).engine.mode == mode
    with pytest.raises(LadderError, match="the ladder needs"):
        settle.settle(artifact, replace(options, mode="auto"), preflight.Trial(budget_s=0.0, available=static - 1))


def _resident() -> int:
    """Return the bytes of memory that this process has of its own."""
    told = Path("/proc/self/smaps_rollup")
    found = re.search(r"^Pss_Anon: +([0-9]+) kB", told.read_text() if told.exists() else "", re.MULTILINE)
    if found is None:
        pytest.skip("this kernel does not tell the memory of a process")
    return int(found[1]) * KB


def test_freed_memory_between_pieces_in_use_goes_back_to_the_system() -> None:
    try:
        libc = ctypes.CDLL("libc.so.6")
        assert libc.malloc_trim
    except (OSError, AttributeError):
        pytest.skip("only glibc has malloc_trim")
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    pieces = [libc.malloc(16 * KB) for _ in range(4000)]
    for piece in pieces:
        ctypes.memset(piece, 1, 16 * KB)
    for number, piece in enumerate(pieces):
        if number % 10:
            libc.free(piece)
    before = _resident()
    trim_heap()
    assert before - _resident() > 30 * MB
    for piece in pieces[::10]:
        libc.free(piece)


def test_what_making_sessions_leaves_behind_goes_back_to_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trimmed: list[int] = []
    opened: list[str] = []

    def engine(artifact: Artifact, options: EngineOptions) -> Mapping[Bucket, Session]:
        opened.append(options.mode)
        return fake_engine(artifact, options)

    monkeypatch.setattr(engines, "trim_heap", lambda: trimmed.append(len(opened)))

    def dynamic(artifact: Artifact, options: EngineOptions, sessions: object) -> Callable[[Bucket], Session]:
        opened.append("dynamic")
        return FakeSession

    options = RunOptions(engine=EngineOptions(workers=2, provider=CPU), overflow="dynamic")
    ladder = make_ladder([8], batch_sizes=[1])
    runner = Runner(fake_artifact(tmp_path / "fake", ladder), options, engine=engine, dynamic=dynamic)
    runner(["w1"] * 3)
    assert trimmed == [1, 2], "after those of a few batches, and those of many"
    runner(["w1 " * 10])
    assert trimmed == [1, 2, 3], "and after the one of any shape"


def test_a_fake_engine_needs_no_graph_to_pass(tmp_path: Path) -> None:
    runner = Runner(fake_artifact(tmp_path / "fake", make_ladder([8], batch_sizes=[1])), engine=fake_engine)
    assert len(runner(["w1"])) == 1
