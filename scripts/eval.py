"""Evaluate a bucketed model on a GLUE task beside torch and transformers' pipeline.

python scripts/eval.py --task mrpc --model org/model --buckets 64,128

Exit status: 0 when all labels are torch's, 1 when a label flipped or the evaluation failed, 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_bucket.errors import BucketError
from hf_bucket.evaluate import EvalReport, EvalRequest
from hf_bucket.glue import GLUE_TASKS, evaluate


def main(arguments: Sequence[str]) -> int:
    """Evaluate, print, write; return the exit status."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.output is not None and options.output.exists() and not options.force:
        parser.error(f"{options.output} exists; give another --output, or --force to replace it")
    if options.output is not None and not options.output.absolute().parent.is_dir():
        parser.error(f"{options.output.parent} is not a folder; make it first")
    try:
        report = evaluate(make_request(options, arguments), say=say)
    except BucketError as error:
        say(f"error: {error}")
        return 1
    text = json.dumps(report.to_json(), indent=2, allow_nan=False)
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")
    print(text if options.json else report.table())
    return verdict(report)


def verdict(report: EvalReport) -> int:
    """Say which labels flipped, if any, and return the exit status."""
    if not report.failed:
        return 0
    rows = report.bucketed.flipped_rows
    say(
        f"error: {len(rows)} of {report.n} labels differ from torch's without padding, in rows "
        f"{', '.join(map(str, rows[:10]))}{' ...' if len(rows) > 10 else ''}; "
        f"{report.bucketed.truncated} rows were cut to fit the largest bucket"
    )
    return 1


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="eval.py", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--task", required=True, choices=[task.name for task in GLUE_TASKS])
    add("--model", required=True, help="checkpoint on the Hub or in a folder")
    add("--buckets", required=True, type=buckets, help="lengths such as 64,128, or auto, or pow2")
    add("--batch-sizes", type=counts, help="such as 1,8")
    add("--n-buckets", type=count, help="how many lengths to plan, with --buckets auto")
    add("--split", default="validation", help="one split, or several joined by +; MNLI's validation is both halves")
    add("--data-dir", type=Path, help="folder with <task>/<split>.parquet, .csv or .jsonl, instead of the Hub")
    add("--limit", type=count, help="rows of each split to use, from the first")
    add("--rounds", type=count, default=3, help="times every system runs, in turns (default 3)")
    add("--label-order", type=names, help="the task's labels in the model's order, such as neutral,entailment,...")
    add("--mode", help="how the bucketed model holds its weights, such as shared or static")
    add("--provider", help="onnxruntime execution provider")
    add("--revision", help="branch, tag or commit of the model")
    add("--pipeline-batch-size", type=count, default=32, help="of transformers' pipeline (default 32)")
    add("--output", type=Path, metavar="FILE.json", help="write the result as JSON")
    add("--force", action="store_true", help="replace --output if it exists")
    add("--json", action="store_true", help="print JSON instead of the table")
    return parser


def make_request(options: argparse.Namespace, arguments: Sequence[str]) -> EvalRequest:
    """Return what was asked for as one value."""
    fields = {name: value for name, value in vars(options).items() if name not in ("output", "force", "json")}
    return EvalRequest(**fields, command=shlex.join(["python", "scripts/eval.py", *arguments]))


def buckets(text: str) -> list[int] | str:
    """Return ``auto``, ``pow2`` or a list of lengths."""
    return text if text in ("auto", "pow2") else counts(text)


def counts(text: str) -> list[int]:
    """Return a list of counts written with commas."""
    return [count(part) for part in text.split(",")]


def count(text: str) -> int:
    """Return a whole number of at least 1."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def names(text: str) -> list[str]:
    """Return a list of names written with commas."""
    return [part.strip() for part in text.split(",")]


def say(line: str) -> None:
    """Print a line on stderr."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
