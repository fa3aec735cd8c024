"""The planes of one rank: its layers, its share of the heads, by size.

Planes of one size are one group. Groups stand in the order in which the layers first need them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from odma_service.errors import InvalidError
from odma_service.pool.geometry import Geometry, insist_count
from odma_service.pool.models.config import Config
from odma_service.pool.models.families import layers_from, mtp_layers, table
from odma_service.pool.models.layers import Kind, Layer, Plane, counted
from odma_service.values import PlaneGroup

MOST_RANKS = 4096
WINDOWS = ("whole", "ring")


@dataclass(frozen=True, slots=True)
class Parallel:
    """Which part of a model a rank has, and what of it keeps tokens. 0 and "" are the defaults.

    tensor            ranks that share the KV heads of a layer
    pipeline          ranks that share the layers, evenly
    pipeline_rank     which of them, from 0
    pipeline_layers   the layers of each such rank, where they are not even
    mtp               the layers of multi-token prediction too, on the last rank
    windows           whole: sliding layers keep every token; ring: those of their window
    """

    tensor: int = 0
    pipeline: int = 0
    pipeline_rank: int = 0
    pipeline_layers: tuple[int, ...] = ()
    mtp: bool = False
    windows: str = ""

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline"):
            insist_count(f"{name}_parallel", getattr(self, name) or 1, MOST_RANKS)
        if self.pipeline_layers and self.pipeline not in (0, len(self.pipeline_layers)):
            raise InvalidError("pipeline_layers", f"layers of {self.pipeline} ranks")
        rank, ranks = self.pipeline_rank, self.pipeline_ranks
        if not 0 <= rank < ranks:
            raise InvalidError("pipeline_rank", f"0 to {ranks - 1}, not {rank}")
        if self.windows and self.windows not in WINDOWS:
            raise InvalidError("windows", f"one of {', '.join(WINDOWS)}, not {self.windows!r}")

    @property
    def pipeline_ranks(self) -> int:
        return len(self.pipeline_layers) or self.pipeline or 1


WHOLE = Parallel()


class ModelGeometry(NamedTuple):
    """What a model config says. model_length_tokens None: it does not."""

    geometry: Geometry
    model_length_tokens: int | None
    why: tuple[str, ...] = ()
    has_states: bool = False
    not_of_prefix: str = ""  # why equal prefixes may have unequal KV; "": they never do


def from_model_config(
    config_json: str, element_bytes: int = 0, part: Parallel = WHOLE
) -> ModelGeometry:
    """Return the geometry of one rank from the text of a Hugging Face config.json.

    KV heads are divided over the tensor-parallel ranks, or replicated where there are fewer heads
    than ranks. A latent row has no heads and is whole on every rank. An element takes
    `element_bytes` (0: as the config says). Raises InvalidError naming the key or the argument.
    """
    if element_bytes:
        insist_count("element_bytes", element_bytes, 16)
    config = Config(config_json, table())
    element = element_bytes or config.element_bytes()
    model = layers_from(config)
    layers = _of_rank(config, model, part)
    sizes: Counter[int] = Counter()
    for plane in (plane for layer in layers for plane in layer.planes):
        sizes[_plane_bytes(plane, part.tensor or 1, element)] += 1
    if not sizes:
        raise InvalidError("config_json", "no layer of this rank keeps a KV of every token")
    groups = tuple(PlaneGroup(count, size) for size, count in sizes.items())
    return ModelGeometry(
        Geometry(groups),
        config.model_length_tokens,
        tuple(_why(config, layers, part.tensor or 1, element)),
        _has_states(layers),
        _not_of_prefix(config, model),
    )


def _has_states(layers: list[Layer]) -> bool:
    return any(layer.kind in (Kind.STATE, Kind.CROSS) or layer.has_state for layer in layers)


def _not_of_prefix(config: Config, model: list[Layer]) -> str:
    """Return why, of the whole model: who resumes a request needs the states of all ranks."""
    if _has_states(model):
        return "its layers keep states, which are not in the planes"
    if key := config.growing_rope():
        return f"{key} follows the length of the request"
    return ""


def _of_rank(config: Config, model: list[Layer], part: Parallel) -> list[Layer]:
    ranks, rank = part.pipeline_ranks, part.pipeline_rank
    given = part.pipeline_layers
    if not given and len(model) % ranks:
        raise InvalidError(
            "pipeline_parallel", f"must divide {len(model)} layers; or give pipeline_layers"
        )
    if given and (sum(given) != len(model) or min(given) < 1):
        raise InvalidError("pipeline_layers", f"must be {len(model)} layers in all")
    if ranks > 1 and any(layer.kind is Kind.SHARED for layer in model):
        raise InvalidError("pipeline_parallel", "layers share a cache: give the planes instead")
    lengths = given or (len(model) // ranks,) * ranks
    first = sum(lengths[:rank])
    layers = model[first : first + lengths[rank]]
    if part.mtp and rank == ranks - 1:
        layers = [*layers, *mtp_layers(config, model)]
    if part.windows == "ring" and any(layer.kind is Kind.SLIDING for layer in layers):
        raise InvalidError(
            "windows",
            "ring: a window needs a slot beside the planes, and slots are not built yet;"
            " whole keeps every token of sliding layers",
        )
    return layers


def _plane_bytes(plane: Plane, ranks: int, element: int) -> int:
    return plane.fixed_bytes or _heads_per_rank(plane.heads, ranks) * plane.width * element


def _heads_per_rank(heads: int, ranks: int) -> int:
    if not heads:
        return 1
    if heads % ranks and ranks % heads:
        raise InvalidError(
            "tensor_parallel", f"must divide {heads} KV heads, or be a multiple of them"
        )
    return max(1, heads // ranks)


MEANINGS = {
    Kind.FULL: "keep every token",
    Kind.SLIDING: "have a window; all its tokens are kept, as for the full ones",
    Kind.STATE: "keep a state, which the engine holds itself: slots are not built yet",
    Kind.CROSS: "keep the KV of an image or a sound, which the engine holds itself",
    Kind.SHARED: "read the cache of another layer",
    Kind.NONE: "do not attend",
}


def _why(config: Config, layers: list[Layer], ranks: int, element: int) -> list[str]:
    """Return sentences for people: where the rule is from, and what the layers keep."""
    source = config.family.source if config.family else "plain keys only: the rule of Llama"
    lines = [f"model_type {config.model_type or '(none)'}: {source}"]
    lines += [f"{number} layers {MEANINGS[kind]}" for kind, number in counted(layers)]
    if states := sum(layer.has_state for layer in layers):
        lines.append(f"{states} of them keep a state too, which the engine holds itself")
    rows = Counter(
        (plane.name, plane.heads, plane.width, plane.fixed_bytes)
        for layer in layers
        for plane in layer.planes
    )
    for (name, heads, width, fixed), count in rows.items():
        row = Plane(name, width, heads, fixed)
        size = _plane_bytes(row, ranks, element)
        of = f"{_heads_per_rank(heads, ranks)} of {heads} KV heads x " if heads else ""
        what = "with scales" if fixed else f"x {element} bytes"
        lines.append(f"{count} planes {name}: {of}{width} {what} = {size:,} bytes a token")
    return lines
