"""Runs a target under atheris. Seeds, new inputs and finds lie in build/fuzz/<target>; a find is kept as crash-*.

An input may take MOST_CPU_S; of one that hangs the stack is printed, and it lies in build/fuzz/<target>/hung.

python fuzz/fuzz_recipe.py -runs=100000           as ``make fuzz`` does; any option of libFuzzer
python fuzz/fuzz_recipe.py build/fuzz/recipe/crash-...      one input again
"""

from __future__ import annotations

import faulthandler
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # for the fakes and the examples that tests use

MOST_CPU_S = 5.0  # a hundred times what an input of 4 kB takes; not by the clock, which a busy machine stops
HUNG_S = 300.0
# libFuzzer's own timeout is out of reach: atheris allocates memory in its signal handler, and may hang there.
LIMITS = ("-timeout=3600", "-rss_limit_mb=4096", "-max_len=4096", "-print_final_stats=1")


def drive(target: Callable[[bytes], None], *, seeds: Mapping[str, bytes], words: Iterable[str] = ()) -> None:
    """Call ``target`` with ever new bytes until it raises or the runs are done; ends the process.

    Args:
        target: raises on a find; what it returns is ignored.
        seeds: by name, inputs to begin with.
        words: pieces to put into inputs, such as keywords.
    """
    folder = ROOT / "build" / "fuzz" / Path(sys.argv[0]).stem.removeprefix("fuzz_")
    corpus, seeds_folder, dictionary = folder / "corpus", folder / "seeds", folder / "words.dict"
    for path in (corpus, seeds_folder):
        path.mkdir(parents=True, exist_ok=True)
    for name, content in seeds.items():
        (seeds_folder / name).write_bytes(content)
    escaped = ("".join(f"\\x{byte:02x}" for byte in word.encode()) for word in words)
    dictionary.write_text("".join(f'"{word}"\n' for word in escaped), encoding="ascii")
    options = [f"-artifact_prefix={folder}/", f"-dict={dictionary}", *LIMITS]
    inputs = [] if any(not argument.startswith("-") for argument in sys.argv[1:]) else [str(corpus), str(seeds_folder)]

    def limited(data: bytes) -> None:
        hung.seek(0)
        hung.truncate()
        hung.write(data)
        faulthandler.dump_traceback_later(HUNG_S, exit=True)
        start = time.process_time()
        target(data)
        took_s = time.process_time() - start
        faulthandler.cancel_dump_traceback_later()
        if took_s > MOST_CPU_S:
            raise TimeoutError(f"{len(data)} bytes took {took_s:.1f} s of CPU time, expected at most {MOST_CPU_S}")

    with (folder / "hung").open("wb", buffering=0) as hung:
        atheris.Setup([sys.argv[0], *options, *sys.argv[1:], *inputs], limited)
        atheris.Fuzz()
