"""A model is found in a folder, in the Hub's cache or on the Hub; only what is needed is fetched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_bucket import source as room
from hf_bucket.errors import ModelError
from hf_bucket.source import Files, Hub, HubClient, Source, locate

MANIFEST = "bucket_config.json"
CONFIG = ["config.json", "tokenizer.json", "tokenizer_config.json"]
ARTIFACT = [*CONFIG, MANIFEST, "model.onnx", "model.onnx.data", "model_b1_s8.onnx", "probes.json"]
COMMIT, OTHER_COMMIT = "a" * 40, "b" * 40


def lay_out(folder: Path, names: Sequence[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name, encoding="utf-8")
    folder.mkdir(exist_ok=True)
    return folder


def find(source: Source, *, export: bool | None = None, hub: Hub | None = None) -> Files:
    return locate(source, export=export, manifest=MANIFEST, hub=hub)


@dataclass
class FakeHub:
    """A Hub of one repository; ``patterns`` are those of the last download, ``fetched`` the files it brought."""

    names: Sequence[str]
    folder: Path
    patterns: list[str] = field(default_factory=list)
    fetched: set[str] = field(default_factory=set)

    def files(self, source: Source) -> list[str]:
        return list(self.names)

    def download(self, source: Source, patterns: Sequence[str]) -> Path:
        self.patterns = list(patterns)
        self.fetched = {name for name in self.names if any(fnmatch(name, pattern) for pattern in patterns)}
        return lay_out(self.folder, sorted(self.fetched))


class FailingHub:
    """A Hub that cannot be asked."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def files(self, source: Source) -> list[str]:
        raise self.error

    def download(self, source: Source, patterns: Sequence[str]) -> Path:
        raise self.error


@pytest.fixture
def hub_cache(tmp_path: Path) -> Path:
    """A folder laid out as huggingface_hub's cache, with one model at two revisions."""
    repository = tmp_path / "hub" / "models--org--model"
    snapshots = {
        COMMIT: [*CONFIG, "model.safetensors"],
        OTHER_COMMIT: [*CONFIG, "onnx/model.onnx", "onnx/model.onnx_data"],
    }
    (repository / "blobs").mkdir(parents=True)
    for commit, names in snapshots.items():
        for name in names:
            blob = repository / "blobs" / f"{commit[0]}-{name.replace('/', '-')}"
            blob.write_text(name, encoding="utf-8")
            link = repository / "snapshots" / commit / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    (repository / "refs" / "v1").write_text(OTHER_COMMIT, encoding="utf-8")
    return tmp_path / "hub"


def know_the_tree(cache: Path, commit: str, names: Sequence[str]) -> None:
    """Have huggingface_hub remember which files the repository has at ``commit``, as after a download."""
    tree = pytest.importorskip("huggingface_hub._tree_cache", reason="this huggingface_hub remembers no trees")
    entries = {name: tree.TreeCacheEntry(size=1, blob_id="0" * 40) for name in names}
    tree.write_tree_cache(str(cache / "models--org--model"), commit, entries)


# property


@settings(deadline=None, max_examples=40)
@given(
    names=st.sets(
        st.sampled_from(
            [*ARTIFACT, "model.safetensors", "pytorch_model.bin", "onnx/model.onnx", "modeling_x.py", "1/x.safetensors"]
        )
    ),
    export=st.sampled_from([None, True, False]),
)
def test_the_hub_and_a_folder_of_the_same_files_agree(
    tmp_path_factory: pytest.TempPathFactory, names: set[str], export: bool | None
) -> None:
    local = lay_out(tmp_path_factory.mktemp("local"), sorted(names))
    hub = FakeHub(names=sorted(names), folder=tmp_path_factory.mktemp("hub"))
    try:
        found = find(Source(name=str(local)), export=export)
    except ModelError:
        with pytest.raises(ModelError, match=r"org/model holds no"):
            find(Source(name="org/model"), export=export, hub=hub)
        return
    remote = find(Source(name="org/model"), export=export, hub=hub)
    assert remote.kind == found.kind
    assert remote.folder == hub.folder
    assert remote.graph == (None if found.graph is None else hub.folder / found.graph.relative_to(local))
    assert remote.graph is None or remote.graph.is_file()
    # what was fetched is enough to find the same again
    assert find(Source(name=str(hub.folder)), export=export).kind == found.kind


# tables: a local folder


@pytest.mark.parametrize(
    ("names", "export", "kind", "graph"),
    [
        pytest.param(ARTIFACT, None, "artifact", None, id="artifact"),
        pytest.param([*ARTIFACT, "model.safetensors"], None, "artifact", None, id="artifact beside its checkpoint"),
        pytest.param([*ARTIFACT, "model.safetensors"], True, "checkpoint", None, id="checkpoint asked for"),
        pytest.param(ARTIFACT, False, "onnx", "model.onnx", id="graph of an artifact asked for"),
        pytest.param([*CONFIG, "model.safetensors"], None, "checkpoint", None, id="safetensors"),
        pytest.param([*CONFIG, "model-00001-of-00002.safetensors"], None, "checkpoint", None, id="sharded safetensors"),
        pytest.param([*CONFIG, "pytorch_model.bin"], None, "checkpoint", None, id="pytorch_model.bin"),
        pytest.param([*CONFIG, "pytorch_model-00001-of-00002.bin"], None, "checkpoint", None, id="sharded bin"),
        pytest.param([*CONFIG, "model.onnx"], None, "onnx", "model.onnx", id="graph"),
        pytest.param([*CONFIG, "onnx/model.onnx"], None, "onnx", "onnx/model.onnx", id="graph in onnx/"),
        pytest.param([*CONFIG, "model.onnx", "onnx/model.onnx"], None, "onnx", "model.onnx", id="two graphs"),
        pytest.param([*CONFIG, "model.safetensors", "onnx/model.onnx"], None, "checkpoint", None, id="weights first"),
        pytest.param(
            [*CONFIG, "model.safetensors", "onnx/model.onnx"], False, "onnx", "onnx/model.onnx", id="graph asked for"
        ),
    ],
)
def test_a_folder_is_what_its_files_make_it(
    tmp_path: Path, names: list[str], export: bool | None, kind: str, graph: str | None
) -> None:
    folder = lay_out(tmp_path / "model", names)
    expected = Files(folder=folder, kind=kind, graph=None if graph is None else folder / graph)
    assert find(Source(name=str(folder)), export=export) == expected


@pytest.mark.parametrize(
    ("names", "export", "message"),
    [
        pytest.param([], None, f"holds no weights, a graph or {MANIFEST}; found: nothing", id="empty"),
        pytest.param(CONFIG, None, "found: config.json, tokenizer.json, tokenizer_config.json", id="only a config"),
        pytest.param(["optimizer.bin"], None, "found: optimizer.bin", id="other bin"),
        pytest.param(["sub/model.safetensors"], None, "found: nothing", id="weights one folder down"),
        pytest.param(["onnx/model.safetensors"], None, "found: onnx/model.safetensors", id="weights beside graphs"),
        pytest.param(["onnx/model_int8.onnx"], None, "found: onnx/model_int8.onnx", id="graph of another name"),
        pytest.param(["model.onnx"], True, r"holds no weights \(\*\.safetensors\); found: model.onnx", id="no weights"),
        pytest.param(ARTIFACT, True, r"holds no weights \(\*\.safetensors\); found: bucket_config.json", id="compiled"),
        pytest.param(["model.safetensors"], False, "holds no model.onnx or onnx/model.onnx; found: mod", id="no graph"),
    ],
)
def test_a_folder_without_a_model_says_what_was_found(
    tmp_path: Path, names: list[str], export: bool | None, message: str
) -> None:
    folder = lay_out(tmp_path / "model", names)
    with pytest.raises(ModelError, match=message):
        find(Source(name=str(folder)), export=export)


@pytest.mark.parametrize("subfolder", ["sub", "sub/", "deep/sub"])
def test_a_subfolder_is_searched_alone(tmp_path: Path, subfolder: str) -> None:
    place = subfolder.rstrip("/")
    lay_out(tmp_path, [MANIFEST, "model.safetensors", f"{place}/config.json", f"{place}/onnx/model.onnx"])
    found = find(Source(name=str(tmp_path), subfolder=subfolder))
    assert found == Files(folder=tmp_path / place, kind="onnx", graph=tmp_path / place / "onnx" / "model.onnx")
    with pytest.raises(ModelError, match=r"elsewhere holds no weights.*found: nothing"):
        find(Source(name=str(tmp_path), subfolder="elsewhere"))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("", id="empty"),
        pytest.param("/no/such/folder", id="absolute"),
        pytest.param("./model", id="in the current folder"),
        pytest.param("../model", id="in the parent"),
        pytest.param("~/no-such-model", id="at home"),
        pytest.param("~no-such-user/model", id="at nobody's home"),
        pytest.param("a/b/c", id="too deep for a Hub id"),
        pytest.param("org/model/", id="slash at the end"),
        pytest.param("file", id="a file"),
    ],
)
def test_what_looks_like_a_path_is_never_asked_from_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(lay_out(tmp_path / "here", ["file", "model.safetensors"]))
    hub = FakeHub(names=["model.safetensors"], folder=tmp_path / "hub")
    with pytest.raises(ModelError, match=r"is not a folder; expected a model folder or a Hub id such as org/model"):
        find(Source(name=name), hub=hub)
    assert not hub.patterns


def test_a_folder_is_preferred_to_a_hub_id_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_out(tmp_path / "org" / "model", ["model.safetensors"])
    monkeypatch.chdir(tmp_path)
    hub = FakeHub(names=["model.onnx"], folder=tmp_path / "hub")
    assert find(Source(name="org/model"), hub=hub).kind == "checkpoint"
    assert not hub.patterns


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_out(tmp_path / "model", ["model.safetensors"])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find(Source(name="~/model")).folder == tmp_path / "model"


# tables: the Hub


@pytest.mark.parametrize(
    ("names", "source", "export", "fetched"),
    [
        pytest.param(
            [*CONFIG, "model.safetensors", "pytorch_model.bin", "tf_model.h5", "onnx/model.onnx", "README.md", "x.py"],
            {},
            None,
            {*CONFIG, "model.safetensors"},
            id="safetensors alone where there are",
        ),
        pytest.param(
            [*CONFIG, "model.safetensors.index.json", "model-1-of-2.safetensors", "model-2-of-2.safetensors"],
            {},
            None,
            {*CONFIG, "model.safetensors.index.json", "model-1-of-2.safetensors", "model-2-of-2.safetensors"},
            id="all shards",
        ),
        pytest.param(
            [*CONFIG, "pytorch_model.bin", "training_args.bin", "1_Dense/model.safetensors"],
            {},
            None,
            {*CONFIG, "pytorch_model.bin"},
            id="bin where safetensors are another folder's",
        ),
        pytest.param(
            [*CONFIG, "vocab.txt", "merges.txt", "spiece.model", "chat.jinja", "model.safetensors"],
            {},
            None,
            {*CONFIG, "vocab.txt", "merges.txt", "spiece.model", "chat.jinja", "model.safetensors"},
            id="every kind of tokenizer file",
        ),
        pytest.param(
            [*CONFIG, "model.safetensors", "modeling_x.py"],
            {"trust_remote_code": True},
            None,
            {*CONFIG, "model.safetensors", "modeling_x.py"},
            id="code that is trusted",
        ),
        pytest.param(
            [*CONFIG, "onnx/model.onnx", "onnx/model.onnx_data", "onnx/model_int8.onnx", "x.py"],
            {"trust_remote_code": True},
            None,
            {*CONFIG, "onnx/model.onnx", "onnx/model.onnx_data"},
            id="a graph with its data, no code",
        ),
        pytest.param(
            [*CONFIG, "model.onnx", "model.onnx.data", "model.safetensors"],
            {},
            False,
            {*CONFIG, "model.onnx", "model.onnx.data"},
            id="a graph although there are weights",
        ),
        pytest.param(
            [*ARTIFACT, "model.safetensors", "README.md", "x.py"],
            {"trust_remote_code": True},
            None,
            set(ARTIFACT),
            id="an artifact with all its graphs, no code",
        ),
        pytest.param(
            [*ARTIFACT, "model.safetensors"],
            {},
            True,
            {*CONFIG, MANIFEST, "probes.json", "model.safetensors"},
            id="a checkpoint although there is an artifact",
        ),
        pytest.param(
            ["config.json", "model.safetensors", *[f"sub/{name}" for name in ARTIFACT]],
            {"subfolder": "sub"},
            None,
            {f"sub/{name}" for name in ARTIFACT},
            id="an artifact in a subfolder",
        ),
        pytest.param(
            ["config.json", "model.safetensors", "sub/config.json", "sub/pytorch_model.bin"],
            {"subfolder": "sub/"},
            None,
            {"sub/config.json", "sub/pytorch_model.bin"},
            id="a checkpoint in a subfolder",
        ),
    ],
)
def test_only_what_is_needed_is_fetched(
    tmp_path: Path, names: list[str], source: dict[str, Any], export: bool | None, fetched: set[str]
) -> None:
    hub = FakeHub(names=names, folder=tmp_path / "hub")
    found = find(Source(name="org/model", **source), export=export, hub=hub)
    assert hub.fetched == fetched
    assert found.folder == tmp_path / "hub" / source.get("subfolder", "")
    assert found.graph is None or found.graph.is_file()


def test_a_repository_without_a_model_is_not_fetched(tmp_path: Path) -> None:
    hub = FakeHub(names=["README.md"], folder=tmp_path)
    with pytest.raises(ModelError, match=r"org/model/sub holds no weights.*found: nothing"):
        find(Source(name="org/model", subfolder="sub"), hub=hub)
    assert not hub.patterns


def response_error(kind: type[errors.HfHubHTTPError], message: str) -> errors.HfHubHTTPError:
    return kind(message, response=SimpleNamespace(headers={}, status_code=404, request=None))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        pytest.param(response_error(errors.HfHubHTTPError, "500 Server Error\nmore"), "500 Server Error\\)", id="http"),
        pytest.param(response_error(errors.RepositoryNotFoundError, "401"), "RepositoryNotFoundError: 401", id="repo"),
        pytest.param(response_error(errors.GatedRepoError, "403"), "GatedRepoError: 403", id="gated"),
        pytest.param(response_error(errors.RevisionNotFoundError, "404"), "RevisionNotFoundError: 404", id="revision"),
        pytest.param(response_error(errors.RemoteEntryNotFoundError, "404"), "RemoteEntryNotFound", id="remote entry"),
        pytest.param(errors.HTTPError("no route to host"), "HTTPError: no route to host", id="no connection"),
        pytest.param(errors.OfflineModeIsEnabled("offline"), "OfflineModeIsEnabled: offline", id="offline"),
        pytest.param(errors.LocalEntryNotFoundError("not cached"), "LocalEntryNotFoundError: not cached", id="cache"),
        pytest.param(errors.EntryNotFoundError(), "EntryNotFoundError: no reason given", id="without a message"),
        pytest.param(errors.LocalTokenNotFoundError("log in"), "LocalTokenNotFoundError: log in", id="no token"),
        pytest.param(errors.HFValidationError("bad id"), "HFValidationError: bad id", id="id"),
        pytest.param(OSError(28, "No space left"), "OSError: .Errno 28. No space left", id="disk full"),
    ],
)
def test_whatever_the_hub_raises_is_a_model_error_with_its_reason(error: Exception, reason: str) -> None:
    with pytest.raises(ModelError, match=rf"'org/model' .* at revision v2 \(.*{reason}.*check the name") as caught:
        find(Source(name="org/model", revision="v2"), hub=FailingHub(error))
    assert caught.value.__cause__ is error


def test_an_error_that_is_nobodys_fault_but_ours_is_not_dressed_up() -> None:
    with pytest.raises(ZeroDivisionError, match="ours"):
        find(Source(name="org/model"), hub=FailingHub(ZeroDivisionError("ours")))


# the real client, on a cache of its own


@pytest.mark.parametrize("local_files_only", [True, False], ids=["local_files_only", "HF_HUB_OFFLINE"])
@pytest.mark.parametrize(
    ("revision", "commit", "kind"),
    [
        pytest.param(None, COMMIT, "checkpoint", id="default branch"),
        pytest.param("main", COMMIT, "checkpoint", id="branch"),
        pytest.param("v1", OTHER_COMMIT, "onnx", id="tag"),
        pytest.param(OTHER_COMMIT, OTHER_COMMIT, "onnx", id="commit"),
    ],
)
def test_a_cached_model_is_found_without_the_network(
    hub_cache: Path, revision: str | None, commit: str, kind: str, local_files_only: bool
) -> None:
    assert constants.HF_HUB_OFFLINE
    source = Source(name="org/model", revision=revision, cache_dir=str(hub_cache), local_files_only=local_files_only)
    found = find(source)
    assert found.folder == hub_cache / "models--org--model" / "snapshots" / commit
    assert found.kind == kind
    assert (found.folder / "config.json").read_text(encoding="utf-8") == "config.json"
    assert found.graph is None or found.graph.read_text(encoding="utf-8") == "onnx/model.onnx"


@pytest.mark.parametrize("local_files_only", [True, False], ids=["local_files_only", "HF_HUB_OFFLINE"])
@pytest.mark.parametrize(
    ("name", "revision", "reason"),
    [
        pytest.param("org/model", "v9", "LocalEntryNotFoundError: Cannot find an appropriate cached", id="revision"),
        pytest.param("org/model", "c" * 40, "LocalEntryNotFoundError: Cannot find", id="commit"),
        pytest.param("org/model", "", r"IsADirectoryError: ", id="empty revision"),
        pytest.param("org/other", None, "LocalEntryNotFoundError: Cannot find an appropriate cached", id="model"),
        pytest.param("other", None, "LocalEntryNotFoundError: Cannot find an appropriate cached", id="no organisation"),
        pytest.param("org/mo del", None, "HFValidationError: Repo id must use alphanumeric", id="blank in the name"),
        pytest.param("org--model", None, "HFValidationError: Cannot have -- or", id="cache name"),
        pytest.param("x" * 5000, None, "HFValidationError: Repo id must use", id="name too long for a path"),
        pytest.param("org/m\0", None, "HFValidationError: Repo id must use", id="NUL"),
    ],
)
def test_what_is_not_cached_is_a_model_error_without_the_network(
    hub_cache: Path, name: str, revision: str | None, reason: str, local_files_only: bool
) -> None:
    source = Source(name=name, revision=revision, cache_dir=str(hub_cache), local_files_only=local_files_only)
    with pytest.raises(ModelError, match=rf"(?s)neither a local folder nor to be had from the Hub.*\({reason}"):
        find(source)


def test_a_snapshot_that_lacks_only_what_nobody_needs_is_enough(hub_cache: Path) -> None:
    know_the_tree(hub_cache, COMMIT, [*CONFIG, "model.safetensors", "pytorch_model.bin", "README.md"])
    source = Source(name="org/model", cache_dir=str(hub_cache), local_files_only=True)
    assert find(source).kind == "checkpoint"
    assert sorted(HubClient().files(source)) == sorted([*CONFIG, "model.safetensors"])


def test_a_snapshot_known_to_lack_a_needed_file_is_a_model_error(hub_cache: Path) -> None:
    know_the_tree(hub_cache, COMMIT, [*CONFIG, "model.safetensors", "vocab.txt"])
    with pytest.raises(ModelError, match=r"IncompleteSnapshotError: .* is incomplete: 1 file\(s\) are missing \(vocab"):
        find(Source(name="org/model", cache_dir=str(hub_cache), local_files_only=True))


def test_a_subfolder_of_a_cached_model_is_found(hub_cache: Path) -> None:
    source = Source(name="org/model", revision="v1", subfolder="onnx", cache_dir=str(hub_cache))
    assert find(source).graph == hub_cache / "models--org--model" / "snapshots" / OTHER_COMMIT / "onnx" / "model.onnx"


# the real client, with somebody else answering


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The client believes to be online; ``answer`` is what the Hub lists or raises, ``asked`` what it was asked."""
    state: dict[str, Any] = {"answer": [], "asked": []}

    class Api:
        def __init__(self, *, token: object) -> None:
            self.token = token

        def list_repo_files(self, name: str, *, revision: str | None) -> list[str]:
            state["asked"].append((name, revision, self.token))
            if isinstance(state["answer"], Exception):
                raise state["answer"]
            return list(state["answer"])

    stand_in = SimpleNamespace(HfApi=Api, snapshot_download=huggingface_hub.snapshot_download)
    monkeypatch.setattr(room, "huggingface_hub", stand_in)
    monkeypatch.setattr(room, "constants", SimpleNamespace(HF_HUB_OFFLINE=False))
    return state


def test_the_hub_is_asked_with_the_users_token_and_revision(online: dict[str, Any]) -> None:
    online["answer"] = ["a.json"]
    assert HubClient().files(Source(name="org/model", revision="v2", token="t")) == ["a.json"]
    assert online["asked"] == [("org/model", "v2", "t")]


def test_local_files_only_never_asks_the_hub(online: dict[str, Any], hub_cache: Path) -> None:
    online["answer"] = AssertionError("asked")
    assert find(Source(name="org/model", cache_dir=str(hub_cache), local_files_only=True)).kind == "checkpoint"
    assert not online["asked"]


def test_without_a_connection_the_cache_serves(online: dict[str, Any], hub_cache: Path) -> None:
    online["answer"] = errors.HTTPError("no route to host")
    assert find(Source(name="org/model", cache_dir=str(hub_cache))).kind == "checkpoint"
    with pytest.raises(ModelError, match="LocalEntryNotFoundError"):
        find(Source(name="org/other", cache_dir=str(hub_cache)))
    assert len(online["asked"]) == 2


def test_a_refusal_of_the_hub_is_not_covered_up_by_the_cache(online: dict[str, Any], hub_cache: Path) -> None:
    online["answer"] = response_error(errors.RepositoryNotFoundError, "404 not found")
    with pytest.raises(ModelError, match="RepositoryNotFoundError: 404 not found"):
        find(Source(name="org/model", cache_dir=str(hub_cache)))
