"""The policies side by side: ours, and the rivals that exist in the replay only.

    static            the request's maximum
    s3                ten equal-width buckets, preempt on overflow and double
    odma              the paper's: predicted quantile, learnt limits, overflow copies
    elastic           grow in place, by relocation, by compaction; one ordered stream
    elastic-streams   the same on several streams: disjoint copies, completion a step late
    elastic-reuse     elastic, with beginnings adopted or gathered, where a trace has their ids
    grow-copy         grow in place or by copying to a hole; nobody else moves
    oracle            the exact total is reserved; nothing moves
    extents-K         at most K runs for each request, and no block table
    ideal-N           pages of N tokens, read at full bandwidth
    ideal-best        ideal-16 with the headroom that turns out best on the very load,
                      in the window that is reported
    paged-N           pages of N tokens at the bandwidth that the LPDDR emulation gives them
    ideal-16-prefix   ideal-16 with a cache of blocks, where a trace has their ids
    ideal-16-prefix-once  the same with kernels that read a shared page once a step for all
    paged-16-prefix   paged-16 with such a cache

No other policy reuses prefixes. Their free parameters are in tuned.json, set by one rule on
training traces (tune.py); a report names the hash of that file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from odma_service.errors import InvalidError
from odma_service.pool.policy import (
    PolicyRecord,
    equal_limits,
    longest_tokens,
    named,
    rising_limits,
)
from odma_service.replay.arena import ArenaMemory
from odma_service.replay.keys import granule_for
from odma_service.replay.load import BLOCK_TOKENS, LARGEST_PAGE_TOKENS, Limits, Load
from odma_service.replay.memory import Memory
from odma_service.replay.pooled import EngineKind
from odma_service.replay.predict import predictor
from odma_service.replay.prices import Serving
from odma_service.replay.rivals.extents import ExtentMemory
from odma_service.replay.rivals.paging import UNLIMITED_TOKENS, PagedMemory
from odma_service.replay.rivals.prefix import PrefixMemory
from odma_service.values import Moves, Overflow, TenantShare

TUNED = Path(__file__).with_name("tuned.json")
PAGES = (16, 64, LARGEST_PAGE_TOKENS)
IDEAL = "ideal-16"
REUSE = "elastic-reuse"
REUSE_IDEAL = "ideal-16-prefix"
UNLIMITED = "unlimited"
IDEAL_BEST = "ideal-best"
HINDSIGHT_SHARES = (0.01, 0.02, 0.03, 0.05, 0.08)
ALIASES = {"paged": "paged-16", "ideal": IDEAL}

Parameters = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class ArenaPolicy:
    """A policy record over a real arena, the engine it is for, and what it predicts by."""

    record: str
    kind: EngineKind
    predictor: str = "live"
    exact_lengths: bool = False


ARENA_POLICIES = {
    "static": ArenaPolicy("static", EngineKind(Moves.NONE)),
    "s3": ArenaPolicy("s3", EngineKind(Moves.NONE), predictor="lognormal:0.5"),
    "odma": ArenaPolicy("odma", EngineKind(Moves.OWN_GROWTH)),
    "elastic": ArenaPolicy("elastic", EngineKind(Moves.ANY)),
    "elastic-streams": ArenaPolicy(
        "elastic", EngineKind(Moves.ANY, single_stream=False, copies_may_overlap=False)
    ),
    REUSE: ArenaPolicy("elastic", EngineKind(Moves.ANY)),
    "grow-copy": ArenaPolicy("elastic", EngineKind(Moves.OWN_GROWTH)),
    "oracle": ArenaPolicy("static", EngineKind(Moves.NONE), exact_lengths=True),
}
PAGED_POLICIES = tuple(f"{kind}-{page}" for kind in ("ideal", "paged") for page in PAGES)
EXTENT_POLICIES = {"extents-2": 2, "extents-4": 4}
PREFIX_POLICIES = (REUSE_IDEAL, "ideal-16-prefix-once", "paged-16-prefix")
NAMES = (*ARENA_POLICIES, *EXTENT_POLICIES, *PAGED_POLICIES, *PREFIX_POLICIES, IDEAL_BEST)
PREDICTING = ("s3", "odma")


@dataclass(frozen=True, slots=True)
class Tuning:
    """The free parameters of every policy, and the hash of the file they come from."""

    parameters: Mapping[str, Parameters]
    digest: str

    def of(self, name: str) -> Parameters:
        """Return the parameters of a policy; those without any have none."""
        return self.parameters.get(name, {})


def read_tuning(path: Path = TUNED) -> Tuning:
    """Return the parameters in a file. Raises InvalidError for one that is none."""
    try:
        text = path.read_bytes()
        parameters = json.loads(text)
    except (OSError, ValueError) as error:
        raise InvalidError("parameters", f"{path}: {error}") from None
    if not isinstance(parameters, dict) or not parameters.keys() <= set(NAMES):
        raise InvalidError("parameters", f"{path}: an object by policy: {', '.join(NAMES)}")
    return Tuning(parameters, sha256(text).hexdigest()[:16])


def check_name(name: str) -> str:
    """Return the full name of a policy. Raises InvalidError if there is none such."""
    full = ALIASES.get(name, name)
    if full not in NAMES:
        raise InvalidError("policy", f"one of {', '.join(NAMES)}, not {name!r}")
    return full


def record_of(name: str, limits: Limits, parameters: Parameters) -> PolicyRecord:
    """Return the policy record of an arena policy with its free parameters set.

    Parameters are fields of the record, and three more: `buckets` is how many limits there
    are at first, `equal_width` 1 spaces them equally, and `learns` 0 keeps limits and safety
    share as they are.
    """
    base = named(ARENA_POLICIES[name].record, limits.model_length_tokens, limits.capacity_tokens)
    longest = longest_tokens(limits.model_length_tokens, limits.capacity_tokens)
    changes: dict[str, object] = dict(parameters)
    if "step_tokens" in changes:
        changes["step_tokens"] = int(parameters["step_tokens"])
    buckets = int(parameters.get("buckets", len(base.limits_tokens)))
    spaced = equal_limits if parameters.get("equal_width", name == "s3") else rising_limits
    if base.limits_tokens:
        changes["limits_tokens"] = spaced(longest, buckets)
    if name == "grow-copy":
        changes |= {"name": name, "overflow": Overflow.RELOCATE}
    if parameters.get("learns") == 0:
        changes["name"] = f"{name}-fixed"
    for own in ("buckets", "equal_width", "learns"):
        changes.pop(own, None)
    return replace(base, **changes)  # type: ignore[arg-type]


@contextmanager
def memory_of(
    name: str,
    load: Load,
    serving: Serving,
    parameters: Parameters,
    directory: Path,
    *,
    predictor_name: str | None = None,
    seed: int = 0,
    batch_cap: int = 256,
    tenants: tuple[TenantShare, ...] = (),
    moves: Moves | None = None,
    granule_tokens: int = 0,
) -> Iterator[Memory]:
    """Give the memory of a policy for one run; an arena's file lies in `directory`.

    Only policies over an arena know of tenants' shares, and of an engine whose `moves` are others
    than those that the policy is for. granule_tokens 0: the trace's blocks.
    """
    capacity = load.limits.capacity_tokens
    if name == UNLIMITED:
        yield PagedMemory(UNLIMITED_TOKENS, PAGES[0], 0.0)
        return
    headroom = parameters.get("headroom_share", 0.0)
    if name in (*PAGED_POLICIES, *PREFIX_POLICIES):
        kind, page = name.split("-")[:2]
        share = serving.page_share(int(page)) if kind == "paged" else 1.0
        if name in PREFIX_POLICIES:
            once = name.endswith("-once")
            yield PrefixMemory(
                capacity, int(page), headroom, share, load.block_tokens, reads_once=once
            )
        else:
            yield PagedMemory(capacity, int(page), headroom, share)
        return
    if name in EXTENT_POLICIES:
        step_tokens = int(parameters.get("step_tokens", BLOCK_TOKENS))
        yield ExtentMemory(capacity, EXTENT_POLICIES[name], step_tokens, headroom)
        return
    policy = ARENA_POLICIES[name]
    engine = policy.kind
    if name == REUSE:
        engine = replace(engine, granule_tokens=granule_tokens or granule_for(load.block_tokens))
    chosen = predictor_name if predictor_name and name in PREDICTING else policy.predictor
    with ArenaMemory(
        directory,
        load.limits,
        serving,
        replace(record_of(name, load.limits, parameters), tenants=tenants),
        engine if moves is None else replace(engine, moves=moves),
        predictor(chosen, load, seed),
        exact_lengths=policy.exact_lengths,
        batch_cap=batch_cap,
        block_tokens=load.block_tokens,
    ) as memory:
        yield memory
