"""Fuzzes the manifest reader: any bytes are a manifest that is written back equal, or an ArtifactError."""

from __future__ import annotations

import json

import atheris
from drive import drive

with atheris.instrument_imports(include=["hf_bucket"]):
    from hf_bucket.errors import ArtifactError
    from hf_bucket.manifest import MANIFEST, Manifest

from test_manifest import MANIFEST_OF_ALL_PARTS, walk

WRITTEN = MANIFEST_OF_ALL_PARTS.to_json()


def read(data: bytes) -> None:
    """Read a manifest, write it, and read that."""
    try:
        manifest = Manifest.from_json(data.decode("utf-8", "surrogatepass"))
    except UnicodeDecodeError:  # what open_artifact says about such a file is tested in tests/test_fuzz.py
        return
    except ArtifactError as error:
        assert MANIFEST in str(error)
        return
    written = manifest.to_json()
    assert Manifest.from_json(written) == manifest
    assert Manifest.from_json(written).to_json() == written


if __name__ == "__main__":
    values = [value for _, value in walk(json.loads(WRITTEN)) if not isinstance(value, (dict, list))]
    keys = {str(path[-1]) for path, _ in walk(json.loads(WRITTEN))}
    words = {json.dumps(value) for value in [*values, *keys, "\ud800", "..", None, -1, 1e308, 2**63, [], {}]} | {
        "NaN",
        "1e999",
    }
    unguarded = {key: value for key, value in json.loads(WRITTEN).items() if key != "sha256"}
    small = json.dumps(unguarded, separators=(",", ":")).encode()
    indented = json.dumps(unguarded, indent=2).encode()
    seeds = {"written": WRITTEN.encode(), "indented": indented, "small": small}
    drive(read, seeds=seeds, words=sorted(words))
