"""What runs of every engine are asked to keep: see test_openvino and test_cuda."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from conftest import text_of

from hf_bucket.errors import ProviderError

LATE_S = 120.0
TEXTS = [text_of(length, 3 * length) for length in (1, 5, 6, 13, 14, 3, 2, 30)]


def logits(runner: Any, texts: Sequence[str]) -> np.ndarray:
    """Return the logits of every text. Shape: (text, label)."""
    return np.stack([row["logits"] for row in runner(texts)])


def check_sixteen_threads(runner: Any, texts: Sequence[str], expected: np.ndarray) -> None:
    """Ask from many threads at once, some of them through a pickled copy."""

    def ask(number: int) -> None:
        which = pickle.loads(pickle.dumps(runner)) if number % 30 == 0 else runner
        chosen = [number % len(texts), (number * 3 + 1) % len(texts)]
        np.testing.assert_allclose(logits(which, [texts[one] for one in chosen]), expected[chosen], atol=1e-5)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(90)))


def _answer(runner: Any, texts: Sequence[str], end: Any) -> None:
    try:
        end.send(logits(runner, texts))
    except ProviderError as error:
        end.send(str(error))


def answer_of_a_child(runner: Any, texts: Sequence[str], method: str) -> np.ndarray | str:
    """Return what a child process computes with the runner, or why it cannot."""
    context = multiprocessing.get_context(method)
    ours, childs = context.Pipe()
    child = context.Process(target=_answer, args=(runner, texts, childs))
    child.start()
    if not ours.poll(LATE_S):
        child.kill()
        raise TimeoutError(f"a child that was made by {method} says nothing")
    got: np.ndarray | str = ours.recv()
    child.join(LATE_S)
    assert child.exitcode == 0
    return got
