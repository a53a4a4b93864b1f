"""Where an ONNX file keeps its weights: read from its bytes, before any library follows the names in it."""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

from hf_bucket.errors import ArtifactError

# Fields of onnx.proto3 on the way from a model to the names of its weights' files; all other fields are skipped.
_CHILDREN: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_NUMBER, _EIGHT_BYTES, _BYTES, _GROUP, _END_GROUP, _FOUR_BYTES = range(6)  # wire types of protobuf

_MAPPED_BYTES = 1 << 24  # larger files hold weights and are not read whole; smaller ones are read faster in one go
_Content: TypeAlias = bytes | mmap.mmap


class _NotProtobufError(ValueError):
    pass


def check_external_data(graph: Path) -> set[str]:
    """Return the names of the files that a graph takes weights from, if all lie beside it.

    "Beside" means below the graph's folder; for a graph that is a link, as in the Hub's cache, below the folder of the
    file it links to. A file that is no ONNX graph at all passes: it names no files, and whoever loads it refuses it.

    Raises:
        ArtifactError: a name is absolute or leads elsewhere, by ``..`` or through a link, or means no regular file.
    """
    places = {Path(os.path.realpath(folder)) for folder in (graph.parent, Path(os.path.realpath(graph)).parent)}
    names = set(external_names(graph))
    for name in sorted(names):
        _check_name(graph, name, places)
    return names


def _check_name(graph: Path, name: str, places: set[Path]) -> None:
    if name.startswith(("/", "\\")) or ":" in name or "\0" in name:
        raise ArtifactError(
            f"{graph} keeps weights in {name!r}, which is no path inside its folder; do not trust it, or export the "
            f"model again with the weights beside it"
        )
    real = Path(os.path.realpath(graph.parent / name))
    if not any(place in real.parents for place in places):
        raise ArtifactError(
            f"{graph} keeps weights in {name!r}, which leads out of its folder to {real}; do not trust it, or copy the "
            f"file into the folder"
        )
    try:
        regular = stat.S_ISREG(real.stat().st_mode)
    except OSError as error:
        raise ArtifactError(f"{graph} keeps weights in {name!r}, which cannot be read ({error.strerror})") from error
    if not regular:
        raise ArtifactError(f"{graph} keeps weights in {name!r}, which is not a regular file; do not trust it")


def external_names(graph: Path) -> set[str]:
    """Return the names of the files that a graph takes weights from, as they are written in it."""
    with graph.open("rb") as file:
        if os.fstat(file.fileno()).st_size < _MAPPED_BYTES:
            return _names_in(file.read())
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _names_in(content)


def _names_in(content: _Content) -> set[str]:
    try:
        return set(_locations(content))
    except _NotProtobufError:
        return set()


def _locations(content: _Content) -> Iterator[str]:
    """Yield every ``location`` among the external data of a model's tensors, however deep."""
    open_messages = [("model", 0, len(content))]
    while open_messages:
        kind, start, end = open_messages.pop()
        for field, first, last in _fields(content, start, end):
            child = _CHILDREN[kind].get(field)
            if child is None:
                continue
            if child == "entry":
                entry = {number: content[a:b] for number, a, b in _fields(content, first, last)}
                if entry.get(1) == b"location":
                    yield entry.get(2, b"").decode("utf-8", "surrogateescape")
            else:
                open_messages.append((child, first, last))


def _fields(content: _Content, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield number, first byte and end of every field of one message that holds bytes, unpacked groups left out."""
    position, groups = start, 0
    while position < end:
        tag, position = content[position], position + 1
        if tag >= 0x80:
            tag, position = _number(content, position - 1, end)
        wire = tag & 7
        if wire == _BYTES:
            size, first = _number(content, position, end)
            position = first + size
            if position <= end and not groups:
                yield tag >> 3, first, position
        elif wire == _NUMBER:
            _, position = _number(content, position, end)
        elif wire in (_EIGHT_BYTES, _FOUR_BYTES):
            position += 8 if wire == _EIGHT_BYTES else 4
        elif wire == _GROUP:
            groups += 1
        elif wire == _END_GROUP and groups:
            groups -= 1
        else:
            raise _NotProtobufError
    if position > end:
        raise _NotProtobufError


def _number(content: _Content, position: int, end: int) -> tuple[int, int]:
    """Return a number of 7 bits per byte, and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= end:
            raise _NotProtobufError
        byte = content[position]
        position += 1
        if byte < 0x80:
            return value | byte << shift, position
        value |= (byte & 0x7F) << shift
    raise _NotProtobufError
