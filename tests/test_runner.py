"""The main path, on sessions that need no engine: their logits tell which tokens a row had."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import fake_artifact, fake_engine, text_of, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_bucket.batch import Features
from hf_bucket.errors import ArtifactError, BucketWarning, InputError, InputTypeError, TooLongError
from hf_bucket.ladder import Bucket, make_ladder
from hf_bucket.runner import Runner, RunOptions, load
from hf_bucket.session import FakeSession

TOKENIZER = tiny_tokenizer()


def expected(text: object) -> tuple[int, int]:
    ids = TOKENIZER.encode(*text).ids if isinstance(text, tuple) else TOKENIZER.encode(text).ids
    return sum(ids), len(ids)


def answers(rows: list) -> list[tuple[int, int]]:
    return [tuple(map(int, row["logits"])) for row in rows]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory):
    return fake_artifact(tmp_path_factory.mktemp("fake"), make_ladder([8, 16, 32], batch_sizes=[1, 4]))


@pytest.fixture
def runner(artifact) -> Runner:
    return Runner(artifact, engine=fake_engine)


words = st.integers(0, 20).map(text_of) | st.tuples(st.integers(0, 10).map(text_of), st.integers(0, 10).map(text_of))


@given(
    texts=st.lists(words, max_size=12),
    lengths=st.sets(st.integers(25, 64), min_size=1, max_size=4),
    batches=st.sets(st.integers(1, 5), min_size=1, max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_an_answer_depends_neither_on_bucket_nor_neighbours_nor_order(artifact, texts, lengths, batches) -> None:
    ladder = make_ladder(sorted(lengths), batch_sizes=sorted(batches))
    manifest = type(artifact.manifest)(
        **{f: getattr(artifact.manifest, f) for f in artifact.manifest.__slots__ if f != "ladder"}, ladder=ladder
    )
    other = Runner(type(artifact)(folder=artifact.folder, manifest=manifest), engine=fake_engine)
    assert answers(other(texts)) == [expected(text) for text in texts]


def test_every_row_runs_in_the_smallest_bucket_that_holds_it(runner: Runner) -> None:
    random.seed(1)
    lengths = [random.randint(2, 32) for _ in range(200)]
    for length in lengths:
        runner([text_of(length - 2)])
    rows = {name: figures["rows"] for name, figures in runner.stats()["buckets"].items()}
    for low, high in ((0, 8), (8, 16), (16, 32)):
        assert rows[f"b1_s{high}"] + rows[f"b4_s{high}"] == sum(low < length <= high for length in lengths)


@pytest.mark.parametrize(("length", "bucket"), [(7, 8), (8, 8), (9, 16), (16, 16), (17, 32), (32, 32)])
def test_a_length_at_an_edge_goes_where_the_rule_says(runner: Runner, length: int, bucket: int) -> None:
    runner([text_of(length - 2)])
    assert runner.stats()["buckets"][f"b1_s{bucket}"]["rows"] == 1


def test_a_row_alone_takes_the_same_bucket_every_time_and_with_others_another(artifact) -> None:
    dear = {"b1_s8": 9.0, "b4_s8": 9.0, "b1_s16": 2.0, "b4_s16": 3.0, "b1_s32": 5.0, "b4_s32": 9.0}
    runner = Runner(
        artifact,
        RunOptions(overflow="dynamic"),
        cost=lambda bucket: dear[bucket.name],
        engine=fake_engine,
        dynamic=lambda artifact, options, sessions: FakeSession,
    )
    for _ in range(2):
        for length in (8, 9, 16, 17, 40):
            assert answers(runner([text_of(length - 2)])) == [expected(text_of(length - 2))]
    assert answers(runner([])) == []
    ran = {name: figures["batches"] for name, figures in runner.stats()["buckets"].items() if figures["batches"]}
    assert ran == {"b1_s16": 6, "b1_s32": 2}, "a longer bucket where that is cheaper"
    assert runner.stats()["dynamic"]["batches"] == 2
    runner([text_of(6), text_of(7)])
    assert runner.stats()["buckets"]["b4_s16"]["batches"] == 1


def test_stats_add_up(runner: Runner) -> None:
    runner([text_of(4), text_of(10), text_of(11)])
    stats = runner.stats()
    assert stats["rows"] == 3
    assert stats["real_tokens"] == 6 + 12 + 13
    cells = sum(  # which of the buckets ran is for the scheduler's tests
        bucket.cells * stats["buckets"][bucket.name]["batches"] for bucket in runner.ladder
    )
    assert stats["padded_tokens"] == cells - stats["real_tokens"]
    assert stats["waste"] == pytest.approx(1 - 31 / cells)
    assert sum(figures["padded_tokens"] for figures in stats["buckets"].values()) == stats["padded_tokens"]


@pytest.mark.parametrize("texts", [[], [""], ["", ""], [("", "")]], ids=["none", "empty", "two empty", "empty pair"])
def test_empty_lists_and_empty_texts_are_valid(runner: Runner, texts: list) -> None:
    assert answers(runner(texts)) == [expected(text) for text in texts]


def test_one_string_is_one_text(runner: Runner) -> None:
    assert answers(runner("w1 w2")) == [expected("w1 w2")]


def test_a_dict_is_a_text_or_a_pair(runner: Runner) -> None:
    rows = runner([{"text": "w1"}, {"text": "w1", "text_pair": "w2"}, {"text": "w1", "text_pair": None}])
    assert answers(rows) == [expected("w1"), expected(("w1", "w2")), expected("w1")]


def test_a_text_that_fits_no_bucket_is_an_error_with_the_numbers(runner: Runner) -> None:
    message = (
        r'input 1 has 33 tokens but the largest bucket holds 32; pass overflow="truncate", or add a bucket of '
        r"length >= 33 \(this model's maximum is 64\)"
    )
    with pytest.raises(TooLongError, match=message):
        runner(["w1", text_of(31)])


def test_beyond_the_models_maximum_no_bucket_is_advised(runner: Runner) -> None:
    with pytest.raises(TooLongError, match="this model's maximum is 64; pass overflow"):
        runner([text_of(63)])


def test_truncation_is_warned_about_once_and_counted_always(artifact) -> None:
    runner = Runner(artifact, RunOptions(overflow="truncate"), engine=fake_engine)
    long, kept = text_of(60), text_of(30)
    with pytest.warns(BucketWarning, match="input 1 was cut to the largest bucket, 32 tokens"):
        rows = runner(["w1", long])
    assert answers(rows) == [expected("w1"), expected(kept)]
    runner([long, long])
    assert runner.stats()["truncated"] == 3


def test_token_rows_are_cut_before_their_last_special_token(artifact) -> None:
    runner = Runner(artifact, RunOptions(overflow="truncate"), engine=fake_engine)
    ids = np.array([1, *range(4, 44), 2])
    features = Features(
        lengths=(42,), columns={"input_ids": [ids], "attention_mask": [ids * 0 + 1], "token_type_ids": [ids * 0]}
    )
    with pytest.warns(BucketWarning, match="input 0 was cut"):
        cut = runner.fit(features)
    assert list(cut.columns["input_ids"][0]) == [1, *range(4, 34), 2]
    assert features.lengths == (42,)


@pytest.mark.parametrize(("bad", "shown"), [(-1, "-1"), (94, "94")])
def test_an_id_outside_the_vocabulary_is_an_error_before_it_reaches_the_engine(runner: Runner, bad, shown) -> None:
    ids = np.array([1, bad, 2])
    with pytest.raises(InputError, match=f"input 0 has token id {shown}, this model's vocabulary is 0 to 93"):
        runner.fit(Features(lengths=(3,), columns={"input_ids": [ids]}))


@pytest.mark.parametrize("bad", [None, b"w1", 3, ["w1", "w2"], ("w1",)], ids=repr)
def test_an_error_leaves_the_runner_usable_and_counts_nothing(runner: Runner, bad: object) -> None:
    before = runner.stats()
    with pytest.raises(InputTypeError, match="input 1"):
        runner(["w1", bad])
    assert runner.stats() == before
    assert answers(runner(["w1"])) == [expected("w1")]


class FailsOnce(FakeSession):
    """A session whose first run after the warm-up fails."""

    def run(self, arrays):
        if len(self.shapes) == 1:
            self.shapes.append(())
            raise MemoryError("no room")
        return super().run(arrays)


def test_an_engine_that_fails_leaves_the_runner_usable(artifact) -> None:
    runner = Runner(artifact, engine=lambda artifact, options: {b: FailsOnce(b) for b in artifact.manifest.ladder})
    with pytest.raises(MemoryError, match="no room"):
        runner(["w1"])
    assert runner.stats()["rows"] == 0
    assert answers(runner(["w1"])) == [expected("w1")]


def test_sixteen_threads_get_what_one_gets(runner: Runner) -> None:
    requests = [[text_of(random.Random(seed).randint(0, 30), seed) for _ in range(seed % 5 + 1)] for seed in range(400)]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda texts: answers(runner(texts)), requests))
    assert together == [[expected(text) for text in texts] for texts in requests]
    assert runner.stats()["rows"] == sum(map(len, requests))


def test_a_runner_survives_pickling(runner: Runner) -> None:
    copy = pickle.loads(pickle.dumps(runner))
    assert answers(copy(["w1 w2"])) == answers(runner(["w1 w2"]))


def test_a_pickled_runner_whose_artifact_is_gone_says_so(tmp_path: Path) -> None:
    runner = Runner(fake_artifact(tmp_path / "here", make_ladder(8)), engine=fake_engine)
    state = pickle.dumps(runner)
    (tmp_path / "here").rename(tmp_path / "there")
    with pytest.raises(ArtifactError, match="there is no such folder"):
        pickle.loads(state)


def _in_child(runner: Runner, queue) -> None:
    queue.put((os.getpid(), answers(runner(["w3 w4"]))))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_runner_works_in_a_child_process_after_use(runner: Runner, method: str) -> None:
    runner(["w1"])
    context = multiprocessing.get_context(method)
    queue = context.SimpleQueue()
    child = context.Process(target=_in_child, args=(runner, queue))
    child.start()
    pid, got = queue.get()
    child.join()
    assert pid != os.getpid()
    assert got == [expected("w3 w4")]


def test_the_warm_up_runs_every_bucket_smallest_first_and_can_be_left_out(artifact) -> None:
    shapes: list[tuple[int, ...]] = []

    def engine(artifact, options):
        return {bucket: FakeSession(bucket, shapes) for bucket in artifact.manifest.ladder}

    Runner(artifact, RunOptions(warmup=False), engine=engine)
    assert shapes == []
    Runner(artifact, engine=engine)
    assert shapes == [(1, 8), (4, 8), (1, 16), (4, 16), (1, 32), (4, 32)]


def test_the_warm_up_counts_nothing(runner: Runner) -> None:
    assert runner.stats()["rows"] == 0


def test_a_closed_runner_opens_its_sessions_again(runner: Runner) -> None:
    runner.close()
    assert answers(runner(["w1"])) == [expected("w1")]


def test_another_tokenizer_can_be_used(artifact) -> None:
    other = tiny_tokenizer()
    other.post_processor = None
    runner = Runner(artifact, tokenizer_json=other.to_str(), engine=fake_engine)
    assert answers(runner(["w0 w1"])) == [(4 + 5, 2)]
    assert answers(pickle.loads(pickle.dumps(runner))(["w0 w1"])) == [(9, 2)]


def test_an_unknown_overflow_lists_the_known_ones(artifact) -> None:
    with pytest.raises(InputError, match="overflow must be one of error, truncate, window, dynamic, got 'drop'"):
        RunOptions(overflow="drop")  # type: ignore[arg-type]


def test_loading_a_folder_that_is_no_artifact_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"there is no bucket_config.json in it"):
        load(tmp_path)


def test_a_bucket_knows_its_rows(runner: Runner) -> None:
    assert Bucket(batch_size=4, extent=(16,)) in runner.ladder


def test_logits_that_are_not_finite_name_the_bucket_and_the_input(artifact) -> None:
    class InfiniteSession(FakeSession):
        def run(self, arrays):
            logits = super().run(arrays)["logits"]
            return {"logits": np.where(logits[:, 1:] == 5, np.float32("inf"), logits)}

    runner = Runner(
        artifact,
        engine=lambda artifact, options: {bucket: InfiniteSession(bucket) for bucket in artifact.manifest.ladder},
    )
    with pytest.raises(InputError, match=r"input 2 got logits that are not finite from bucket b\d+_s\d+; look whether"):
        runner(["w1", "w2", text_of(3)])
    assert len(runner(["w1", text_of(4)])) == 2
