"""The damage is done, and what is left is looked at: never a wrong answer, never a lost artifact, never a hang."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import ROOT, fake_artifact, fake_engine, text_of
from onnx import external_data_helper, helper

import hf_bucket
from hf_bucket import artifact as room
from hf_bucket.artifact import GRAPH, WEIGHTS, Artifact, copy_artifact, open_artifact, record_files, write_folder
from hf_bucket.cache import any_ladder, clear, entries, in_cache
from hf_bucket.compile import CompileOptions, compile_model
from hf_bucket.errors import ArtifactError
from hf_bucket.ladder import make_ladder
from hf_bucket.manifest import MANIFEST, SCHEMA_VERSION, Manifest
from hf_bucket.runner import Runner
from hf_bucket.source import Source
from hf_bucket.weights import external_names

# libraries that exporting needs announce their own deprecations
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

KILLS = 200
TEXTS = [text_of(n, start=n) for n in (0, 3, 5, 9, 13)]
NEVER_S = 60.0


def silent(line: str) -> None:
    """Take a progress line."""


@contextlib.contextmanager
def no_hang(limit_s: float = NEVER_S) -> Iterator[None]:
    """Fail what still waits after ``limit_s``."""

    def late(*_: object) -> None:
        pytest.fail(f"still waiting after {limit_s} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def python(code: str, *arguments: object, **environment: str) -> str:
    """Return what a Python process of its own prints; it finds conftest and this package."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=4 * NEVER_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def artifact(tiny_bert: Path) -> Artifact:
    """A real one, small."""
    options = CompileOptions(buckets=[8, 16], batch_sizes=[1, 2])
    return compile_model(Source(name=str(tiny_bert)), options, report=silent)


@pytest.fixture(scope="module")
def answers(artifact: Artifact) -> np.ndarray:
    return logits(artifact.folder)


@pytest.fixture
def copied(artifact: Artifact, tmp_path: Path) -> Path:
    """A folder to damage."""
    return copy_artifact(artifact, tmp_path / "copied").folder


def logits(folder: Path, **options: str) -> np.ndarray:
    return np.stack([row["logits"] for row in hf_bucket.load(folder, **options)(TEXTS)])  # type: ignore[arg-type]


def rewrite_manifest(folder: Path, change: Callable[[dict], object] = lambda data: None) -> None:
    """Change a manifest as somebody who knows the format would: sizes and checksums are those of the files."""
    data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    records = record_files(folder)
    data["files"] = {name: {"size": r.size, "sha256": r.sha256} for name, r in records.items() if name in data["files"]}
    data.pop("sha256", None)
    change(data)
    (folder / MANIFEST).write_text(json.dumps(data), encoding="utf-8")


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.is_dir()]


def age(paths: list[Path]) -> None:
    """Make folders look as if nobody had touched them for two hours."""
    for path in paths:
        os.utime(path, (time.time() - 7200,) * 2)


# kill -9
#
# A process of one thread forks the writers: each saves in a loop until it is killed at a random moment.

NURSERY = """
import json, os, random, shutil, signal, sys, time, warnings
from pathlib import Path
from conftest import fake_artifact
from hf_bucket.artifact import copy_artifact, open_artifact
from hf_bucket.cache import any_ladder, entries, in_cache
from hf_bucket.ladder import make_ladder

root, kills, chance = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))

def killed(work, longest_s):
    begun, begin = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(begin, b"!")
        while True:
            work()
    os.read(begun, 1)
    time.sleep(chance.uniform(0, longest_s))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(begun)
    os.close(begin)

def hidden(folder):
    return {path for path in folder.rglob(".*") if path.is_dir()}

def age(paths):
    for path in paths:
        os.utime(path, (0, 0))
"""

SAVING = (
    NURSERY
    + """
old = fake_artifact(root / "sources" / "old", make_ladder([8]))
new = fake_artifact(root / "sources" / "new", make_ladder([8, 16]))
target = root / "saved" / "model"

def save():
    copy_artifact(new, target)
    copy_artifact(old, target)

start = time.perf_counter()
copy_artifact(old, target)
save()
longest_s = time.perf_counter() - start
amid, missing, seen = 0, 0, set()
for number in range(kills):
    nothing_yet = number % 4 == 3
    if nothing_yet:
        shutil.rmtree(target)
    else:
        (target / "mine.txt").write_text("mine")
    killed(save, longest_s)
    left = hidden(target.parent)
    amid += bool(left - seen)
    seen |= left
    age(left)
    if nothing_yet and not target.exists():
        missing += 1
        copy_artifact(old, target)
        continue
    assert open_artifact(target).manifest in (old.manifest, new.manifest), number
    assert nothing_yet or (target / "mine.txt").read_text() == "mine", number
copy_artifact(new, target)
assert open_artifact(target).manifest == new.manifest
print(json.dumps({"kills": kills, "amid a save": amid, "none yet": missing, "left": len(hidden(target.parent))}))
"""
)

FILLING = (
    NURSERY
    + """
warnings.simplefilter("error")
ladders = [make_ladder([8 * n for n in range(1, size + 1)]) for size in range(1, 6)]

def fill_with(ladder):
    return lambda folder: fake_artifact(folder, ladder) and None

def compile_all():
    for ladder in ladders:
        in_cache(key, ladder, fill_with(ladder))
    time.sleep(60)  # all done: wait to be killed

amid = done = 0
seen = set()
for number in range(kills):
    key = f"{number:032x}"
    if number == 0:
        start = time.perf_counter()
        for ladder in ladders:
            in_cache("f" * 32, ladder, fill_with(ladder))
        longest_s = time.perf_counter() - start
    killed(compile_all, longest_s)
    left = hidden(root)
    amid += bool(left - seen)
    seen |= left
    age(left)
    whole = sorted((root / key).glob("[!.]*/bucket_config.json"))
    done += len(whole)
    found = any_ladder(key)
    assert (found is not None) == bool(whole), number
    for ladder in ladders[:2]:
        assert in_cache(key, ladder, fill_with(ladder)).manifest.ladder == ladder, number
assert [entry.problem for entry in entries() if entry.problem] == []
print(json.dumps({"kills": kills, "amid a fill": amid, "filled": done, "left": len(hidden(root))}))
"""
)


def test_a_killed_save_leaves_the_old_artifact_or_the_new_one_and_a_later_save_tidies_up(tmp_path: Path) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    figures = json.loads(python(SAVING, tmp_path, KILLS, seed))
    print(figures)
    assert figures["amid a save"] > KILLS / 10, "hardly a kill came while something was being written"
    assert figures["left"] == 0


def test_a_killed_compilation_leaves_whole_entries_no_lock_and_a_later_one_tidies_up(tmp_path: Path) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    cache = tmp_path / "cache"
    cache.mkdir()
    figures = json.loads(python(FILLING, cache, KILLS, seed, HF_BUCKET_CACHE=str(cache)))
    print(figures)
    assert figures["amid a fill"] > KILLS / 10, "hardly a kill came while something was being written"
    assert figures["filled"] > KILLS / 10
    assert figures["left"] == 0


BETWEEN_TWO_RENAMES = """
import os, signal, sys
from pathlib import Path
from hf_bucket import artifact as room
room._exchange = lambda first, second: False
rename = Path.rename

def rename_and_die(self, target):
    rename(self, target)
    os.kill(os.getpid(), signal.SIGKILL)

Path.rename = rename_and_die
if os.fork() == 0:
    room.copy_artifact(room.open_artifact(sys.argv[1]), Path(sys.argv[2]))
os.wait()
"""


@pytest.mark.parametrize("who", ["a reader", "a writer"])
def test_where_two_names_cannot_be_exchanged_an_artifact_moved_away_is_moved_back(
    tmp_path: Path, who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = fake_artifact(tmp_path / "in" / "model", make_ladder([8]))
    new = fake_artifact(tmp_path / "new", make_ladder([16]))
    (old.folder / "mine.txt").write_text("mine", encoding="utf-8")
    python(BETWEEN_TWO_RENAMES, new.folder, old.folder)
    assert not old.folder.exists(), "the kill came at the wrong moment"
    if who == "a reader":
        assert open_artifact(old.folder).manifest == old.manifest
    else:
        monkeypatch.setattr(room, "_exchange", lambda first, second: False)
        assert copy_artifact(new, old.folder).manifest == new.manifest
    assert (old.folder / "mine.txt").read_text(encoding="utf-8") == "mine"
    age(leftovers(tmp_path))
    copy_artifact(new, old.folder)
    assert leftovers(tmp_path) == []


# what killed writers leave


@pytest.mark.parametrize("old", [True, False], ids=["old", "fresh"])
@pytest.mark.parametrize("alive", [True, False], ids=["writer lives", "writer is dead"])
def test_only_what_is_old_and_nobodys_is_removed(tmp_path: Path, old: bool, alive: bool) -> None:
    target = tmp_path / "model"
    with room._folder_aside(target) as running:
        (running / GRAPH).write_bytes(b"half")
        left = running
        if not alive:
            left = tmp_path / f".model-{'0' * 16}"
            shutil.copytree(running, left)
        if old:
            age([left])
        write_folder(target, lambda folder: None)
        assert left.exists() == (alive or not old)
        assert running.exists()
    assert not running.exists()


@pytest.mark.parametrize(
    "name",
    [".model", ".model-0123", ".other-0123456789abcdef", "model-0123456789abcdef", ".model-0123456789abcdeF", ".git"],
)
def test_what_is_not_named_like_a_leftover_of_this_target_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    age([tmp_path / name])
    write_folder(tmp_path / "model", lambda folder: None)
    assert (tmp_path / name).exists()


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_BUCKET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


LADDER = make_ladder([8])


def fill(folder: Path) -> None:
    fake_artifact(folder, LADDER)


def test_a_compilation_that_still_runs_is_no_entry_of_the_cache(own_cache: Path) -> None:
    """Its manifest is there before its name is; whoever linked its files then would lose them."""
    model = own_cache / ("0" * 32)
    model.mkdir(parents=True)
    with room._folder_aside(model / "ladder") as aside:
        fill(aside)
        assert any_ladder(model.name) is None
        assert entries() == []


def test_clearing_the_cache_takes_what_killed_compilations_left_and_nothing_else(own_cache: Path) -> None:
    in_cache("a" * 32, LADDER, fill)
    fake_artifact(own_cache / ("b" * 64) / f".ladder-{'0' * 16}", LADDER)
    (own_cache / "notes").mkdir()
    assert clear() == 1
    assert [path.name for path in own_cache.iterdir()] == ["notes"]


@pytest.mark.parametrize("content", ["", "12345\n"], ids=["empty", "of a dead process"])
def test_a_lock_file_without_its_process_keeps_nobody_out(own_cache: Path, content: str) -> None:
    name = in_cache("a" * 32, LADDER, fill).folder.name
    shutil.rmtree(own_cache / ("a" * 32) / name)
    (own_cache / ("a" * 32) / "writing.lock").write_text(content, encoding="utf-8")
    with no_hang():
        assert in_cache("a" * 32, LADDER, fill).manifest.ladder == LADDER


def test_a_forked_child_that_exits_takes_no_folder_of_its_parent_along(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way", encoding="utf-8")
    code = (
        "import os, sys, warnings; warnings.simplefilter('ignore')\n"
        "from hf_bucket.cache import in_cache; from hf_bucket.ladder import make_ladder\n"
        "from hf_bucket import cache\n"
        "cache.open_artifact = lambda folder: folder\n"
        "made = in_cache('a' * 32, make_ladder([8]), lambda folder: (folder / 'x').touch())\n"
        "if os.fork() == 0: sys.exit()\n"
        "os.wait()\n"
        "print(made.is_dir(), made)"
    )
    there, made = python(code, HF_BUCKET_CACHE=str(tmp_path / "cache")).split()
    assert there == "True"
    assert not Path(made).exists(), "it lasts as long as its process"


# several writers


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_writers_of_one_target_without_a_lock_never_disturb_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(room, "_exchange", lambda first, second: False)
    monkeypatch.setattr(room, "_sync_one", lambda path: None)
    sources = [fake_artifact(tmp_path / "sources" / str(n), make_ladder([n])) for n in range(8, 16)]
    for number in range(25):
        target, together = tmp_path / "saved" / str(number), threading.Barrier(len(sources))

        def save(source: Artifact, target: Path = target, together: threading.Barrier = together) -> None:
            together.wait()
            copy_artifact(source, target)

        with ThreadPoolExecutor(len(sources)) as pool:
            list(pool.map(save, sources))
        assert open_artifact(target).manifest in [source.manifest for source in sources]
    assert len(list((tmp_path / "saved").iterdir())) == 25


COMPILING = """
import sys
from hf_bucket.compile import CompileOptions, compile_model
from hf_bucket.source import Source
import hf_bucket
lines = []
print("ready", flush=True)
sys.stdin.readline()
options = CompileOptions(buckets=[int(sys.argv[2])], batch_sizes=[1])
made = compile_model(Source(name=sys.argv[1]), options, report=lines.append)
print(made.folder, sum("exporting" in line for line in lines))
print(hf_bucket.load(made.folder)(["w1 w2"])[0]["logits"].tolist())
"""


@pytest.mark.parametrize("lengths", [("8", "8"), ("8", "16")], ids=["one ladder", "two ladders"])
def test_two_processes_that_compile_one_checkpoint_export_it_once_and_agree(
    tiny_bert: Path, own_cache: Path, lengths: tuple[str, str]
) -> None:
    command, pipe = [sys.executable, "-c", COMPILING, str(tiny_bert)], subprocess.PIPE
    children = [
        subprocess.Popen([*command, length], stdin=pipe, stdout=pipe, stderr=pipe, text=True) for length in lengths
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    results = [child.communicate(timeout=4 * NEVER_S)[0].splitlines() for child in children]
    (first, first_logits), (second, second_logits) = results
    folders = {first.split()[0], second.split()[0]}
    assert len(folders) == len(set(lengths))
    assert len({(Path(folder) / WEIGHTS).stat().st_ino for folder in folders}) == 1, "the weights lie there once"
    assert sorted([first.split()[1], second.split()[1]]) == ["0", "1"], "exported by one of them"
    assert np.abs(np.array(json.loads(first_logits)) - json.loads(second_logits)).max() <= 1e-5
    assert leftovers(own_cache) == []


# every file damaged


def real_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())


def right_or_refused(folder: Path, expected: np.ndarray, what: str) -> bool:
    """Return whether the artifact was refused; fail if it gave another answer."""
    with no_hang():
        try:
            got = logits(folder)
        except ArtifactError:
            return True
    assert np.abs(got - expected).max() <= 1e-5, what
    return False


def test_every_file_truncated_flipped_swapped_or_removed_is_refused_by_name(
    copied: Path, tmp_path: Path, answers: np.ndarray
) -> None:
    files = real_files(copied)
    chance = random.Random(0)
    assert len(files) == 11
    for path, other in zip(files, [*files[1:], files[0]], strict=True):
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        damages = {"emptied": b"", "cut": content[: chance.randrange(1, len(content))], "swapped": other.read_bytes()}
        if path.name != MANIFEST:  # a flipped bit of the manifest: see below
            damages["flipped"] = bytes(flipped)
        for what, damage in damages.items():
            path.write_bytes(damage)
            with pytest.raises(ArtifactError, match=path.name):
                open_artifact(copied)
            assert right_or_refused(copied, answers, f"{path.name} {what}")
        path.unlink()
        with pytest.raises(ArtifactError, match=path.name):
            open_artifact(copied)
        path.write_bytes(content)
    assert not right_or_refused(copied, answers, "nothing is damaged any more")


def test_a_file_of_the_same_size_from_another_model_is_refused(copied: Path, answers: np.ndarray) -> None:
    weights = copied / WEIGHTS
    weights.write_bytes(weights.read_bytes()[::-1])
    assert right_or_refused(copied, answers, "other weights")


@pytest.mark.parametrize("name", [MANIFEST, GRAPH, WEIGHTS, "config.json", "tokenizer.json", "model_b1_s8.onnx"])
@pytest.mark.parametrize("target", ["the same content", "other content", "nothing", "a folder", "/dev/zero", "a pipe"])
def test_a_file_replaced_by_a_link_out_of_the_folder_is_right_or_refused(
    copied: Path, tmp_path: Path, answers: np.ndarray, name: str, target: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    if target == "the same content":
        shutil.copyfile(copied / name, elsewhere)
    elif target == "other content":
        content = (copied / name).read_bytes()
        elsewhere.write_bytes(content[:-2] + b"??")
    elif target == "a folder":
        elsewhere.mkdir()
    elif target == "a pipe":
        os.mkfifo(elsewhere)
    elif target == "/dev/zero":
        elsewhere.symlink_to("/dev/zero")
    (copied / name).unlink()
    (copied / name).symlink_to(elsewhere)
    refused = right_or_refused(copied, answers, f"{name} is a link to {target}")
    assert refused == (target != "the same content" or name == WEIGHTS)


@pytest.mark.parametrize("target", ["/dev/zero", "a pipe"])
def test_a_file_that_never_ends_is_not_read_even_if_its_size_is_right(copied: Path, target: str) -> None:
    path = copied / "config.json"
    path.unlink()
    if target == "a pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(target)
    data = json.loads((copied / MANIFEST).read_text(encoding="utf-8"))
    data.pop("sha256", None)
    data["files"]["config.json"]["size"] = 0
    (copied / MANIFEST).write_text(json.dumps(data), encoding="utf-8")
    with no_hang(), pytest.raises(ArtifactError, match=r"config\.json cannot be read \(it is not a regular file\)"):
        open_artifact(copied)


def test_a_file_of_another_kind_in_the_place_of_a_manifest_is_not_read(copied: Path) -> None:
    (copied / MANIFEST).unlink()
    os.mkfifo(copied / MANIFEST)
    with no_hang(), pytest.raises(ArtifactError, match="it is not a regular file"):
        open_artifact(copied)


def test_a_layout_of_links_as_in_the_hubs_cache_gives_the_right_answer(
    copied: Path, tmp_path: Path, answers: np.ndarray
) -> None:
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "0"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(real_files(copied)):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert not right_or_refused(snapshot, answers, "links to blobs")


# manifests that nobody's compiler wrote


def deciding(manifest: Manifest) -> Manifest:
    """A manifest without what no answer depends on."""
    rest = {name: () for name in ("validation", "certificates") if hasattr(manifest, name)}
    return replace(manifest, source={}, versions={}, max_length=None, vocab_size=None, padding_leak=None, **rest)


def test_a_flipped_bit_anywhere_in_a_manifest_changes_no_answer(copied: Path) -> None:
    path = copied / MANIFEST
    content = path.read_bytes()
    whole = deciding(open_artifact(copied).manifest)
    wrong = []
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << random.Random(position).randrange(8)
        try:
            text = flipped.decode("utf-8")
            found = Manifest.from_json(text)
        except (UnicodeDecodeError, ArtifactError):
            continue
        ladder, labels = found.ladder == whole.ladder, found.labels == whole.labels
        other_files = found.files != whole.files  # refused when the files are compared
        if not other_files and deciding(found) != whole:
            wrong.append((position, content[max(0, position - 20) : position + 5], ladder, labels))
    assert not wrong, f"{len(wrong)} of {len(content)}: {wrong[:5]}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda d: d.update(schema_version=SCHEMA_VERSION + 1), "upgrade hf_bucket", id="newer"),
        pytest.param(lambda d: d["files"].update({"../x": d["files"].pop(WEIGHTS)}), "not a plain file name", id="../"),
        pytest.param(
            lambda d: d["files"].update({"/etc/passwd": d["files"].pop(WEIGHTS)}), "plain file", id="absolute"
        ),
        pytest.param(lambda d: d["files"][WEIGHTS].update(size=2**63), "its manifest says", id="huge size"),
        pytest.param(lambda d: d["files"][WEIGHTS].update(size=-1), "its manifest says", id="negative size"),
        pytest.param(lambda d: d["files"][WEIGHTS].update(size="9"), "has str at files", id="wrong type"),
        pytest.param(
            lambda d: d["ladder"].append({"batch_size": 10**9, "extent": [64]}),
            "64000000000 cells, expected at most 16777216",
            id="huge bucket",
        ),
        pytest.param(lambda d: d["ladder"].append({"batch_size": 1, "extent": [2**62]}), "at most 1", id="huge length"),
    ],
)
def test_a_hostile_manifest_is_refused_with_the_reason(copied: Path, change: Callable, message: str) -> None:
    rewrite_manifest(copied, change)
    with no_hang(), pytest.raises(ArtifactError, match=message):
        hf_bucket.load(copied)


def test_a_manifest_larger_than_any_is_not_read(copied: Path) -> None:
    with (copied / MANIFEST).open("ab") as file:
        file.truncate(room._LARGEST_MANIFEST + 1)
    with pytest.raises(ArtifactError, match="expected at most 16777216; do not trust it"):
        open_artifact(copied)


# weights outside the folder


def elsewhere(tmp_path: Path, folder: Path, kind: str) -> str:
    """Put the weights of a graph where they must not be, and return the name that the graph would have them by."""
    outside = tmp_path / "outside.data"
    if kind == "inside":
        return f"sub/../{WEIGHTS}"
    shutil.move(folder / WEIGHTS, outside)
    if kind == "a link":
        (folder / WEIGHTS).symlink_to(outside)
    elif kind == "a pipe":
        os.mkfifo(folder / WEIGHTS)
    elif kind == "a linked folder":
        (tmp_path / "there").mkdir()
        outside.rename(tmp_path / "there" / WEIGHTS)
        (folder / "here").symlink_to(tmp_path / "there")
    names = {"..": "../outside.data", "absolute": str(outside), "a linked folder": f"here/{WEIGHTS}"}
    return {**names, "memory": "*/_ORT_MEM_ADDR_/*"}.get(kind, WEIGHTS)


def point_to(graph: Path, location: str) -> None:
    """Have a graph take its weights from ``location``."""
    model = onnx.load(graph, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    graph.write_bytes(model.SerializeToString())


OUTSIDE = ["..", "absolute", "a link", "a linked folder", "a pipe", "missing", "memory"]


@pytest.mark.parametrize("kind", OUTSIDE)
def test_an_artifact_whose_graph_takes_weights_from_elsewhere_is_refused_before_the_engine_sees_it(
    copied: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxruntime.InferenceSession", lambda *_, **__: pytest.fail("the engine saw it"))
    location = elsewhere(tmp_path, copied, kind)
    for name in ("model_b1_s8.onnx", GRAPH):
        point_to(copied / name, location)
    rewrite_manifest(copied, lambda data: data["files"].pop(WEIGHTS, None))
    with no_hang(), pytest.raises(ArtifactError, match=r"model\w*\.onnx keeps weights in "):
        hf_bucket.load(copied)


@pytest.fixture
def exported(artifact: Artifact, tmp_path: Path) -> Path:
    """An ONNX export of the user's."""
    folder = tmp_path / "exported"
    folder.mkdir()
    for name in (GRAPH, WEIGHTS, "config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(artifact.path(name), folder / name)
    return folder


@pytest.mark.parametrize("kind", OUTSIDE)
def test_an_export_that_takes_weights_from_elsewhere_is_refused_before_it_is_compiled(
    exported: Path, tmp_path: Path, own_cache: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxruntime.InferenceSession", lambda *_, **__: pytest.fail("the engine saw it"))
    point_to(exported / GRAPH, elsewhere(tmp_path, exported, kind))
    if kind == "a pipe":  # no name may be asked for that a reader would wait at
        monkeypatch.setattr("hf_bucket.compile.model_key", lambda folder, options: "a" * 32)
    with no_hang(), pytest.raises(ArtifactError, match=r"model\.onnx keeps weights in "):
        compile_model(Source(name=str(exported)), CompileOptions(buckets=[8]), report=silent)
    assert entries() == []
    assert leftovers(own_cache) == []


@pytest.mark.parametrize("layout", ["a detour", "hard links", "links as in the Hub's cache"])
def test_an_export_whose_weights_are_beside_it_compiles_however_they_are_named(
    exported: Path, tmp_path: Path, own_cache: Path, answers: np.ndarray, layout: str
) -> None:
    folder = exported
    if layout == "a detour":
        (exported / "sub").mkdir()
        point_to(exported / GRAPH, elsewhere(tmp_path, exported, "inside"))
    elif layout == "hard links":
        os.link(exported / WEIGHTS, tmp_path / "second name")
    else:
        folder, blobs = tmp_path / "snapshots" / "0", tmp_path / "blobs"
        folder.mkdir(parents=True)
        blobs.mkdir()
        for number, path in enumerate(real_files(exported)):
            path.rename(blobs / str(number))
            (folder / path.name).symlink_to(f"../../blobs/{number}")
    made = compile_model(Source(name=str(folder)), CompileOptions(buckets=[16], batch_sizes=[1]), report=silent)
    assert np.abs(logits(made.folder) - answers).max() <= 1e-5


def external(name: str) -> onnx.TensorProto:
    tensor = helper.make_tensor(name, onnx.TensorProto.FLOAT, [2], bytes(8), raw=True)
    external_data_helper.set_external_data(tensor, location=name, offset=4096, length=8)
    tensor.ClearField("raw_data")
    return tensor


def test_names_of_weights_are_found_wherever_a_model_can_hold_a_tensor(tmp_path: Path) -> None:
    inner = helper.make_graph([], "inner", [], [], initializer=[external("in a branch")])
    deep = helper.make_node("If", ["c"], ["y"], then_branch=inner)
    middle = helper.make_graph([deep], "middle", [], [])
    sparse = onnx.SparseTensorProto(values=external("sparse values"), indices=external("sparse indices"), dims=[9])
    nodes = [
        helper.make_node("Constant", [], ["a"], value=external("in an attribute")),
        helper.make_node("Constant", [], ["b"], sparse_value=sparse),
        helper.make_node("Many", [], ["l"], domain="x", values=[external("in a list"), external("second")]),
        helper.make_node("Loop", [], ["z"], body=middle),
    ]
    graph = helper.make_graph(nodes, "outer", [], [], initializer=[external("plain"), external("plain")])
    graph.sparse_initializer.append(
        onnx.SparseTensorProto(values=external("sparse initializer"), indices=external("its indices"), dims=[9])
    )
    function = helper.make_function(
        "x", "f", [], ["o"], [helper.make_node("Constant", [], ["o"], value=external("in a function"))], []
    )
    function.attribute_proto.append(helper.make_attribute("default", external("in a default")))
    model = helper.make_model(graph, functions=[function])
    expected = {"in a branch", "sparse values", "sparse indices", "in an attribute", "in a list", "second", "plain"}
    expected |= {"sparse initializer", "its indices", "in a function", "in a default"}
    (tmp_path / GRAPH).write_bytes(model.SerializeToString())
    assert external_names(tmp_path / GRAPH) == expected
    # groups and numbers of unknown fields are skipped, as protobuf does
    group = bytes([0x9B, 0x06, 0x0A, 0x01, 0x41, 0x9C, 0x06])
    (tmp_path / GRAPH).write_bytes(group + model.SerializeToString() + b"\xa8\x06\x01" + b"\xa5\x06abcd")
    onnx.load(tmp_path / GRAPH, load_external_data=False)
    assert external_names(tmp_path / GRAPH) == expected


# a disk that fills up

FULL = """
import os, shutil, sys, warnings
from pathlib import Path
from test_faults import ArtifactError, copy_artifact, fake_artifact, leftovers, make_ladder, open_artifact

source, disk = open_artifact(sys.argv[1]), Path(sys.argv[2])
old = fake_artifact(disk / "model", make_ladder([8]))
whole = sum(-(-path.stat().st_size // 4096) for path in source.folder.iterdir())
refused = saved = 0
for pages in range(0, whole + 6):
    ballast = disk / "ballast"
    free = shutil.disk_usage(disk).free // 4096
    ballast.write_bytes(bytes(4096 * (free - pages)))
    assert shutil.disk_usage(disk).free // 4096 <= pages
    try:
        copy_artifact(source, disk / "model")
        saved += 1
    except ArtifactError as error:
        assert "model cannot be written: No space left on device; the artifact needs" in str(error), error
        assert "what was there is unchanged; free some space" in str(error), error
        assert open_artifact(disk / "model").manifest == old.manifest
        refused += 1
    ballast.unlink()
    assert leftovers(disk) == [], pages
    if saved:
        break
assert open_artifact(disk / "model").manifest == source.manifest
print(refused, saved)
"""


@pytest.fixture(scope="module")
def small_disk() -> list[str]:
    """A command that gives its argument, a folder, a file system of 1 MB that only its children see; or a skip."""
    mount = 'mount -t tmpfs -o size=1m none "$0" && exec "$@"'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount]
    try:
        probe = subprocess.run([*command, "/tmp", "true"], capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no unshare here")
    if probe.returncode:
        pytest.skip(f"no file system can be mounted here: {probe.stderr.decode()}")
    return command


def on_disk(command: list[str], disk: Path, code: str, *arguments: object, **environment: str) -> str:
    disk.mkdir()
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [*command, str(disk), sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=4 * NEVER_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_save_to_a_disk_that_fills_up_at_any_page_keeps_the_old_artifact_and_leaves_no_litter(
    artifact: Artifact, tmp_path: Path, small_disk: list[str]
) -> None:
    refused, saved = on_disk(small_disk, tmp_path / "disk", FULL, artifact.folder, tmp_path / "disk").split()
    assert int(refused) > 20
    assert int(saved) == 1


FULL_CACHE = """
import shutil, sys, warnings
from pathlib import Path
import hf_bucket
from test_faults import CompileOptions, Source, compile_model, leftovers, silent, ArtifactError, open_artifact

disk, both = Path(sys.argv[2]), sys.argv[3] == "both"
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - 40_000))
    try:
        made = compile_model(Source(name=sys.argv[1]), CompileOptions(buckets=[12]), report=silent)
        print(len(hf_bucket.load(made.folder)(["w1"])), sum("No space left" in str(one.message) for one in caught))
    except ArtifactError as error:
        print(error)
assert leftovers(disk) == []
assert not list(disk.rglob("*.onnx"))
"""


@pytest.mark.parametrize("full", ["cache", "both"])
def test_a_cache_on_a_full_disk_is_done_without_and_if_nothing_has_room_both_places_are_named(
    artifact: Artifact, tmp_path: Path, small_disk: list[str], full: str
) -> None:
    disk = tmp_path / "disk"
    source = copy_artifact(artifact, tmp_path / "saved").folder  # another disk: files are copied, not linked
    places = {"HF_BUCKET_CACHE": str(disk / "cache"), "TMPDIR": str(disk if full == "both" else tmp_path)}
    said = on_disk(small_disk, disk, FULL_CACHE, source, disk, full, **places).strip()
    if full == "cache":
        assert said == "1 1"
    else:
        assert f"neither the cache {disk}/cache nor {disk} can hold the compiled model" in said
        assert "No space left on device" in said


def test_a_file_size_limit_is_a_full_disk_too(artifact: Artifact, tmp_path: Path) -> None:
    code = (
        "import resource, sys; from pathlib import Path; from test_faults import *\n"
        "source, old = open_artifact(sys.argv[1]), fake_artifact(Path(sys.argv[2]) / 'model', LADDER)\n"
        "hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]\n"
        "for size in range(0, 90_000, 9_000):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))\n"
        "    with pytest.raises(ArtifactError, match='File too large; the artifact needs'):\n"
        "        copy_artifact(source, old.folder)\n"
        "    assert open_artifact(old.folder).manifest == old.manifest\n"
        "    assert leftovers(old.folder.parent) == []\n"
    )
    python(code, artifact.folder, tmp_path)


def test_a_folder_that_cannot_be_written_is_named_with_the_reason(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / "model"))

    monkeypatch.setattr(room, "write_folder", denied)
    with pytest.raises(ArtifactError, match=r"model cannot be written: .*Permission denied.* what was there is unch"):
        copy_artifact(artifact, tmp_path / "model")


# an artifact that changes under whoever has it open


@pytest.mark.parametrize("change", ["altered", "removed", "replaced"])
def test_a_bad_copy_never_takes_the_place_of_a_good_one(copied: Path, tmp_path: Path, change: str) -> None:
    opened = open_artifact(copied)
    target = fake_artifact(tmp_path / "target", LADDER)
    if change == "altered":
        with (copied / WEIGHTS).open("r+b") as file:
            file.write(b"other")
    elif change == "removed":
        shutil.rmtree(copied)
    else:
        copy_artifact(fake_artifact(tmp_path / "other", LADDER), copied)
    with pytest.raises(ArtifactError, match=r"copied (changed since it was opened|holds another artifact)"):
        copy_artifact(opened, target.folder)
    assert open_artifact(target.folder).manifest == target.manifest
    assert leftovers(tmp_path) == []


def test_a_tokenizer_read_late_is_the_one_that_was_checked(copied: Path) -> None:
    opened = open_artifact(copied)
    content = (copied / "tokenizer.json").read_text(encoding="utf-8")
    (copied / "tokenizer.json").write_text(content.replace('"w1": 5', '"w1": 6'), encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json was altered"):
        opened.tokenizer_json()
    (copied / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match=r"tokenizer\.json is missing"):
        opened.tokenizer_json()


def test_an_artifact_opened_by_a_relative_name_stays_the_same_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = fake_artifact(tmp_path / "here" / "model", LADDER)
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    opened = open_artifact("model")
    monkeypatch.chdir(tmp_path / "there")
    assert opened.tokenizer_json() == made.tokenizer_json()
    assert Runner(opened, engine=fake_engine)(["w1"])[0]["logits"].shape == (2,)
