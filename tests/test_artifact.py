"""A damaged artifact names its file, and a folder is replaced as a whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import fake_artifact
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_bucket import artifact as room
from hf_bucket.artifact import (
    GRAPH,
    WEIGHTS,
    hash_file,
    is_artifact,
    link_files,
    open_artifact,
    record_files,
    variant_name,
    write_folder,
)
from hf_bucket.errors import ArtifactError
from hf_bucket.ladder import Bucket, make_ladder
from hf_bucket.manifest import MANIFEST, FileRecord, Manifest

FILES = {
    GRAPH: b"graph",
    WEIGHTS: bytes(range(256)),
    "model_b1_s8.onnx": b"variant",
    "config.json": b"{}",
    "empty.txt": b"",
}
LADDER = make_ladder([8], batch_sizes=[1])


def manifest_of(folder: Path, template: Manifest) -> str:
    return replace(template, files=record_files(folder)).to_json()


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """A manifest whose files do not matter."""
    return fake_artifact(tmp_path_factory.mktemp("template"), LADDER).manifest


@pytest.fixture
def fill(template: Manifest) -> Callable[[Path], None]:
    """Writes a small artifact."""

    def write(folder: Path) -> None:
        for name, content in FILES.items():
            (folder / name).write_bytes(content)
        (folder / MANIFEST).write_text(manifest_of(folder, template), encoding="utf-8")

    return write


@pytest.fixture
def folder(tmp_path: Path, fill: Callable[[Path], None]) -> Path:
    """A small artifact."""
    made = tmp_path / "made"
    made.mkdir()
    fill(made)
    return made


@pytest.fixture(params=[True, False], ids=["exchange", "two renames"])
def exchange(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With and without a system that swaps two folders in one step."""
    if not request.param:
        monkeypatch.setattr(room, "_exchange", lambda first, second: False)
    return bool(request.param)


def snapshot(folder: Path) -> dict[str, object]:
    """Everything below a folder: contents of files, targets of links, None for folders."""
    return {
        path.relative_to(folder).as_posix(): os.readlink(path)
        if path.is_symlink()
        else None
        if path.is_dir()
        else path.read_bytes()
        for path in folder.rglob("*")
    }


# property


@settings(deadline=None, max_examples=25)
@given(
    old=st.dictionaries(st.sampled_from("abcde"), st.binary(max_size=3)),
    listed=st.sets(st.sampled_from("abcde")),
    new=st.dictionaries(st.sampled_from("abcde"), st.binary(max_size=3)),
)
def test_afterwards_a_folder_holds_the_new_files_and_those_that_were_never_the_artifacts(
    template: Manifest,
    tmp_path_factory: pytest.TempPathFactory,
    old: dict[str, bytes],
    listed: set[str],
    new: dict[str, bytes],
) -> None:
    target = tmp_path_factory.mktemp("written")
    for name, content in old.items():
        (target / name).write_bytes(content)
    files = {name: FileRecord(size=0, sha256="") for name in listed}
    (target / MANIFEST).write_text(replace(template, files=files).to_json(), encoding="utf-8")

    def fill(folder: Path) -> None:
        for name, content in new.items():
            (folder / name).write_bytes(content)

    write_folder(target, fill)
    assert snapshot(target) == {name: content for name, content in old.items() if name not in listed} | new


# tables: opening


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match=rf"made/{name} is missing; compile the model again"):
        open_artifact(folder)


@pytest.mark.parametrize("name", [name for name, content in FILES.items() if content])
@pytest.mark.parametrize("keep", [0, -1], ids=["emptied", "one byte short"])
def test_a_truncated_file_is_named_with_both_sizes(folder: Path, name: str, keep: int) -> None:
    content = FILES[name][:keep]
    (folder / name).write_bytes(content)
    with pytest.raises(
        ArtifactError, match=rf"made/{name} has {len(content)} bytes, its manifest says {len(FILES[name])}"
    ):
        open_artifact(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_one_byte_longer_is_named(folder: Path, name: str) -> None:
    (folder / name).write_bytes(FILES[name] + b"\0")
    with pytest.raises(ArtifactError, match=rf"made/{name} has {len(FILES[name]) + 1} bytes"):
        open_artifact(folder)


@pytest.mark.parametrize("name", [name for name, content in FILES.items() if content])
@pytest.mark.parametrize("position", [0, -1], ids=["first byte", "last byte"])
def test_one_flipped_bit_is_named(folder: Path, name: str, position: int) -> None:
    content = bytearray(FILES[name])
    content[position] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"made/{name} was altered: its sha256"):
        open_artifact(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(shutil.rmtree, "there is no such folder", id="no folder"),
        pytest.param(lambda folder: (folder / MANIFEST).unlink(), f"there is no {MANIFEST} in it", id="no manifest"),
        pytest.param(
            lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe"), f"{MANIFEST} is not UTF-8", id="no text"
        ),
        pytest.param(lambda folder: (folder / MANIFEST).write_bytes(b"{"), "is not valid JSON", id="no JSON"),
        pytest.param(
            lambda folder: (shutil.rmtree(folder), folder.write_bytes(b"")), "there is no such folder", id="a file"
        ),
    ],
)
def test_a_folder_that_is_no_artifact_says_why(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    with pytest.raises(ArtifactError, match=message):
        open_artifact(folder)


def test_a_folder_in_the_place_of_a_file_is_named(folder: Path, template: Manifest) -> None:
    (folder / GRAPH).unlink()
    (folder / GRAPH).mkdir()
    size = (folder / GRAPH).stat().st_size
    files = {GRAPH: FileRecord(size=size, sha256="0" * 64)}
    (folder / MANIFEST).write_text(replace(template, files=files).to_json(), encoding="utf-8")
    with pytest.raises(ArtifactError, match=rf"made/{GRAPH} cannot be read"):
        open_artifact(folder)


def test_a_file_name_too_long_for_the_disk_is_named(folder: Path, template: Manifest) -> None:
    files = {"x" * 5000: FileRecord(size=0, sha256="")}
    (folder / MANIFEST).write_text(replace(template, files=files).to_json(), encoding="utf-8")
    with pytest.raises(ArtifactError, match="xxx cannot be read"):
        open_artifact(folder)


def test_a_name_that_leads_out_of_the_folder_is_never_followed(folder: Path) -> None:
    (folder.parent / "secret").write_bytes(b"graph")
    text = (folder / MANIFEST).read_text(encoding="utf-8").replace(f'"{GRAPH}"', '"../secret"')
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"'\.\./secret', which is not a plain file name"):
        open_artifact(folder)


# examples: opening


def test_a_whole_artifact_opens_with_its_paths(folder: Path) -> None:
    artifact = open_artifact(str(folder))
    assert artifact.manifest.ladder == LADDER
    assert set(artifact.manifest.files) == set(FILES)
    assert artifact.path(GRAPH) == folder / GRAPH
    assert artifact.variant(LADDER.buckets[0]) == folder / "model_b1_s8.onnx"
    with pytest.raises(ArtifactError, match=r"has no model_b1_s16\.onnx in its manifest; compile the model again"):
        artifact.variant(Bucket(batch_size=1, extent=(16,)))


def test_a_file_beside_the_manifests_is_no_damage_and_no_part_of_it(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"has no notes\.txt in its manifest"):
        open_artifact(folder).path("notes.txt")


def test_files_that_are_links_are_read_through(folder: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in folder.iterdir():
        (linked / path.name).symlink_to(path)
    assert open_artifact(linked).manifest == open_artifact(folder).manifest


@pytest.mark.parametrize(
    ("content", "side"),
    [
        pytest.param('{"truncation_side": "left"}', "left", id="left"),
        pytest.param('{"truncation_side": "right"}', "right", id="right"),
        pytest.param("{}", "right", id="not said"),
        pytest.param(None, "right", id="no file"),
    ],
)
def test_texts_are_cut_where_the_tokenizers_author_cut_them(
    folder: Path, template: Manifest, content: str | None, side: str
) -> None:
    if content is not None:
        (folder / "tokenizer_config.json").write_text(content, encoding="utf-8")
    (folder / "tokenizer.json").write_text("ä", encoding="utf-8")
    (folder / MANIFEST).write_text(manifest_of(folder, template), encoding="utf-8")
    artifact = open_artifact(folder)
    assert artifact.truncation_side() == side
    assert artifact.tokenizer_json() == "ä"


def test_records_leave_out_the_manifest_and_folders(folder: Path) -> None:
    (folder / "onnx").mkdir()
    records = record_files(folder)
    assert set(records) == set(FILES)
    assert {name: record.size for name, record in records.items()} == {name: len(FILES[name]) for name in FILES}
    assert records["empty.txt"].sha256 == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_a_hash_covers_a_file_of_several_blocks(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\0" * (2 << 20) + b"a")
    (tmp_path / "b").write_bytes(b"\0" * (2 << 20) + b"b")
    assert hash_file(tmp_path / "a") != hash_file(tmp_path / "b")


def test_a_variant_is_named_after_its_bucket() -> None:
    assert variant_name(Bucket(batch_size=8, extent=(64,))) == "model_b8_s64.onnx"


# tables: writing


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt("stop"), ValueError("bug")], ids=repr)
@pytest.mark.parametrize("exists", [True, False], ids=["over an old artifact", "where nothing is"])
def test_a_crash_while_filling_leaves_the_old_folder_or_none(
    tmp_path: Path, fill: Callable[[Path], None], error: BaseException, exists: bool
) -> None:
    target = tmp_path / "parent" / "model"
    if exists:
        write_folder(target, fill)
    before = snapshot(tmp_path)

    def crash(folder: Path) -> None:
        (folder / GRAPH).write_bytes(b"half")
        raise error

    with pytest.raises(type(error), match=str(error)):
        write_folder(target, crash)
    assert snapshot(tmp_path) == before | {"parent": None}


@pytest.mark.parametrize("step", ["_keep_foreign_files", "_sync", "_put_in_place"])
def test_a_crash_at_any_later_step_leaves_the_old_folder(
    tmp_path: Path, fill: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    write_folder(tmp_path / "model", fill)
    before = snapshot(tmp_path)

    def crash(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(room, step, crash)
    with pytest.raises(OSError, match="disk full"):
        write_folder(tmp_path / "model", lambda folder: (folder / "new").touch())  # type: ignore[arg-type]
    assert snapshot(tmp_path) == before


def test_a_crash_between_two_renames_puts_the_old_folder_back(
    tmp_path: Path, fill: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_exchange", lambda first, second: False)
    write_folder(tmp_path / "model", fill)
    before = snapshot(tmp_path)
    rename = Path.rename

    def second_fails(self: Path, target: Path) -> Path:
        if target == tmp_path / "model" and (self / "new").exists():
            raise OSError("disk full")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(OSError, match="disk full"):
        write_folder(tmp_path / "model", lambda folder: (folder / "new").touch())
    assert snapshot(tmp_path) == before


@pytest.mark.usefixtures("exchange")
def test_a_new_artifact_replaces_the_old_one_and_keeps_what_is_the_users(
    tmp_path: Path, fill: Callable[[Path], None], template: Manifest
) -> None:
    target = tmp_path / "model"
    write_folder(target, fill)
    (target / "README.md").write_text("mine", encoding="utf-8")
    (target / ".git" / "refs").mkdir(parents=True)
    (target / ".git" / "refs" / "head").write_text("abc", encoding="utf-8")
    (target / ".git" / "link").symlink_to("refs", target_is_directory=True)
    (target / "link").symlink_to("README.md")
    (target / "dangling").symlink_to("nowhere")
    (target / "linked-folder").symlink_to(".git", target_is_directory=True)
    readme = (target / "README.md").stat().st_ino

    def refill(folder: Path) -> None:
        (folder / GRAPH).write_bytes(b"new graph")
        (folder / "model_b1_s16.onnx").write_bytes(b"another variant")
        (folder / MANIFEST).write_text(manifest_of(folder, template), encoding="utf-8")

    write_folder(target, refill)
    found = snapshot(target)
    del found[MANIFEST]
    assert found == {
        GRAPH: b"new graph",
        "model_b1_s16.onnx": b"another variant",
        "README.md": b"mine",
        ".git": None,
        ".git/link": "refs",
        ".git/refs": None,
        ".git/refs/head": b"abc",
        "link": "README.md",
        "dangling": "nowhere",
        "linked-folder": ".git",
    }
    assert (target / "README.md").stat().st_ino == readme
    assert set(open_artifact(target).manifest.files) == {GRAPH, "model_b1_s16.onnx"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.usefixtures("exchange")
@pytest.mark.parametrize(
    "prepare",
    [
        pytest.param(lambda target: None, id="nothing there"),
        pytest.param(lambda target: target.mkdir(parents=True), id="an empty folder"),
        pytest.param(lambda target: target.parent.mkdir(), id="only the parent"),
    ],
)
def test_a_target_without_an_artifact_gets_one(
    tmp_path: Path, fill: Callable[[Path], None], prepare: Callable[[Path], None]
) -> None:
    target = tmp_path / "deep" / "model"
    prepare(target)
    write_folder(target, fill)
    assert open_artifact(target).manifest.ladder == LADDER
    assert [path.name for path in target.parent.iterdir()] == ["model"]


@pytest.mark.usefixtures("exchange")
@pytest.mark.parametrize("spelling", ["model", "./model", "sub/../model"])
def test_a_relative_target_is_meant_from_the_current_folder(
    tmp_path: Path, fill: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        write_folder(Path(spelling), fill)
    assert is_artifact(tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "sub"]


@pytest.mark.usefixtures("exchange")
@pytest.mark.parametrize("exists", [True, False], ids=["to a folder", "to nothing yet"])
def test_a_target_that_is_a_link_stays_one(tmp_path: Path, fill: Callable[[Path], None], exists: bool) -> None:
    (tmp_path / "disk").mkdir()
    if exists:
        (tmp_path / "disk" / "real").mkdir()
        (tmp_path / "disk" / "real" / "mine.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "model").symlink_to("disk/real")
    write_folder(tmp_path / "model", fill)
    assert os.readlink(tmp_path / "model") == "disk/real"
    assert is_artifact(tmp_path / "disk" / "real")
    assert (tmp_path / "model" / "mine.txt").exists() == exists
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["real"]


def test_a_target_that_is_a_file_stays_as_it_was(tmp_path: Path, fill: Callable[[Path], None]) -> None:
    (tmp_path / "model").write_text("mine", encoding="utf-8")
    with pytest.raises(NotADirectoryError, match="model"):
        write_folder(tmp_path / "model", fill)
    assert snapshot(tmp_path) == {"model": b"mine"}


@pytest.mark.parametrize(
    "content",
    [pytest.param(b"{", id="no JSON"), pytest.param(b"\xff", id="no text"), pytest.param(b"{}", id="no manifest")],
)
def test_a_damaged_manifest_is_replaced_and_nothing_unknown_is_dropped(
    tmp_path: Path, fill: Callable[[Path], None], content: bytes
) -> None:
    target = tmp_path / "model"
    target.mkdir()
    for name in (GRAPH, WEIGHTS, "notes.txt"):
        (target / name).write_bytes(b"old")
    (target / MANIFEST).write_bytes(content)

    def refill(folder: Path) -> None:
        fill(folder)
        (folder / WEIGHTS).unlink()

    write_folder(target, refill)
    found = snapshot(target)
    assert found["notes.txt"] == b"old"
    assert found[GRAPH] == FILES[GRAPH]
    assert WEIGHTS not in found


def test_what_cannot_be_linked_is_copied(
    tmp_path: Path, fill: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    (target / "sub").mkdir(parents=True)
    (target / "mine.txt").write_text("mine", encoding="utf-8")
    (target / "sub" / "deep.txt").write_text("deep", encoding="utf-8")
    (target / "link").symlink_to("mine.txt")

    def no_links(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")  # as on FAT, and for files of another user

    monkeypatch.setattr(os, "link", no_links)
    write_folder(target, fill)
    found = snapshot(target)
    assert (found["mine.txt"], found["sub/deep.txt"], found["link"]) == (b"mine", b"deep", "mine.txt")
    assert is_artifact(target)


def test_open_readers_of_the_old_files_keep_them(tmp_path: Path, fill: Callable[[Path], None]) -> None:
    write_folder(tmp_path / "model", fill)
    with (tmp_path / "model" / WEIGHTS).open("rb") as file:
        write_folder(tmp_path / "model", lambda folder: (folder / WEIGHTS).write_bytes(b"new"))  # type: ignore[arg-type]
        assert file.read() == FILES[WEIGHTS]
    assert (tmp_path / "model" / WEIGHTS).read_bytes() == b"new"


# tables: linking


@pytest.mark.parametrize("copy", [False, True], ids=["link", "copy"])
@pytest.mark.parametrize("through_link", [False, True], ids=["a file", "a link to a file"])
def test_files_are_linked_unless_a_copy_is_asked_for(
    folder: Path, tmp_path: Path, copy: bool, through_link: bool
) -> None:
    source = folder / WEIGHTS
    if through_link:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / WEIGHTS).symlink_to(source)
        source = tmp_path / "elsewhere" / WEIGHTS
    new = tmp_path / "new"
    new.mkdir()
    link_files([source], new, copy=copy)
    assert (new / WEIGHTS).read_bytes() == FILES[WEIGHTS]
    assert not (new / WEIGHTS).is_symlink()
    assert (new / WEIGHTS).samefile(folder / WEIGHTS) != copy


def test_files_are_copied_where_links_cannot_go(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other_disk(*_: object, **__: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_disk)
    new = tmp_path / "new"
    new.mkdir()
    link_files([folder / GRAPH], new)
    assert (new / GRAPH).read_bytes() == FILES[GRAPH]
    assert not (new / GRAPH).samefile(folder / GRAPH)


def test_another_failure_to_link_is_no_reason_to_copy(folder: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    new.mkdir()
    (new / GRAPH).write_text("there first", encoding="utf-8")
    with pytest.raises(FileExistsError, match=GRAPH):
        link_files([folder / GRAPH], new)
    assert (new / GRAPH).read_text(encoding="utf-8") == "there first"


def test_the_working_directory_is_not_exchanged_under_the_process(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match="is the working directory or a mount point; choose a folder inside it"):
        write_folder(Path("."), lambda folder: None)


def test_a_folder_keeps_its_permissions(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir(mode=0o700)
    write_folder(target, lambda folder: None)
    assert target.stat().st_mode & 0o777 == 0o700
