"""From first use to the last: threads, copies, child processes, closing and the end; the answers stay the same."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, fake_artifact, fake_engine, text_of
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

import hf_bucket
from hf_bucket import BucketedModelForSequenceClassification, DataCollatorWithBucketing
from hf_bucket.artifact import copy_artifact
from hf_bucket.errors import ArtifactError
from hf_bucket.ladder import make_ladder
from hf_bucket.runner import Runner
from hf_bucket.session import FakeSession

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

BUCKETS = {"buckets": [8, 16, 64], "batch_sizes": [1, 4]}
LATE_S = 120.0


@pytest.fixture(scope="module")
def model(tiny_bert: Path) -> BucketedModelForSequenceClassification:
    return BucketedModelForSequenceClassification.from_pretrained(tiny_bert, **BUCKETS)


@pytest.fixture(scope="module")
def tokenizer(tiny_bert: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_bert)


@pytest.fixture(scope="module")
def saved(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_artifact(model.runner.artifact, tmp_path_factory.mktemp("saved") / "model").folder


def requests(n: int) -> list[list[str]]:
    """Requests of 1 to 5 texts of mixed lengths, the same at every call."""
    chance = random.Random(0)
    return [[text_of(chance.randint(0, 60), chance.randint(0, 80)) for _ in range(seed % 5 + 1)] for seed in range(n)]


def logits(runner: Any, texts: list[str]) -> np.ndarray:
    return np.stack([row["logits"] for row in runner(texts)])


def scores(pipe: Any, texts: list[str]) -> list[tuple[str, float]]:
    return [(entry["label"], pytest.approx(entry["score"], abs=1e-5)) for entry in pipe(texts)]


# threads


@pytest.mark.parametrize("mode", ["shared", "static"])
def test_sixteen_threads_on_a_model_and_a_pipeline_that_share_it_while_it_is_closed_get_the_sequential_answers(
    saved: Path, tokenizer: Any, mode: str
) -> None:
    own = BucketedModelForSequenceClassification.from_pretrained(saved, mode=mode)
    pipe = hf_bucket.pipeline(model=own)
    asked = requests(96)
    batches = [dict(tokenizer(texts, padding=True, return_tensors="np")) for texts in asked]
    by_model = [own(**batch).logits for batch in batches]
    by_pipe = [scores(pipe, texts) for texts in asked]

    def ask(number: int) -> None:
        if number % 24 == 0:
            own.close()
        assert np.abs(own(**batches[number]).logits - by_model[number]).max() <= 1e-5
        assert pipe(asked[number]) == [{"label": label, "score": score} for label, score in by_pipe[number]]

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(len(asked))))


def test_a_model_is_pickled_while_threads_use_it(saved: Path) -> None:
    runner = hf_bucket.load(saved)
    asked = requests(40)
    alone = [logits(runner, texts) for texts in asked]

    def ask(number: int) -> None:
        which = pickle.loads(pickle.dumps(runner)) if number % 10 == 0 else runner
        assert np.abs(logits(which, asked[number]) - alone[number]).max() <= 1e-5

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(len(asked))))


# child processes


def _answers(pipe: Any, queue: Any) -> None:
    queue.put(pipe(["w1 w2", text_of(30)], top_k=None))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_pipeline_works_in_a_child_process_after_first_use(saved: Path, method: str) -> None:
    pipe = hf_bucket.pipeline(model=str(saved))
    expected = pipe(["w1 w2", text_of(30)], top_k=None)
    context = multiprocessing.get_context(method)
    queue = context.SimpleQueue()
    child = context.Process(target=_answers, args=(pipe, queue))
    child.start()
    for got, row in zip(queue.get(), expected, strict=True):
        assert [entry["label"] for entry in got] == [entry["label"] for entry in row]
        assert [entry["score"] for entry in got] == pytest.approx([entry["score"] for entry in row], abs=1e-5)
    child.join(LATE_S)
    assert child.exitcode == 0


def _ask_in_time(runner: Runner) -> None:
    signal.alarm(20)  # kills a child that waits for a lock whose owner stayed behind
    os._exit(0 if runner(["w1"]) and runner.stats() else 1)


def _locks(value: Any) -> list[Any]:
    """Every lock that a runner, its engines or what it counts with holds."""
    lock = type(threading.Lock())
    found = [item for item in vars(value).values() if isinstance(item, lock)]
    parts = [getattr(value, name) for name in ("_counts", "_engines") if hasattr(value, name)]
    return found + [item for part in parts for item in _locks(part)]


def test_a_child_forked_while_another_thread_is_in_the_middle_of_something_does_not_wait_for_it(
    tmp_path: Path,
) -> None:
    runner = Runner(fake_artifact(tmp_path, make_ladder([8])), engine=fake_engine)
    locks = _locks(runner)
    assert len(locks) == 2, "that of its engines and that of its counts"
    for lock in locks:
        lock.acquire()  # as a thread would that is opening sessions, or counting
    child = multiprocessing.get_context("fork").Process(target=_ask_in_time, args=(runner,))
    child.start()
    for lock in locks:
        lock.release()
    child.join(LATE_S)
    assert child.exitcode == 0


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_loader_whose_workers_collate_feeds_a_model_that_was_used_before(
    model: Any, tokenizer: Any, method: str
) -> None:
    texts = [text_of(length, length) for length in (0, 3, 14, 2, 40, 62, 5, 6)]
    features = [tokenizer(text) for text in texts]
    expected = [model(**tokenizer([text], return_tensors="pt")).logits[0].numpy() for text in texts]
    collator = DataCollatorWithBucketing(tokenizer, buckets=[8, 16, 64])
    loader = DataLoader(
        features, batch_size=3, collate_fn=collator, num_workers=1, multiprocessing_context=method, timeout=LATE_S
    )
    got = [row for batch in loader for row in model(**batch).logits.numpy()]
    assert np.abs(np.stack(got) - np.stack(expected)).max() <= 1e-4


# an artifact that is replaced on disk while a model made of it lives


@pytest.mark.parametrize("how", ["closed", "forked"])
def test_sessions_opened_again_are_never_those_of_another_artifact_that_took_its_place(
    tmp_path: Path, saved: Path, how: str
) -> None:
    """Else the new weights would run behind the old tokenizer and the old labels."""
    other = BucketedModelForSequenceClassification.from_pretrained(saved, buckets=[8, 16], batch_sizes=[1])
    folder = copy_artifact(hf_bucket.load(saved).artifact, tmp_path / "model").folder
    runner = hf_bucket.load(folder)
    before = logits(runner, ["w1"])
    copy_artifact(other.runner.artifact, folder)
    assert (logits(runner, ["w1"]) == before).all(), "open sessions keep their files"
    if how == "closed":
        runner.close()
        with pytest.raises(ArtifactError, match="model holds another artifact than when it was opened; load"):
            runner(["w1"])
    else:
        child = multiprocessing.get_context("fork").Process(target=_refused, args=(runner,))
        child.start()
        child.join(LATE_S)
        assert child.exitcode == 0


def _refused(runner: Runner) -> None:
    try:
        runner(["w1"])
    except ArtifactError:
        os._exit(0)
    os._exit(1)


def test_a_loaded_model_answers_after_its_folder_is_gone_and_says_so_when_it_must_read_it_again(
    tmp_path: Path, saved: Path
) -> None:
    folder = copy_artifact(hf_bucket.load(saved).artifact, tmp_path / "model").folder
    runner = hf_bucket.load(folder)
    before = logits(runner, ["w1"])
    folder.rename(tmp_path / "elsewhere")
    assert (logits(runner, ["w1"]) == before).all()
    runner.close()
    with pytest.raises(ArtifactError, match=str(folder)):
        runner(["w1"])
    (tmp_path / "elsewhere").rename(folder)
    assert np.abs(logits(runner, ["w1"]) - before).max() <= 1e-5


# closing, and the end


class Counted(FakeSession):
    """A session that knows how many of its kind are open."""

    open = 0

    def close(self) -> None:
        Counted.open -= 1


def counted_engine(artifact: Any, options: Any) -> Any:
    made = {bucket: Counted(bucket) for bucket in artifact.manifest.ladder}
    Counted.open += len(made)
    return made


def test_closing_closes_every_session_once_and_may_be_repeated(tmp_path: Path) -> None:
    Counted.open = 0
    runner = Runner(fake_artifact(tmp_path, make_ladder([8, 16])), engine=counted_engine)
    ladder = len(runner.ladder)
    assert Counted.open == ladder
    runner.close()
    runner.close()
    assert Counted.open == 0
    assert len(runner(["w1"])) == 1
    assert Counted.open == ladder


def test_a_model_that_is_gone_leaves_the_pipeline_that_shares_its_weights_running_and_then_all_memory_goes(
    saved: Path,
) -> None:
    own = BucketedModelForSequenceClassification.from_pretrained(saved)
    pipe = hf_bucket.pipeline(model=own)
    expected = scores(pipe, ["w1 w2", text_of(30)])
    runner, gone = weakref.ref(own.runner), weakref.ref(own)
    del own
    gc.collect()
    assert gone() is None
    assert runner() is not None
    assert scores(pipe, ["w1 w2", text_of(30)]) == expected
    del pipe
    gc.collect()
    assert runner() is None


def test_two_models_of_one_cache_entry_do_not_need_each_other(tiny_bert: Path) -> None:
    """Another ladder of one checkpoint has hard links to the same weights."""
    first = BucketedModelForSequenceClassification.from_pretrained(tiny_bert, **BUCKETS)
    second = BucketedModelForSequenceClassification.from_pretrained(tiny_bert, buckets=[8], batch_sizes=[1])
    assert first.runner.artifact.path("model.onnx.data").samefile(second.runner.artifact.path("model.onnx.data"))
    expected = logits(first.runner, ["w1 w2"])
    first.close()
    del first
    gc.collect()
    assert np.abs(logits(second.runner, ["w1 w2"]) - expected).max() <= 1e-5


# memory


def test_memory_stops_growing(saved: Path) -> None:
    """20,000 requests of mixed lengths in a process of its own; 16 bytes per request would be a leaked number each."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "soak.py"), str(saved), "--requests", "20000", "--json"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    figures = json.loads(done.stdout)
    print(figures)
    assert figures["requests"] == 20000
    assert figures["bytes_per_request"] < 100
