"""The last step of every artifact: variants for its buckets, what to make of its graph, every bucket checked."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from hf_bucket.artifact import GRAPH, Artifact, record_files, variant_name
from hf_bucket.encode import Encoder
from hf_bucket.export import quiet
from hf_bucket.fuse import Report, choose_fusion, not_used
from hf_bucket.fusions import get_fusion
from hf_bucket.graph import specialise
from hf_bucket.ladder import Bucket
from hf_bucket.machine import available_bytes
from hf_bucket.manifest import MANIFEST, FusionChoice, Manifest, Validation
from hf_bucket.memory import check_fits, footprint
from hf_bucket.probes import ATOL, PROBES, load_probes, sampler, validate
from hf_bucket.session import Session
from hf_bucket.session_ort import EngineOptions, OrtSession, open_unpacked, open_variant


def finish(folder: Path, manifest: Manifest, report: Report) -> None:
    """Write and check the variants of a folder that holds everything else, then its manifest."""
    report(f"specialising and checking {len(manifest.ladder)} buckets: {manifest.ladder}")
    peaks = {
        bucket.name: specialise(folder / GRAPH, bucket, manifest.signature, folder / variant_name(bucket))
        for bucket in manifest.ladder
    }
    manifest = replace(manifest, memory={name: peak for name, peak in peaks.items() if peak is not None})
    check_fits(footprint(replace(manifest, files=record_files(folder)), mode="static"), available_bytes())
    if manifest.fusion is None:
        manifest = replace(manifest, fusion=_fusion(folder, manifest, report))
    try:
        final = _checked(folder, manifest)
    except Exception as error:
        rewritten = [] if manifest.fusion is None else sorted(filter(None, _rewritten(manifest.fusion)))
        if not rewritten:
            raise
        report(not_used(", ".join(rewritten), error))
        for name in rewritten:
            (folder / name).unlink()
        final = _checked(folder, replace(manifest, fusion=None))
    (folder / MANIFEST).write_text(final.to_json(), encoding="utf-8")


def _checked(folder: Path, manifest: Manifest) -> Manifest:
    """Return the manifest with its files and with how every bucket compared."""
    draft = Artifact(folder=folder, manifest=replace(manifest, files=record_files(folder)))
    return replace(draft.manifest, validation=check_buckets(draft), certificates=())


def _rewritten(choice: FusionChoice) -> set[str]:
    """Return the graphs that a choice needs beside the exported one."""
    return {get_fusion(name).rewritten for name in (choice.chosen, *choice.buckets.values())}


def _fusion(folder: Path, manifest: Manifest, report: Report) -> FusionChoice | None:
    """Return what to make of the graph in a folder that has a tokenizer, by measurement."""
    encoder = Encoder((folder / "tokenizer.json").read_text(encoding="utf-8"), inputs=manifest.signature.input_names)
    reference, probes = load_probes(folder / PROBES)

    def check(session: Session) -> None:
        signature, atol = manifest.signature, ATOL["float32"]
        validate(session.bucket, session, probes, signature, reference=reference, atol=atol)

    exact = manifest.source["dtype"] == "float32" and manifest.padding_leak is None
    with quiet(False):
        return choose_fusion(
            folder,
            manifest.ladder,
            sampler(encoder, manifest.signature, manifest.vocab_size),
            check=check if exact else None,
            report=report,
        )


def check_buckets(artifact: Artifact) -> tuple[Validation, ...]:
    """Run the artifact's probes through every bucket, on its variant and on the shared graph, and return the worse.

    Raises:
        ExportError: a bucket does not give the reference's answer.
        ArtifactError: a graph cannot be loaded.
    """
    manifest, options = artifact.manifest, EngineOptions()
    reference, probes = load_probes(artifact.folder / PROBES)
    atol = math.inf if manifest.padding_leak is not None else ATOL.get(manifest.source["dtype"], math.inf)
    shared = open_unpacked(artifact, options)
    checks = []
    for bucket in manifest.ladder:
        static = open_variant(artifact, bucket, options)
        # the shared graph is one graph for every batch size: two rows tell what this length does to it
        rows = Bucket(batch_size=min(2, bucket.batch_size), extent=bucket.extent)
        both = [
            validate(session.bucket, session, probes, manifest.signature, reference=reference, atol=atol)
            for session in (static, OrtSession(rows, shared, static.output_names))
        ]
        worse = max(both, key=lambda check: (check.label_flips, check.max_abs_delta))
        checks.append(replace(worse, bucket=bucket.name))
    return tuple(checks)
