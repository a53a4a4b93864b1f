"""What a model's own ladder takes beside the planned one, and how much memory a bucket computes in."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import fake_artifact

from hf_bucket.advise import _peak_bytes, advise
from hf_bucket.assign import assign
from hf_bucket.costs import Costs
from hf_bucket.joint import Limits
from hf_bucket.ladder import cross, make_ladder

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

COSTS = Costs(seconds={bucket: 0.01 + 0.001 * bucket.cells for bucket in cross([4, 8, 16, 32, 64], [1, 2, 4, 8])})


def test_both_ladders_are_judged_by_what_the_scheduler_would_run(tmp_path: Path) -> None:
    own = make_ladder([8, 32], batch_sizes=[1, 4])
    rows = [4] * 9 + [7] * 3 + [30]
    found = advise(rows, fake_artifact(tmp_path / "fake", own), COSTS, Limits(n_buckets=4), window=len(rows))
    for ladder, seconds in ((own, found.own_s), (found.plan.ladder, found.plan.cost)):
        runs = assign(rows, ladder, COSTS, promote=False)
        assert seconds * len(rows) == pytest.approx(sum(COSTS(run.bucket) for run in runs))
    assert found.plan.cost < found.own_s
    assert f"--buckets {found.buckets}" in str(found)


def test_rows_are_as_long_as_the_model_lets_them_be(tmp_path: Path) -> None:
    artifact = fake_artifact(tmp_path / "fake", make_ladder([8]))
    found = advise([1, 70], artifact, COSTS, Limits(n_buckets=2))
    assert (found.plan.lengths, found.plan.clipped) == ((2, 64), 1), "an empty text has 2 tokens, the model holds 64"
    assert found.own == artifact.manifest.ladder


def test_the_memory_of_a_graph_is_the_most_that_is_alive_at_once(tmp_path: Path) -> None:
    """One input of 4 x 8 int64; ``wide`` is 4 x 8 x 16 float32, 2,048 bytes, and is alive twice, as it and its sum."""
    onnx, helper = pytest.importorskip("onnx"), pytest.importorskip("onnx.helper")
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["wide"]),
        helper.make_node("Add", ["wide", "wide"], ["sum"]),
        helper.make_node("ReduceMean", ["sum"], ["logits"], axes=[1], keepdims=0),
    ]
    wide, floats = [4, 8, 16], onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "alive",
        [helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, [4, 8])],
        [helper.make_tensor_value_info("logits", floats, [4, 16])],
        [helper.make_tensor("table", floats, [10, 16], [0.0] * 160)],
        value_info=[helper.make_tensor_value_info(name, floats, wide) for name in ("wide", "sum")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "g.onnx")
    assert _peak_bytes(tmp_path / "g.onnx") == 2 * 2048
