"""Fuzzes the recipe reader: any file is a recipe, the same when read again, or a RecipeError that names the file."""

from __future__ import annotations

import tempfile
from pathlib import Path

import atheris
from drive import ROOT, drive

with atheris.instrument_imports(include=["hf_bucket"]):
    from hf_bucket.errors import RecipeError
    from hf_bucket.recipe import KEYS, read_recipe

EVERY_KEY = b"""model: m
task: sentiment-analysis
revision: '7'
buckets: [[1, 64], [8, 128]]
calibration: {dataset: d, config: c, split: s, column: a, pair_column: b}
overflow: truncate
mode: static
provider: P
output: ~/out
evaluate:
  glue: mnli
  data_dir: data
  rounds: 9
  label_order: [b, "a\\u00e4"]
"""
SYNTAX = """!!str !!int !!seq !!map !!binary !!python/object:os.x &a *a &b *b << ? | > --- ... %YAML [*a,*a] [*b,*b] 
"\\0" "~\\0" "\\ud800" "~\\ud800" "\\UFFFFFFFF" ~root/ ~nobody 0x10 0o7 1_000 .inf .nan 2020-01-01 null true '' "" # @ `
{} []"""

FOLDER = tempfile.TemporaryDirectory(prefix="fuzz-recipe-")
PATH = Path(FOLDER.name) / "x.yaml"
LINES = [f"{key.name}: " for key in KEYS[1:]] + [f"  {inner.name}: " for key in KEYS for inner in key.keys]
VALUES = [*SYNTAX.split(), *(value for key in KEYS for value in key.values), "8", "[8, 16]", "[[1, 8]]", "text", ""]
SPELLED = b"\1"  # no YAML begins with it: of every two bytes after it one says the key and one the value of a line


def read(data: bytes) -> None:
    """Read a recipe twice."""
    if data.startswith(SPELLED):
        pairs = zip(data[1::2], data[2::2], strict=False)
        lines = (f"{LINES[key % len(LINES)]}{VALUES[value % len(VALUES)]}\n" for key, value in pairs)
        data = ("model: m\n" + "".join(lines)).encode()
    PATH.write_bytes(data)
    try:
        recipe = read_recipe(PATH)
    except RecipeError as error:
        assert str(error).startswith(f"{PATH}")
        assert len(str(error)) < 2_000
        return
    assert read_recipe(PATH) == recipe


if __name__ == "__main__":
    shipped = {path.name: path.read_bytes() for path in (ROOT / "recipes").glob("*.yaml")}
    spelled = {f"line-{number}": SPELLED + bytes([number, number]) for number in range(len(LINES))}
    words = [*LINES, *filter(None, VALUES)]
    drive(read, seeds={**shipped, "every-key": EVERY_KEY, **spelled}, words=words)
