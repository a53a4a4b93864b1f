"""What a model's own ladder takes beside the planned one, and how much memory a bucket computes in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import fake_artifact

from hf_bucket.advise import advise, memory_of
from hf_bucket.assign import assign
from hf_bucket.costs import Costs
from hf_bucket.errors import LadderError
from hf_bucket.joint import Limits
from hf_bucket.ladder import Bucket, cross, make_ladder
from hf_bucket.memory import ARENA

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


def test_the_memory_of_a_bucket_is_the_manifests_and_of_others_follows_from_it(tmp_path: Path) -> None:
    artifact = fake_artifact(tmp_path / "fake", make_ladder([8, 16, 32], batch_sizes=[1, 4]))
    unknown = "nobody knows the memory of this model's buckets"
    with pytest.raises(LadderError, match=unknown):
        memory_of(artifact)
    memory = {bucket.name: 1000 * bucket.cells for bucket in artifact.manifest.ladder}
    told = memory_of(replace(artifact, manifest=replace(artifact.manifest, memory=memory)))
    for bucket in (*artifact.manifest.ladder, Bucket(batch_size=2, extent=(24,))):
        assert told(bucket) == pytest.approx(ARENA["shared"] * 1000 * bucket.cells, rel=0.01)
