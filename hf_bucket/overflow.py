"""What happens to a text that is longer than every bucket: the policies, and how they are spelled."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal, TypeAlias, get_args

from hf_bucket.errors import InputError

Policy = Literal["error", "truncate", "window", "dynamic"]
Side = Literal["right", "left", "head+tail"]
Strategy = Literal["longest_first", "only_first", "only_second"]
Pool = Literal["mean", "max", "first"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Overflow:
    """What happens to an input that is longer than the largest bucket.

    Attributes:
        policy: ``"error"`` raises; ``"truncate"`` cuts it; ``"window"`` runs overlapping windows of it and pools their
            logits; ``"dynamic"`` runs the graph with free dimensions at the exact length.
        side: where ``"truncate"`` takes tokens away: ``"right"`` at the end, ``"left"`` at the beginning,
            ``"head+tail"`` in the middle (Sun et al., 2019, arXiv 1905.05583). None is the tokenizer's own side, which
            is nearly always the right.
        strategy: which text of a pair is cut, or seen through windows: the longer one, or always the same.
        stride: tokens that neighbouring windows share; None is an eighth of the largest bucket.
        pool: how the logits of the windows become one row: element by element the mean or the largest, or those of the
            first window.
    """

    policy: Policy = "error"
    side: Side | None = None
    strategy: Strategy = "longest_first"
    stride: int | None = None
    pool: Pool = "mean"

    def __post_init__(self) -> None:
        for name, known in _KNOWN.items():
            value = getattr(self, name)
            if value not in known and value != _DEFAULTS[name]:
                which = "overflow" if name == "policy" else f"overflow {name}"
                raise InputError(f"{which} must be one of {', '.join(known)}, got {value!r}; {_SPELLING}")
        if self.stride is not None and (type(self.stride) is not int or self.stride < 0):
            raise InputError(f"overflow stride must be a number of tokens of at least 0, got {self.stride!r}")
        for field in fields(self):
            owners = _OWNERS.get(field.name, get_args(Policy))
            if getattr(self, field.name) != field.default and self.policy not in owners:
                raise InputError(f'overflow {field.name} has no meaning with "{self.policy}"; {_SPELLING}')

    def __str__(self) -> str:
        said = {name: getattr(self, name) for name in _OWNERS if getattr(self, name) != _DEFAULTS[name]}
        words = [f"stride={value}" if name == "stride" else str(value) for name, value in said.items()]
        return f"{self.policy}:{','.join(words)}" if words else self.policy


_KNOWN: dict[str, tuple[str, ...]] = {
    "policy": get_args(Policy),
    "side": get_args(Side),
    "strategy": get_args(Strategy),
    "pool": get_args(Pool),
}
_OWNERS: dict[str, tuple[str, ...]] = {
    "side": ("truncate",),
    "strategy": ("truncate", "window"),
    "stride": ("window",),
    "pool": ("window",),
}
_DEFAULTS: dict[str, object] = {field.name: field.default for field in fields(Overflow)}
_SPELLING = (
    'write "error", "dynamic", "truncate" with right, left or head+tail, or "window" with mean, max or first and '
    'stride=N; for pairs longest_first, only_first or only_second; such as "truncate:left" or "window:max,stride=32"'
)

OverflowLike: TypeAlias = "Overflow | str"


def make_overflow(value: OverflowLike) -> Overflow:
    """Return the policy that a string spells: ``policy`` or ``policy:option,option``.

    Raises:
        InputError: not such a string; the message lists what there is.
    """
    if isinstance(value, Overflow):
        return value
    if not isinstance(value, str):
        raise InputError(f"overflow is {value!r}; {_SPELLING}")
    policy, colon, options = value.partition(":")
    found: dict[str, object] = {"policy": policy}
    for word in options.split(",") if colon else ():
        name, option = _option(word.strip())
        if name in found:
            raise InputError(f"overflow={value!r} says {name} twice; {_SPELLING}")
        found[name] = option
    return replace(Overflow(), **found)  # type: ignore[arg-type]  # checked in __post_init__


def _option(word: str) -> tuple[str, object]:
    """Return the field that one option sets, and to what."""
    key, equals, number = word.partition("=")
    if equals and key == "stride":
        if number.isascii() and number.isdecimal():
            return "stride", int(number)
        raise InputError(f"overflow stride must be a number of tokens of at least 0, got {number!r}")
    for name in ("side", "strategy", "pool"):
        if word in _KNOWN[name]:
            return name, word
    raise InputError(f"overflow has no option {word!r}; {_SPELLING}")
