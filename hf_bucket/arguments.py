"""What can be typed after ``hf-bucket``: commands, options, and how their values are read."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path
from typing import Any

from hf_bucket import __version__
from hf_bucket.errors import BucketError
from hf_bucket.overflow import make_overflow

MODES = ("shared", "static", "auto")
KINDS = ("text", "jsonl", "csv", "parquet")

EXAMPLES = """\
examples:
  hf-bucket plan --lengths 12,15,18,40,41,120 --n-buckets 3
  hf-bucket compile default --buckets 32,64,512 --output my-model
  hf-bucket inspect my-model
  echo "a dull, endless film" | hf-bucket predict my-model --kind text
  hf-bucket validate my-model --data texts.csv
  hf-bucket tune my-model
  hf-bucket eval --task sst2 --model MODEL --buckets 64,128 --data-dir GLUE
  hf-bucket cache

MODEL is an id on the Hugging Face Hub or a folder; "default" is the small English sentiment classifier in this package.
exit status: 0 all went well, 1 the job failed, 2 the command was wrong
"""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="hf-bucket",
        description="Run transformers classifiers at the right shape.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hf-bucket {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (_add_plan, _add_compile, _add_inspect, _add_validate, _add_tune, _add_predict, _add_eval, _add_cache):
        add(commands)
    return parser


Commands = Any  # argparse names the type of sub-parsers only in private


def _add_plan(commands: Commands) -> None:
    parser = commands.add_parser("plan", help="find the ladder that costs least on your lengths, and draw it")
    parser.add_argument("file", type=Path, nargs="?", help="text, JSONL, CSV or parquet file: texts, or token counts")
    parser.add_argument("--lengths", type=counts, help="token counts with commas, instead of a file")
    parser.add_argument("--dataset", help="data set on the Hub, instead of a file")
    parser.add_argument("--config", help="configuration of the data set, such as mrpc of nyu-mll/glue")
    parser.add_argument("--split", default="train", help="split of the data set (default: train)")
    parser.add_argument("--kind", choices=KINDS, help="of the file (default: by suffix)")
    _add_columns(parser)
    parser.add_argument("--tokenizer", metavar="MODEL", help="model whose tokenizer counts tokens; texts need one")
    parser.add_argument("--model", help="plan batch sizes too, by what runs of this model cost on this machine")
    n_buckets = "lengths, or with --model buckets, the ladder may have (default: 8)"
    parser.add_argument("--n-buckets", type=count, default=8, help=n_buckets)
    parser.add_argument(
        "--batch-sizes", type=counts, help="such as 1,8 (the default); with --model those to choose from"
    )
    parser.add_argument("--window", type=count, help="rows that run together, with --model (default: 1024)")
    parser.add_argument("--memory", type=size_bytes, help="that the largest bucket may compute in, such as 2GB")
    parser.add_argument("--compile-seconds", type=difference, help="that compiling all buckets may take")
    parser.add_argument("--seconds", type=difference, help="to spend on measuring, about (default: 2)")
    parser.add_argument("--max-length", type=count, help="tokens the ladder must hold (default: the longest row)")
    parser.add_argument("--chart", type=Path, metavar="FILE.png", help="draw the plan as PNG or SVG")
    _add_output_flags(parser)
    parser.set_defaults(command="plan")


def _add_compile(commands: Commands) -> None:
    parser = commands.add_parser("compile", help="compile a model for a ladder and check every bucket against torch")
    parser.add_argument("model", nargs="?", help="Hub id, folder, or default")
    parser.add_argument("--recipe", type=Path, help="take everything from a recipe instead")
    parser.add_argument("--output", type=Path, help="folder to write (default: the cache only)")
    _add_source(parser)
    parser.add_argument("--buckets", type=buckets, help="such as 64,128 or 8x64,1x128 or auto or pow2")
    parser.add_argument(
        "--batch-sizes", type=batch_sizes, help="such as 1,8 (the default), or auto: as planned for here"
    )
    parser.add_argument(
        "--n-buckets", type=count, default=8, help="lengths, or with --batch-sizes auto buckets, for auto"
    )
    parser.add_argument("--calibration", type=Path, help="file of texts for auto and int8; auto takes token counts too")
    quantize = "int8: eight-bit products, calibrated; int8-dynamic: a text's answer depends on its neighbours"
    parser.add_argument("--quantize", choices=("int8", "int8-dynamic"), help=quantize)
    _add_columns(parser)
    parser.add_argument("--verbose", action="store_true", help="let the exporters talk")
    leak = "compile a model even though padding changes its own answer in torch; by how much is recorded"
    parser.add_argument("--allow-padding-leak", action="store_true", help=leak)
    _add_output_flags(parser)
    parser.set_defaults(command="compile")


def _add_inspect(commands: Commands) -> None:
    parser = commands.add_parser("inspect", help="say what an artifact holds and how it compared with torch")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.set_defaults(command="inspect")


def _add_validate(commands: Commands) -> None:
    parser = commands.add_parser("validate", help="certify every bucket against torch, on your texts or on the probes")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--data", type=Path, help="text, JSONL, CSV or parquet file of texts (default: the probes)")
    parser.add_argument("--kind", choices=KINDS, help="of the data (default: by suffix)")
    _add_columns(parser)
    parser.add_argument("--label-column", help="column of the model's label, for accuracy")
    parser.add_argument("--limit", type=count, help="rows of the data to use, from the first")
    parser.add_argument("--checkpoint", metavar="MODEL", help="compare with it (default: what was compiled, if here)")
    atol = "allowed difference of a logit, more for logits above 1 (default: 1e-4 for float32)"
    parser.add_argument("--atol", type=difference, help=atol)
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.set_defaults(command="validate")


def _add_predict(commands: Commands) -> None:
    parser = commands.add_parser("predict", help="label every row of a file, in order, losing none")
    parser.add_argument("model", nargs="?", help="artifact, Hub id, folder, or default")
    parser.add_argument("--recipe", type=Path, help="take the model from a recipe; options given here win")
    parser.add_argument("--input", type=Path, help="file to read (default: standard input)")
    parser.add_argument("--kind", choices=KINDS, help="of the input (default: by suffix)")
    parser.add_argument("--output", type=Path, help="file to write (default: standard output)")
    parser.add_argument("--csv", action="store_true", help="write CSV instead of JSONL")
    _add_columns(parser)
    _add_source(parser)
    parser.add_argument("--buckets", type=buckets, help="for a model that is no artifact, as in compile")
    parser.add_argument("--batch-sizes", type=counts, help="for a model that is no artifact, as in compile")
    parser.add_argument("--top-k", type=count, help="labels per row, best first (default: the best alone)")
    parser.add_argument("--overflow", type=overflow, help="truncate (default), error, window, dynamic; with options")
    parser.add_argument("--mode", choices=MODES, help="how weights are held (default: shared)")
    parser.add_argument("--provider", help="onnxruntime execution provider (default: auto)")
    parser.add_argument("--window", type=count, default=1024, help="rows read ahead (default: 1024)")
    _add_output_flags(parser)
    parser.set_defaults(command="predict")


def _add_tune(commands: Commands) -> None:
    parser = commands.add_parser("tune", help="measure what every bucket costs on this machine, and keep it")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--seconds", type=difference, default=10.0, help="to spend, about (default: 10)")
    parser.add_argument("--mode", choices=MODES, default="shared", help="auto compares the two (default: shared)")
    parser.add_argument("--provider", default="auto", help="onnxruntime execution provider (default: auto)")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.set_defaults(command="tune")


def _add_eval(commands: Commands) -> None:
    parser = commands.add_parser("eval", help="compare torch, transformers' pipeline and buckets on labelled data")
    parser.set_defaults(command="eval")
    add = parser.add_argument
    add("--recipe", type=Path, help="take model, buckets and task from a recipe; options given here win")
    add("--task", type=glue_task, help="a task of GLUE, such as sst2")
    add("--data", type=Path, help="a labelled file of your own, instead of a task: text, JSONL, CSV or parquet")
    add("--column", default="text", help="column of the text, with --data (default: text)")
    add("--pair-column", help="column of the second text of a pair, with --data")
    add("--label-column", default="label", help="column of the model's label, with --data (default: label)")
    add("--model", help="checkpoint on the Hub or in a folder, or default")
    add("--buckets", type=buckets, help="lengths such as 64,128, or auto, or pow2")
    add("--batch-sizes", type=counts, help="such as 1,8")
    add("--n-buckets", type=count, help="how many lengths to plan, with --buckets auto")
    add("--split", help="one split, or several joined by +; MNLI's validation (the default) is both halves")
    add("--data-dir", type=Path, help="folder with <task>/<split>.parquet, .csv or .jsonl, instead of the Hub")
    add("--limit", type=count, help="rows of each split to use, from the first")
    add("--rounds", type=count, help="times every system runs, in turns (default 3)")
    add("--label-order", type=names, help="the task's labels in the model's order, such as neutral,entailment,...")
    add("--quantize", choices=("int8", "int8-dynamic"), help="of the bucketed model, as in compile")
    add("--mode", help="how the bucketed model holds its weights, shared, static or auto")
    add("--provider", help="onnxruntime execution provider")
    add("--revision", help="branch, tag or commit of the model")
    add("--pipeline-batch-size", type=count, default=32, help="of the pipeline and of sorted torch (default 32)")
    add("--output", type=Path, metavar="FILE.json", help="write the result as JSON")
    add("--chart", type=Path, metavar="FILE.png", help="draw the result as PNG or SVG")
    add("--force", action="store_true", help="replace --output and --chart if they exist")
    add("--json", action="store_true", help="print JSON instead of the table")


def _add_cache(commands: Commands) -> None:
    parser = commands.add_parser("cache", help="list the compiled models on this machine, or remove them")
    parser.add_argument("--clear", action="store_true", help="remove them all")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.set_defaults(command="cache")


def _add_columns(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--column", help="column that holds the text")
    parser.add_argument("--pair-column", help="column that holds the second text of a pair")


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--subfolder", default="", help="folder inside the repository")
    parser.add_argument("--local-files-only", action="store_true", help="never ask the network")
    parser.add_argument("--trust-remote-code", action="store_true", help="run model code from the repository")


def _add_output_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="replace output files that exist")
    parser.add_argument("--json", action="store_true", help="print JSON on standard output and nothing else there")


def glue_task(text: str) -> str:
    """Return the name of a GLUE task."""
    from hf_bucket.glue import get_glue_task

    try:
        return get_glue_task(text).name
    except BucketError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def counts(text: str) -> list[int]:
    """Return a list of counts written with commas."""
    return [count(part) for part in text.split(",")]


def batch_sizes(text: str) -> list[int] | str:
    """Return ``auto`` or batch sizes."""
    return text if text == "auto" else counts(text)


def size_bytes(text: str) -> int:
    """Return a number of bytes, written as such or in units of a thousand or of 1,024."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([kMGT]?)(i?)B)?", text.strip())
    size = float(found[1]) * (1024 if found[3] else 1000) ** " kMGT".index(found[2] or " ") if found else 0.0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 2GB, 500MB or 1.5GiB")
    return int(size)


def count(text: str) -> int:
    """Return a whole number of at least 1."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def overflow(text: str) -> str:
    """Return the spelling of an overflow policy that exists."""
    try:
        return str(make_overflow(text))
    except BucketError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def difference(text: str) -> float:
    """Return a finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


def names(text: str) -> list[str]:
    """Return a list of names written with commas."""
    return [part.strip() for part in text.split(",")]


def buckets(text: str) -> list[int] | list[tuple[int, int]] | str:
    """Return ``auto``, ``pow2``, lengths, or (batch_size, length) pairs."""
    if text in ("auto", "pow2"):
        return text
    if not re.fullmatch(r"\d+x\d+(,\d+x\d+)*", text):
        return counts(text)
    pairs = [part.split("x") for part in text.split(",")]
    return [(count(batch), count(length)) for batch, length in pairs]
