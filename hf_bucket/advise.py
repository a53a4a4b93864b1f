"""Which ladder a model should have for some texts on this machine, beside the one it has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from hf_bucket.artifact import Artifact
from hf_bucket.compile import bucket_compile_s, plain_ladder, with_buckets
from hf_bucket.costs import Costs, fitted
from hf_bucket.describe import describe_costs
from hf_bucket.encode import Encoder
from hf_bucket.errors import LadderError
from hf_bucket.histogram import Histogram
from hf_bucket.joint import WINDOW, Limits
from hf_bucket.ladder import Bucket, Ladder
from hf_bucket.memory import footprint
from hf_bucket.planner import Finding, Plan, lint, plan, resolve_ladder, seconds_per_row


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """A joint plan for one model, and what its own ladder takes.

    Attributes:
        costs: of a run of every bucket, here.
        own: the ladder the model has; ``own_s`` is the predicted seconds of a row with it, as ``plan.cost`` is.
        findings: about the planned ladder.
    """

    plan: Plan
    costs: Costs
    own: Ladder
    own_s: float
    findings: tuple[Finding, ...]

    @property
    def buckets(self) -> str:
        """The planned ladder as ``--buckets`` takes it."""
        return ",".join(f"{bucket.batch_size}x{bucket.length}" for bucket in self.plan.ladder)

    def to_json(self) -> dict[str, object]:
        """Return the plan as ``Plan.to_json`` does, with the predicted seconds of 1,000 rows."""
        return {
            **self.plan.to_json(),
            "buckets": self.buckets,
            "own_ladder": [[bucket.batch_size, bucket.length] for bucket in self.own],
            "seconds_per_1000_rows": {"plan": 1000 * self.plan.cost, "own_ladder": 1000 * self.own_s},
        }

    def __str__(self) -> str:
        return "\n".join(
            [
                describe_costs(self.costs, self.plan.ladder),
                "",
                f"predicted {1000 * self.plan.cost:.3g} s per 1,000 rows; with the model's own ladder {self.own}",
                f"          {1000 * self.own_s:.3g} s, {self.own_s / self.plan.cost:.2f} times as long",
                "",
                f"--buckets {self.buckets}",
            ]
        )


def advise(
    lengths: Iterable[int],
    artifact: Artifact,
    costs: Costs,
    limits: Limits,
    *,
    batch_sizes: Sequence[int] | None = None,
    max_length: int | None = None,
    window: int = WINDOW,
) -> Advice:
    """Return the joint plan for rows of some lengths, and what the artifact's own ladder takes for them.

    Args:
        max_length: tokens the ladder holds; None is the longest row, or the model's maximum if that is less.

    Raises:
        LadderError: no ladder keeps the limits, or ``max_length`` is not one of the model's.
    """
    manifest, given = artifact.manifest, Histogram.from_lengths(lengths)
    shortest = Encoder(artifact.tokenizer_json(), inputs=manifest.signature.input_names).min_length
    top = max_length or max(shortest, min(given.max, manifest.max_length or given.max))
    rows = given.clip(shortest=shortest, longest=max(given.max, shortest))
    made = plan(rows, cost=costs, limits=limits, batch_sizes=batch_sizes, max_length=top, window=window)
    resolve_ladder(
        made.ladder, min_length=shortest, max_length=manifest.max_length
    )  # refuses what the model cannot run
    findings = lint(
        made.ladder,
        min_length=shortest,
        max_length=manifest.max_length,
        histogram=made.histogram,
        cost=costs
        if costs.tell(made.ladder)
        else None,  # the scheduler does not go by costs that do not tell buckets apart
        window=window,
    )
    return Advice(
        plan=made,
        costs=costs,
        own=manifest.ladder,
        own_s=seconds_per_row(manifest.ladder, made.histogram, costs, window=window),
        findings=tuple(findings),
    )


def limits_for(
    artifact: Artifact, *, n_buckets: int, memory_bytes: int | None = None, compile_s: float | None = None
) -> Limits:
    """Return limits, with what they need to know of a model on this machine: see ``joint.Limits``."""
    return Limits(
        n_buckets=n_buckets,
        memory_bytes=memory_bytes,
        memory_of=None if memory_bytes is None else memory_of(with_buckets(artifact, plain_ladder(artifact))),
        compile_s=compile_s,
        bucket_compile_s=None if compile_s is None else bucket_compile_s(artifact),
    )


def memory_of(artifact: Artifact) -> Callable[[Bucket], int]:
    """Return a function that tells in how many bytes a run of a bucket computes, weights not counted.

    Of the artifact's own buckets it is what ``memory.footprint`` says; other buckets follow from these, as costs do
    (``costs.fitted``).
    """
    taken = footprint(artifact.manifest).activations
    known = {bucket: float(taken[bucket.name]) for bucket in artifact.manifest.ladder if bucket.name in taken}
    if not known:
        raise LadderError("nobody knows the memory of this model's buckets: sizes depend on its input; drop --memory")
    return lambda bucket: round(known[bucket] if bucket in known else fitted(known, bucket))
