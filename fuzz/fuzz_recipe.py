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
NAMES = sorted({name for key in KEYS for name in (key.name, *key.values, *(inner.name for inner in key.keys))})
PIECES = (*SYNTAX.split(), *(f"\n{name}: " for name in NAMES), *NAMES, "\n  ", " ", "[", "]", ",", '"', "8", "~")
SPELLED = b"\1"  # no YAML begins with it: every byte after it is one of the pieces


def read(data: bytes) -> None:
    """Read a recipe twice."""
    if data.startswith(SPELLED):
        data = ("model: m\n" + "".join(PIECES[byte % len(PIECES)] for byte in data[1:])).encode()
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
    spelled = {"spelled": SPELLED + bytes(range(len(PIECES))), "spelled-short": SPELLED + b"\0"}
    drive(read, seeds={**shipped, **spelled, "every-key": EVERY_KEY}, words=PIECES)
