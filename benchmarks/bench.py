"""hf_bucket and its rivals over the same texts in turns: strings in, labels out, end to end.

    python benchmarks/bench.py --data mrpc,sst2 --checkpoints minilm

Every system runs in a process and an environment of its own, and only one runs at a time. A data set that has a result
already is not measured again without ``--again``. A system that cannot be measured is listed with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from bench_data import CHECKPOINT_OF, DATA_SETS, Sizes, lengths_of, open_tokenizer
from bench_figures import Reference, Work, figures, table
from bench_report import draw, write_page
from bench_systems import OURS, REFERENCE, ROOT, SYSTEMS, Place, System, WorkerError
from bench_turns import Progress, Request, Say, Start, Turns
from record import circumstances, without_folders

from hf_bucket.session_ort import usable_cores

SCHEMA_VERSION = 1
ASSETS = "HF_BUCKET_TEST_ASSETS"
CHECKPOINTS = ("minilm", "bert-base", "default")


def measure(
    request: Request, systems: Sequence[System], start: Start, *, reserve_bytes: int = 0, say: Say
) -> dict[str, Any]:
    """Return the result of one data set with one model, without its circumstances.

    Raises:
        WorkerError: the reference, or the machine's own speed, cannot be measured.
    """
    request.write_texts()
    before = matrix_product(start)
    reference = refer(request, start)
    turns = Turns(request, systems, start, reserve_bytes=reserve_bytes, say=say)
    measured = turns.run()
    after = matrix_product(start)
    peak = {library: max(gflops, after[library]) for library, gflops in before.items()}
    sizes = Sizes.of(request.model)
    work = Work(
        texts=len(request.lengths),
        tokens=sum(request.lengths),
        flops=sizes.flops(request.lengths),
        peak_gflops=max(peak.values()),
    )
    ours = measured.get(OURS)
    return {
        "peak_gflops": peak,
        "real_tokens": work.tokens,
        "useful_gflop": work.flops / 1e9,
        "sizes": asdict(sizes),
        "systems": {
            name: {
                "environment": system.environment or "project",
                "options": dict(system.options),
                **figures(measured[name], ours, reference=reference, work=work),
            }
            for name, system in ((system.name, system) for system in systems)
            if name in measured
        },
        "not_measured": turns.failures,
    }


def matrix_product(start: Start) -> dict[str, float]:
    """Return the machine's speed in GFLOP/s, by library."""
    worker = start(REFERENCE)
    try:
        gflops: dict[str, float] = worker.ask("peak", size=2048, repeats=10, threads=usable_cores())["gflops"]
    finally:
        worker.close()
    return gflops


def refer(request: Request, start: Start) -> Reference:
    """Return what plain torch says, one text at a time."""
    path = request.texts_path.with_name("reference.npy").absolute()
    worker = start(REFERENCE)
    try:
        worker.ask("load", **request.job(REFERENCE))
        worker.ask("verify", path=str(path))
        labels = worker.ask("run")["labels"]
    finally:
        worker.close()
    return Reference(logits=np.load(path), labels=tuple(labels))


def is_done(path: Path, *, systems: Sequence[str], settings: Mapping[str, Any]) -> bool:
    """Return whether a file holds the result of these systems with these settings.

    Raises:
        ValueError: it holds another.
    """
    if not path.exists():
        return False
    result = json.loads(path.read_text(encoding="utf-8"))
    found = {name: result.get(name) for name in settings}
    missing = set(systems) - set(result["systems"]) - set(result["not_measured"])
    if found == dict(settings) and not missing:
        return True
    what = f"with {found}" if found != dict(settings) else f"without {', '.join(sorted(missing))}"
    raise ValueError(f"{path} was measured {what}; pass --again to replace it, or --results for another folder")


def single_rows(n: int, wanted: int, seed: int) -> tuple[int, ...]:
    """Return ``wanted`` rows of ``n``, or all of them, always the same."""
    return tuple(random.Random(seed).sample(range(n), min(n, wanted)))


def command(argv: Sequence[str]) -> str:
    """Return what was typed, with folders of this project relative to it and no others."""
    words = [word.replace(f"{ROOT}{os.sep}", "") for word in argv]
    return str(without_folders(shlex.join(["python", *words])))


def model_folder(arguments: argparse.Namespace, name: str, data: str, place: Place) -> Path:
    """Return the folder of a checkpoint; BERT-base is made on the fly."""
    tuned: Path = arguments.models / CHECKPOINT_OF[data]
    if name == "default":
        return ROOT / "hf_bucket" / "default"
    if name == "minilm":
        return tuned
    folder = place.build / "models" / f"bert-base-{tuned.name}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        print(f"making {folder.name}", file=sys.stderr)
        worker = place.start(REFERENCE)
        try:
            worker.ask("random", like=str(tuned.absolute()), folder=str(folder.absolute()))
        finally:
            worker.close()
    return folder


def request_of(arguments: argparse.Namespace, data: str, checkpoint: str, place: Place) -> Request:
    """Read the data and tokenise them for their lengths."""
    model = model_folder(arguments, checkpoint, data, place)
    tokenizer = open_tokenizer(model)
    texts = DATA_SETS[data](arguments.data_dir, arguments.limit, tokenizer)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    max_length = min(512, int(config["max_position_embeddings"]))
    return Request(
        data=texts,
        model=model,
        model_name=checkpoint,
        max_length=max_length,
        lengths=tuple(lengths_of(tokenizer, texts.texts, max_length=max_length)),
        rounds=arguments.rounds,
        single_rows=single_rows(len(texts.texts), arguments.singles, arguments.seed),
        again=arguments.again,
        seed=arguments.seed,
        build=place.build,
    )


def bench(arguments: argparse.Namespace, systems: Sequence[System], data: str, checkpoint: str, place: Place) -> None:
    """Measure one data set with one model, unless that was done, and write the result and its chart."""
    path = arguments.results / f"bench-{data}-{checkpoint}.json"
    settings = {"limit": arguments.limit, "rounds": arguments.rounds, "seed": arguments.seed}
    names = [system.name for system in systems]
    if not arguments.again and is_done(path, systems=names, settings=settings):
        print(f"[{data}, {checkpoint}] measured already: {path}; --again measures it again", file=sys.stderr)
        return
    request = request_of(arguments, data, checkpoint, place)
    before = circumstances()
    say = Progress(f"{data}, {checkpoint}", len(systems), arguments.rounds)
    measured = measure(request, systems, place.start, reserve_bytes=int(arguments.reserve_gb * 1e9), say=say)
    result = {
        "schema_version": SCHEMA_VERSION,
        "set": data,
        "model": checkpoint,
        **before,
        "command": command(sys.argv),
        **settings,
        "n": len(request.lengths),
        "max_length": request.max_length,
        **measured,
    }
    result = without_folders(result)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(aside, path)
    print(f"{data}, {checkpoint}\n\n{table(result)}\n")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments, with what is missing from the environment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=",".join(DATA_SETS), help="data sets, with commas (default: %(default)s)")
    parser.add_argument("--checkpoints", default="minilm,bert-base", help=f"of {', '.join(CHECKPOINTS)}")
    parser.add_argument("--only", action="append", help="system, or the beginning of some; may be given repeatedly")
    parser.add_argument("--without", action="append", help="as --only, of systems to leave out")
    parser.add_argument("--limit", type=int, help="texts of every data set (default: all)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--singles", type=int, default=100, help="single requests in all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of systems")
    parser.add_argument("--again", action="store_true", help="measure, and export, what was done already")
    parser.add_argument("--models", type=Path, help=f"folder of the checkpoints (default: ${ASSETS}/models)")
    parser.add_argument("--data-dir", type=Path, help=f"folder with glue/ and longtail/ (default: ${ASSETS}/data)")
    parser.add_argument("--environments", type=Path, default=ROOT / "build" / "bench", help="of the rivals")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "bench", help="for exports, logs, models")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--page", type=Path, help="Markdown page to put all results into")
    parser.add_argument("--reserve-gb", type=float, default=6.0, help="memory to keep free (default: %(default)s)")
    parser.add_argument("--timeout-s", type=float, default=3600.0, help="for one pass (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="list the systems and stop")
    arguments = parser.parse_args(argv)
    for name, known in (("data", tuple(DATA_SETS)), ("checkpoints", CHECKPOINTS)):
        values = [value for value in getattr(arguments, name).split(",") if value]
        if set(values) - set(known):
            parser.error(f"--{name} is {','.join(values)}; use some of {', '.join(known)}")
        setattr(arguments, name, values)
    for name in ("limit", "rounds"):
        if (getattr(arguments, name) or 1) < 1 or getattr(arguments, name) == 0:
            parser.error(f"--{name} is {getattr(arguments, name)}; it must be at least 1")
    for name, folder in (("models", "models"), ("data_dir", "data")):
        if getattr(arguments, name) is None and not arguments.list and arguments.data:
            if ASSETS not in os.environ:
                parser.error(f"set {ASSETS} to the folder with models/ and data/, or pass --models and --data-dir")
            setattr(arguments, name, Path(os.environ[ASSETS]) / folder)
    return arguments


def chosen(only: Sequence[str] | None, without: Sequence[str] | None = None) -> list[System]:
    """Return the systems whose names begin as one of ``only`` does, all without it, but for those of ``without``.

    Raises:
        ValueError: one of them is no beginning.
    """
    for beginning in (*(only or ()), *(without or ())):
        if not any(system.name.startswith(beginning) for system in SYSTEMS):
            raise ValueError(f"no system begins with {beginning!r}; they are {'; '.join(one.name for one in SYSTEMS)}")
    wanted = [one for one in SYSTEMS if only is None or one.name.startswith(tuple(only))]
    return [one for one in wanted if not one.name.startswith(tuple(without or ()))]


def main() -> int:
    arguments = parse()
    try:
        systems = chosen(arguments.only, arguments.without)
        if arguments.list:
            print("\n".join(system.name for system in systems))
            return 0
        place = Place(environments=arguments.environments, build=arguments.build, timeout_s=arguments.timeout_s)
        if arguments.again and place.cache.exists():  # what an older commit compiled would be measured otherwise
            shutil.rmtree(place.cache)
        for checkpoint in arguments.checkpoints:
            for data in arguments.data:
                bench(arguments, systems, data, checkpoint, place)
        results = sorted(arguments.results.glob("bench-*-*.json"))
        for path in results:
            draw(json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".png"))
        if arguments.page:
            write_page(results, arguments.page)
    except (ValueError, OSError, WorkerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
