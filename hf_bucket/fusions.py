"""What may be made of a graph before onnxruntime runs it: one row of data per way; ``fuse`` measures which helps."""

from __future__ import annotations

from dataclasses import dataclass

from hf_bucket.errors import ArtifactError


@dataclass(frozen=True, slots=True, kw_only=True)
class Fusion:
    """One way.

    Attributes:
        name: in the manifest.
        disabled: optimisers of onnxruntime's that it leaves out.
        basic: whether onnxruntime fuses nothing, and only drops what is redundant.
        rewritten: the graph file it runs, in place of ``model.onnx``; empty for that one.
    """

    name: str
    disabled: tuple[str, ...] = ()
    basic: bool = False
    rewritten: str = ""


OWN = Fusion(name="onnxruntime")  # whatever onnxruntime does by itself: the others are measured against it

FUSIONS = (
    OWN,
    # a fused Add and LayerNormalization takes several times as long as the two on some processors
    Fusion(name="without-skip-norm", disabled=("SkipLayerNormFusion",)),
    Fusion(name="none", basic=True),
    Fusion(name="token-list", rewritten="model_token_list.onnx"),  # see flatten.py
    Fusion(name="ort_fusions", rewritten="model_ort_fusions.onnx"),  # transformers' exporters
    Fusion(name="onnxruntime.transformers", rewritten="model_ort_transformers.onnx"),  # onnxruntime's offline tool
)


def get_fusion(name: str) -> Fusion:
    """Return the way called ``name``.

    Raises:
        ArtifactError: no such way; only a manifest can ask for one.
    """
    for fusion in FUSIONS:
        if fusion.name == name:
            return fusion
    known = ", ".join(fusion.name for fusion in FUSIONS)
    raise ArtifactError(f"the manifest asks for the fusion {name!r}, known are {known}; upgrade hf_bucket")
