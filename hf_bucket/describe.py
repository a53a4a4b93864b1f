"""Artifacts and checks as plain text, for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mean, median
from typing import TYPE_CHECKING

from hf_bucket.artifact import WEIGHTS, Artifact
from hf_bucket.ladder import Ladder
from hf_bucket.manifest import Certificate, FusionChoice, Manifest, Quantization, Try, Validation
from hf_bucket.memory import FASTER, Footprint, footprint, sets_of

if TYPE_CHECKING:
    from hf_bucket.costs import Costs
    from hf_bucket.settle import Choice, Settled


def describe_artifact(artifact: Artifact, *, at_once: int) -> str:
    """Return what an artifact holds, in some lines: source, labels, sizes, memory, how buckets compared, certificates.

    Args:
        at_once: batches that would run at once.
    """
    manifest = artifact.manifest
    total = sum(record.size for record in manifest.files.values())
    weights = manifest.files[WEIGHTS].size if WEIGHTS in manifest.files else 0
    source = " ".join(f"{key}={value}" for key, value in manifest.source.items() if value)
    lines = [
        f"folder    {artifact.folder}",
        f"task      {manifest.task}",
        f"source    {source}",
        f"labels    {', '.join(manifest.labels)}",
        f"longest   {manifest.ladder.max_length} tokens; the model's limit is {manifest.max_length or 'unknown'}",
        f"size      {total / 1e6:.1f} MB, of which weights {weights / 1e6:.1f} MB",
        f"made with {', '.join(f'{name} {version}' for name, version in manifest.versions.items())}",
    ]
    if manifest.padding_leak is not None:
        lines.append(f"LEAKS     padding moves this model's logits by up to {manifest.padding_leak:.2g}, in torch too")
    if manifest.fusion is not None:
        lines.append(describe_fusion(manifest.fusion))
    if manifest.quantization is not None:
        lines += describe_quantization(manifest.quantization, labels=len(manifest.labels))
    tables = [describe_memory(manifest, at_once=at_once), describe_checks(manifest.validation)]
    if manifest.certificates:
        tables.append(describe_certificates(manifest.certificates))
    return "\n\n".join(["\n".join(lines), *tables])


def describe_fusion(choice: FusionChoice) -> str:
    """Return what is made of the graph before it runs, and the time that each way takes on the whole."""
    ways = dict.fromkeys(name for ratios in choice.relative.values() for name in ratios)
    means = {name: mean(ratios[name] for ratios in choice.relative.values()) for name in ways}
    told = ", ".join(f"{name} {value:.2f}" for name, value in means.items())
    return f"fusions   {choice.chosen} on {choice.provider}; time relative to onnxruntime's own: {told}"


def describe_quantization(made: Quantization, *, labels: int) -> list[str]:
    """Return how int8 was made, what it changed on texts that were held out, and what it gained.

    Args:
        labels: of the model.
    """
    chosen = next((one for one in made.tries if one.kept == made.kept), made.tries[-1])
    share = made.weights_bytes / made.float_weights_bytes
    lines = [
        f"{made.scheme:<9} {made.layers - len(made.kept)} of {made.layers} products in eight bits, weights "
        f"{made.weights_bytes / 1e6:.1f} MB ({share:.0%} of float32)"
    ]
    if made.speed:
        ratios = sorted(made.speed.values())
        fastest = f"{median(ratios):.2f} times as fast as float32 ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        lines.append(f"{'':<9} {fastest} in {len(ratios)} buckets, on the machine that compiled it, one thread")
    if made.held_out:
        lines.append(
            f"{'':<9} {describe_changes(chosen, made.held_out, labels=labels)}, a logit by up to "
            f"{chosen.max_abs_delta:.2g}"
        )
    if made.scheme == "int8-dynamic":
        lines.append(f"{'':<9} NEIGHBOURS: scales come from each batch, so a text's logits change with those beside it")
    return lines


def describe_changes(one: Try, held_out: int, *, labels: int) -> str:
    """Return how many of the texts that were held out are answered otherwise."""
    how = "are labelled otherwise" if labels > 1 else "move by more than a tenth of the logits' standard deviation"
    return f"{one.label_flips} of {held_out} held-out texts {how}"


def describe_memory(manifest: Manifest, *, at_once: int) -> str:
    """Return a table of what one batch of every bucket takes in both modes, and what running takes in all."""
    shared, static = _footprints(manifest, at_once)
    rows: list[tuple[str, ...]] = [("bucket", "tensors at once", "a batch, shared", "a batch, static")]
    for bucket in manifest.ladder:
        sizes = [table.get(bucket.name) for table in (manifest.memory, shared.activations, static.activations)]
        rows.append((bucket.name, *("unknown" if size is None else f"{size / 1e6:.2f} MB" for size in sizes)))
    return "\n".join([*_aligned(rows), _total("shared", shared), _total("static", static)])


def _footprints(manifest: Manifest, at_once: int) -> tuple[Footprint, Footprint]:
    sets = sets_of(at_once)
    shared = footprint(manifest, mode="shared", at_once=at_once, sets=sets)
    return shared, footprint(manifest, mode="static", at_once=at_once, sets=sets)


def _total(mode: str, one: Footprint) -> str:
    batch, name = max(one.activations.values(), default=0), one.largest or "unknown size"
    return (
        f"{mode}: {one.total / 1e6:.1f} MB = weights {one.weights / 1e6:.1f} + graphs {one.sessions / 1e6:.1f} + "
        f"{one.at_once} at once x {batch / 1e6:.1f} for a batch of {name}"
    )


def memory_figures(manifest: Manifest, *, at_once: int) -> dict[str, object]:
    """Return what ``describe_memory`` shows, in bytes."""
    found = {
        mode: {"sessions": one.sessions, "activations": dict(one.activations), "total": one.total}
        for mode, one in zip(("shared", "static"), _footprints(manifest, at_once), strict=True)
    }
    return {"at_once": at_once, "weights": _footprints(manifest, at_once)[0].weights, **found}


def describe_checks(checks: Sequence[Validation]) -> str:
    """Return a table with a line per bucket."""
    rows = [("bucket", "rows compared", "with", "max |delta logit|", "label flips")]
    for check in checks:
        rows.append((check.bucket, str(check.n), check.reference, f"{check.max_abs_delta:.1e}", str(check.label_flips)))
    return "\n".join(_aligned(rows))


def describe_certificates(certificates: Sequence[Certificate]) -> str:
    """Return a table with a line per certificate; one that did not pass says FAILED."""
    compared = ("certificate", "precision", "data", "rows", "with", "max |delta logit|", "p99", "label flips")
    rows: list[tuple[str, ...]] = [(*compared, "accuracy", "reference's", "ms a batch", "verdict")]
    for found in certificates:
        figures = (f"{found.max_abs_delta:.1e}", f"{found.p99_abs_delta:.1e}", str(found.label_flips))
        accuracies = tuple("-" if one is None else f"{one:.4f}" for one in (found.accuracy, found.reference_accuracy))
        speed = "-" if found.batch_s is None else f"{found.batch_s * 1e3:.3g}"
        reference = found.reference if found.checkpoint is None else f"{found.reference}: {found.checkpoint}"
        what = (found.bucket, found.precision, found.data, str(found.n), reference)
        rows.append((*what, *figures, *accuracies, speed, _verdict(found)))
    return "\n".join(_aligned(rows))


def _verdict(found: Certificate) -> str:
    if not found.passed:
        return "FAILED"
    if found.n == 0:
        return "no rows"
    return "not judged" if found.allowed is None else f"ok, allowed {found.allowed:.1e}"


def describe_failure(failed: Certificate) -> str:
    """Return one line that says how a certificate failed, with its figures; ``failed.allowed`` is a number."""
    return (
        f"bucket {failed.bucket} ({failed.precision}) does not give the {failed.reference} answer on {failed.data}: a "
        f"logit differs by up to {failed.max_abs_delta:.2g} (p99 {failed.p99_abs_delta:.2g}), allowed is "
        f"{failed.allowed:.2g}; {failed.label_flips} of {failed.n} rows change their label. Compile the model "
        f"again, or compare with the checkpoint it was compiled from, or allow more with --atol"
    )


def describe_costs(costs: Costs, ladder: Ladder) -> str:
    """Return a table of what every bucket costs on this machine, and how many batches run best."""
    rows: list[tuple[str, ...]] = [("bucket", "ms a run", "us a cell", "from", "ms on every core")]
    for bucket in ladder:
        seconds, origin = costs(bucket), "measured" if bucket in costs.seconds else "predicted"
        whole = f"{costs.alone[bucket] * 1e3:.3g}" if bucket in costs.alone else "-"
        rows.append((bucket.name, f"{seconds * 1e3:.3g}", f"{seconds * 1e6 / bucket.cells:.3g}", origin, whole))
    many = "at once, one thread each" if costs.at_once else "one after another, each on every core"
    used = (
        ""
        if costs.tell(ladder)
        else "\nThese runs are too short to tell buckets apart: rows go to the smallest that holds them."
    )
    alone = [bucket for bucket in ladder if bucket in costs.alone]
    quick = len(costs.quick.intersection(alone))
    single = f" A request of one row runs on every core, but for {quick} of {len(alone)} buckets." if alone else ""
    return "\n".join(_aligned(rows)) + f"\nMany batches are faster {many}.{single}{used}"


def describe_providers(settled: Settled) -> str:
    """Return which providers run the model here, and what another takes, or why that is not known."""
    engine, found = settled.engine, settled.provider
    other = (
        "no other was measured"
        if found is None
        else f"{found.provider} was not compared: {found.why}"
        if found.many is None
        else f"{found.provider} takes {found.many:.3f} of the CPU provider's time for many batches at once, "
        f"{found.one:.3f} for one row"
    )
    many = f" for a few rows and {engine.provider_of_many} for many" if engine.provider_of_many else ""
    return f"provider {engine.provider}{many}: {other}."


def describe_choice(choice: Choice) -> str:
    """Return a table of both modes on some buckets, and which is chosen and why."""
    rows: list[tuple[str, ...]] = [("bucket", "shared, ms a run", "static, ms a run")]
    rows += [(name, *(f"{value * 1e3:.3g}" for value in pair)) for name, pair in choice.seconds.items()]
    there = "unknown" if choice.available is None else f"{choice.available / 1e6:.1f} MB"
    why = (
        "shared does not fit"
        if not choice.shared_fits
        else f"static takes {choice.ratio:.3f} of shared's time, and is chosen at {FASTER} or less"
        if choice.fits and choice.seconds
        else "nothing was measured"
        if choice.fits
        else "static does not fit"
    )
    memory = f"static needs {choice.static_bytes / 1e6:.1f} MB of memory, there: {there}"
    return "\n".join([*_aligned(rows), f"mode {choice.mode}: {why}; {memory}."])


def _aligned(rows: Sequence[tuple[str, ...]]) -> Iterable[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
