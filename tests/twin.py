"""A pool too simple to be wrong: a list with the owner of every block.

The twin chooses nothing. It is given each batch together with the arena's answer,
checks that the answer keeps every promise of the contract, and takes it over. Where
the contract leaves a choice open (which of two equal holes, who makes way) the arena's
choice is checked and followed.

Answers tell places as after the whole batch. The walk through a batch knows the places
in between until a region has moved at a time that the answer does not tell; from there
on it knows lengths only, and the places again at the end. A batch of one operation is
always known exactly.
"""

from __future__ import annotations

from collections import Counter
from copy import copy as shallow
from dataclasses import dataclass
from itertools import groupby, pairwise
from math import ceil, expm1, floor, isfinite, log1p

import numpy as np

from odma_service.values import (
    QUANTILE_LEVELS,
    Allocate,
    End,
    Extend,
    Free,
    Freed,
    Moves,
    Overflow,
    Place,
    Reason,
    Refusal,
    Start,
    Trim,
)

FREE = 0  # an owner; a handle owns what it holds, and -n is a run that waits for answer n
EVER = 2**62
FUZZ = 1e-9  # of the last digits of a product or a logarithm


@dataclass
class Region:
    """A live region; places in blocks, `used` in tokens."""

    handle: int
    op: Allocate
    prediction: tuple | None
    maximum: int
    birth: int
    start: int
    length: int
    used: int


def free_runs(owner, waiting_too=False):
    """Return (start, length) of every run that is free, or will be once all waiting is over."""
    runs, at = [], 0
    for free, cells in groupby(owner, lambda who: who == FREE or (waiting_too and who < FREE)):
        length = len(list(cells))
        if free:
            runs.append((at, length))
        at += length
    return runs


def longest(runs):
    return max((length for _, length in runs), default=0)


# --- lengths ---


def up(tokens, unit):
    return -(-tokens // unit)


def output_at(prediction, risk, most):
    """Output tokens exceeded with probability `risk`: linear in the level and log(1 + tokens)."""
    level = 1 - risk
    points = [(0.0, prediction[0]), *zip(QUANTILE_LEVELS, prediction, strict=True)]
    points.append((1.0, max(most, prediction[-1])))
    if prediction[-1] >= most and level > QUANTILE_LEVELS[-1]:
        return most
    for (low, few), (high, many) in pairwise(points):
        if level <= high:
            part = (level - low) / (high - low)
            return expm1(log1p(few) + part * (log1p(many) - log1p(few)))
    raise AssertionError(level)


def rounded(policy, tokens, maximum, block_tokens):
    """Blocks by the policy: the smallest limit, else a multiple of step, never above maximum."""
    tokens = ceil(tokens)
    limits = [limit for limit in policy.limits_tokens if limit >= tokens]
    length = limits[0] if limits else up(tokens, policy.step_tokens) * policy.step_tokens
    return up(min(length, maximum), block_tokens)


def allowed_blocks(policy, tokens, maximum, block_tokens):
    """The same, where the last digit of `tokens` may be off."""
    return {
        rounded(policy, max(1, tokens * (1 + error)), maximum, block_tokens)
        for error in (-FUZZ, 0, FUZZ)
    }


def first_blocks(policy, op, prediction, maximum, block_tokens):
    """What a new region may measure."""
    held = op.prompt_tokens + op.generated_tokens
    start = maximum
    if policy.start == Start.STEP:
        start = held + policy.step_tokens
    elif policy.start == Start.QUANTILE and prediction is not None:
        risk = policy.overflow_risk if op.overflow_risk is None else op.overflow_risk
        most = maximum - op.prompt_tokens
        start = max(held + 1, op.prompt_tokens + output_at(prediction, risk, most))
    if op.generated_tokens:
        start = max(start, held * policy.growth)
    return allowed_blocks(policy, start, maximum, block_tokens)


def grown_blocks(policy, least, want, maximum, block_tokens):
    """What a region may measure that has to hold `least`, from the shortest up."""
    if want:
        return {min(up(want, block_tokens), up(maximum, block_tokens))}
    least_blocks = up(least, block_tokens)
    targets = allowed_blocks(policy, least * policy.growth, maximum, block_tokens)
    return {max(least_blocks, target) for target in targets}


# --- memory ---


class Memory:
    """The device's memory, one plane of it: a token's name is its region's birth and its index."""

    def __init__(self, tokens):
        self.cells = np.full(tokens, -1, np.int64)

    @staticmethod
    def names(region):
        return (region.birth << 24) + np.arange(region.used)

    def write(self, region, start_token, first):
        names = self.names(region)[first:]
        self.cells[start_token + first : start_token + first + len(names)] = names

    def run(self, copies, regions, block_tokens, dead):
        """Execute `copies` one by one; after each, every live token is where it should be."""
        places = {
            handle: region.start * block_tokens + np.arange(region.used)
            for handle, region in regions.items()
        }
        carried = Counter()
        for copy in copies:
            where = places.get(copy.handle)
            assert where is not None, f"a copy of a region that has no tokens: {copy}"
            source = slice(copy.from_token, copy.from_token + copy.tokens)
            target = slice(copy.to_token, copy.to_token + copy.tokens)
            assert copy.tokens > 0 and max(source.stop, target.stop) <= len(self.cells), copy
            overlaps = abs(copy.from_token - copy.to_token) < copy.tokens
            assert copy.overlaps == overlaps, f"wrong about its overlap: {copy}"
            self.cells[target] = self.cells[source].copy()
            taken = (where >= source.start) & (where < source.stop)
            assert taken.sum() == copy.tokens, f"carries what is not its region's: {copy}"
            where[taken] += copy.to_token - copy.from_token
            carried[copy.handle] += copy.tokens
            for handle, region in regions.items():
                if handle not in dead:
                    same = self.cells[places[handle]] == self.names(region)
                    assert same.all(), f"tokens of {handle} are lost after {copy}"
        for handle, tokens in carried.items():
            assert tokens % regions[handle].used == 0, f"{handle}: copied {tokens} tokens"
        return {handle: where[0] for handle, where in places.items() if len(where)}, carried


# --- the walk through a batch ---


class Walk:
    """The books during a batch, operation by operation.

    `restless` says that regions may have been slid at times the answer does not tell.
    """

    def __init__(self, twin, ops, results, predictions, restless, unary=False):
        self.twin, self.policy, self.engine = twin, twin.policy, twin.engine
        self.geometry, self.unit = twin.geometry, twin.geometry.block_tokens
        self.ops, self.results, self.predictions = ops, results, predictions
        self.unary, self.restless = unary, restless
        self.owner = list(twin.owner)
        self.regions = {handle: shallow(region) for handle, region in twin.regions.items()}
        self.issued = set(twin.issued)
        self.births = twin.births
        self.pinned = set()
        self.budget = EVER
        self.known = True
        self.refused = self.needed_moves = False
        self.relocated = set()
        self.counts = Counter()
        self.learnt = []
        placed = [i for i, result in enumerate(results) if isinstance(result, Place)]
        self.growths = [i for i in placed if isinstance(ops[i], Allocate | Extend)]
        self.grown = Counter(results[i].handle for i in self.growths)

    # what there is

    @property
    def waits(self):
        return not (self.engine.single_ordered_stream or self.unary)

    @property
    def slides(self):
        """Whether the engine and the policy let regions make way for each other."""
        return (
            self.engine.moves == Moves.ANY
            and self.policy.overflow == Overflow.COMPACT
            and self.engine.single_ordered_stream
            and not self.unary
        )

    @property
    def relocates(self):
        """Whether they let a region that grows go elsewhere."""
        return (
            self.engine.moves != Moves.NONE
            and self.policy.overflow != Overflow.PREEMPT
            and not self.unary
        )

    @property
    def waiting(self):
        return sum(who < FREE for who in self.owner) if self.known else 0

    @property
    def free(self):
        """Free blocks; where places are unknown, without waiting runs, lengths tell."""
        if self.known:
            return self.owner.count(FREE)
        return self.geometry.blocks - sum(region.length for region in self.regions.values())

    @property
    def counted(self):
        return self.known or not self.waits

    def in_tokens(self, place):
        return place.start_token // self.unit, place.length_tokens // self.unit

    def hand_over(self, start, length, who):
        self.owner[start : start + length] = [who] * length

    def vacate(self, start, length):
        self.hand_over(start, length, -self.twin.walked_seq if self.waits else FREE)

    # walking

    def all(self):
        for i, (op, result) in enumerate(zip(self.ops, self.results, strict=True)):
            context = f"operation {i}: {op} -> {result}"
            try:
                self.one(i, op, result)
            except AssertionError as error:
                raise AssertionError(f"{error}\n{context}") from None

    def one(self, i, op, result):
        if isinstance(result, Refusal):
            self.refusal_details(op, result)
        if isinstance(op, Free):
            self.free_op(op, result)
        elif isinstance(op, Trim):
            self.trim_op(op, result)
        elif isinstance(op, Extend):
            self.extend_op(i, op, result)
        else:
            self.allocate_op(i, op, result)

    def refusal_details(self, op, result):
        if self.known:
            seen = (
                result.free_tokens,
                result.largest_run_tokens,
                result.awaiting_completion_tokens,
            )
            true = (self.free, longest(free_runs(self.owner)), self.waiting)
            if result.reason not in (Reason.INVALID, Reason.NOT_FOUND, Reason.SKIPPED) or any(seen):
                assert seen == tuple(self.unit * blocks for blocks in true), f"{seen} != {true}"
        assert bool(result.copy_tokens_needed) <= (result.reason == Reason.COPY_BUDGET)
        assert bool(result.field) == (result.reason in (Reason.INVALID, Reason.NOT_FOUND))
        if not isinstance(op, Extend) or result.reason in (Reason.INVALID, Reason.NOT_FOUND):
            assert result.preempt_handle == 0, "nobody should be preempted for this"

    def faulty(self, result, reasons):
        """Whether the operation breaks rules, which the result then has to say."""
        if not reasons:
            assert not (
                isinstance(result, Refusal) and result.reason in (Reason.INVALID, Reason.NOT_FOUND)
            ), "nothing is wrong with it"
            return False
        assert isinstance(result, Refusal), f"it breaks rules: {reasons}"
        told = (result.reason, result.field.partition(":")[0])
        assert told in reasons, f"it breaks other rules: {reasons}"
        return True

    def handle_faults(self, handle):
        if handle in self.regions:
            return set()
        return {(Reason.NOT_FOUND, "handle")}

    def free_op(self, op, result):
        faults = set()
        if op.end not in tuple(End):
            faults.add((Reason.INVALID, "end"))
        if op.output_tokens > 2**24:
            faults.add((Reason.INVALID, "output_tokens"))
        if op.handle not in self.issued:
            faults.add((Reason.NOT_FOUND, "handle"))
        if self.faulty(result, faults):
            return
        assert isinstance(result, Freed)
        assert result.already_free == (op.handle not in self.regions)
        if result.already_free:
            return
        region = self.regions.pop(op.handle)
        if self.known:
            self.vacate(region.start, region.length)
        self.counts["frees"] += 1
        self.counts["preempted"] += op.end == End.PREEMPTED
        self.counts["finished"] += op.end == End.FINISHED
        self.counts["hit_limit"] += op.end == End.HIT_LIMIT
        if op.end in (End.FINISHED, End.HIT_LIMIT):
            self.learnt.append((region, op.output_tokens, op.end == End.HIT_LIMIT))

    def trim_op(self, op, result):
        faults = self.handle_faults(op.handle)
        if not faults:
            region = self.regions[op.handle]
            if not max(1, region.used) <= op.to_tokens <= region.length * self.unit:
                faults.add((Reason.INVALID, "to_tokens"))
        if self.faulty(result, faults):
            return
        assert isinstance(result, Place) and result.handle == op.handle
        blocks = up(op.to_tokens, self.unit)
        if self.known and blocks < region.length:
            self.vacate(region.start + blocks, region.length - blocks)
        region.length = blocks
        self.counts["trims"] += 1

    # growth

    def exactly(self, i, handle):
        """Whether operation i's place in the answer is the one it was given."""
        alone = not self.restless or self.growths == [i]
        return self.known and alone and self.grown[handle] == 1

    def settle(self, i, region, start, length):
        """Take over the place that a growth was given."""
        handle = region.handle
        exact = self.exactly(i, handle)
        if exact and start != region.start and region.start >= 0:
            self.relocated.add(handle)
        if exact and not self.needed_moves:
            fresh = [FREE, handle] if not self.waits or region.used == 0 else [FREE]
            if start == region.start:
                fresh = [FREE, handle]
            assert all(who in fresh for who in self.owner[start : start + length]), (
                f"[{start}, +{length}) is not free"
            )
            if start != region.start and region.start >= 0:
                self.vacate(region.start, region.length)
            self.hand_over(start, length, handle)
        if self.restless or not exact:
            self.known = False
        region.start, region.length = start, length

    def in_best_hole(self, start, length):
        """Whether [start, start + length) lies in the shortest hole that fits."""
        fitting = [run for run in free_runs(self.owner) if run[1] >= length]
        holes = [run for run in fitting if run[0] <= start and start + length <= run[0] + run[1]]
        return bool(holes) and holes[0][1] == min(size for _, size in fitting)

    def extend_faults(self, op):
        faults = self.handle_faults(op.handle)
        if not faults:
            maximum = up(self.regions[op.handle].maximum, self.unit) * self.unit
            if not 1 <= op.least_tokens <= maximum:
                faults.add((Reason.INVALID, "least_tokens"))
            if op.want_tokens and not op.least_tokens <= op.want_tokens <= 2**28:
                faults.add((Reason.INVALID, "want_tokens"))
        return faults

    def extend_op(self, i, op, result):
        if self.faulty(result, self.extend_faults(op)):
            return
        region = self.regions[op.handle]
        least = up(op.least_tokens, self.unit)
        targets = grown_blocks(
            self.policy, op.least_tokens, op.want_tokens, region.maximum, self.unit
        )
        if isinstance(result, Refusal):
            assert least > region.length, "it is long enough"
            self.extend_refused(region, least, result)
            return
        assert isinstance(result, Place) and result.handle == op.handle
        start, length = self.in_tokens(result)
        if least <= region.length and (not op.want_tokens or max(targets) <= region.length):
            self.counts["extends"] += 1
            return
        last = self.grown[op.handle] == 1 and not self.trimmed_later(i, op.handle) and length
        if not last:
            length = max(region.length, max(targets))
        assert max(least, region.length) <= length <= max(max(targets), region.length), (
            f"{least} to {targets} blocks, not {length}"
        )
        if length > region.length:
            self.extend_placed(i, region, start, length, targets)
        self.counts["extends"] += 1

    def extend_placed(self, i, region, start, length, targets):
        if self.exactly(i, region.handle):
            behind = self.free_behind(region)
            if start != region.start:
                assert self.relocates and region.handle not in self.pinned, "it may not move"
                assert behind < max(targets) - region.length, "it could have grown in place"
                own = range(region.start, region.start + region.length)
                slid = start + length > own.start and start < own.stop
                if slid or not self.in_best_hole(start, length):
                    assert self.slides, "not the best hole"
                    self.needed_moves = True
            elif behind < length - region.length:
                assert self.slides, "no room behind it, and none may make way"
                self.needed_moves = True
        if self.known:
            assert self.free >= length - region.length or self.relocates
        self.settle(i, region, start, length)

    def trimmed_later(self, i, handle):
        return any(isinstance(op, Trim) and op.handle == handle for op in self.ops[i + 1 :])

    def free_behind(self, region):
        end = region.start + region.length
        stop = end
        while stop < len(self.owner) and self.owner[stop] == FREE:
            stop += 1
        return stop - end

    # allocation

    def maximum_of(self, op):
        capacity = self.geometry.blocks * self.unit
        if op.max_total_tokens is None:
            return min(self.geometry.model_length_tokens, capacity)
        return op.max_total_tokens

    def allocate_faults(self, op, prediction):
        faults = set()
        maximum = self.maximum_of(op)
        if not (op.request_id and "\0" not in op.request_id and len(op.request_id.encode()) <= 64):
            faults.add((Reason.INVALID, "request_id"))
        if not 1 <= maximum <= self.geometry.blocks * self.unit:
            faults.add((Reason.INVALID, "max_total_tokens"))
        if op.prompt_tokens < 1 or op.prompt_tokens + op.generated_tokens > maximum:
            faults.add((Reason.INVALID, "prompt_tokens"))
        if op.overflow_risk is not None and not 0 <= op.overflow_risk <= 1:
            faults.add((Reason.INVALID, "overflow_risk"))
        for field in ("request_class", "tenant"):
            if len(getattr(op, field).encode()) > 32 or "\0" in getattr(op, field):
                faults.add((Reason.INVALID, field))
        if prediction is not None and not (
            all(isfinite(value) and value >= 0 for value in prediction)
            and all(a <= b for a, b in pairwise(prediction))
        ):
            faults.add((Reason.INVALID, "prediction"))
        return faults

    def same_request(self, op):
        for region in self.regions.values():
            if region.op.request_id == op.request_id:
                return region
        return None

    def allocate_op(self, i, op, result):
        prediction = self.predictions[i]
        if isinstance(result, Refusal) and result.reason == Reason.SKIPPED:
            assert self.refused and not self.twin.passing, "nothing was refused before it"
            return
        assert not (self.refused and not self.twin.passing), "it should have been skipped"
        if self.faulty(result, self.allocate_faults(op, prediction)):
            return
        living = self.same_request(op)
        if living is not None:
            self.asked_again(living, op, result)
            return
        sizes = first_blocks(self.policy, op, prediction, self.maximum_of(op), self.unit)
        if isinstance(result, Refusal):
            self.allocate_refused(op, prediction, sizes, result)
            return
        assert isinstance(result, Place) and result.handle not in self.issued, "a used handle"
        start, length = self.in_tokens(result)
        if not length or self.grown[result.handle] > 1 or self.trimmed_later(i, result.handle):
            length = max(sizes)
        assert length in sizes, f"{sizes} blocks by the policy, not {length}"
        self.allocate_placed(i, op, prediction, result.handle, start, length)

    def asked_again(self, living, op, result):
        same = [
            getattr(op, field) == getattr(living.op, field)
            for field in ("prompt_tokens", "generated_tokens")
        ]
        if all(same) and self.maximum_of(op) == living.maximum:
            assert isinstance(result, Place) and result.handle == living.handle, "it lives"
        else:
            assert isinstance(result, Refusal) and result.reason == Reason.INVALID
            assert result.field.startswith("request_id")

    def allocate_placed(self, i, op, prediction, handle, start, length):
        assert len(self.regions) < self.geometry.max_regions, "the table is full"
        if self.counted:
            assert self.free >= length, "too few are free"
            assert self.admitted(prediction, length), "it is the safety pool"
        assert self.within_quota(op, length), "the tenant has its share"
        region = Region(
            handle, op, prediction, self.maximum_of(op), self.births, -1, length, used=0
        )
        if self.exactly(i, handle):
            if longest(free_runs(self.owner)) < length:
                assert self.slides, "nothing fits, and none may make way"
                self.needed_moves = True
            else:
                assert self.in_best_hole(start, length), "not the best hole"
        self.births += 1
        self.issued.add(handle)
        self.settle(i, region, start, length)
        self.regions[handle] = region
        self.counts["allocates"] += 1

    def unsure(self, prediction):
        if prediction is None or self.policy.unsure_ratio == 0:
            return False
        return prediction[5] / max(1, prediction[2]) > self.policy.unsure_ratio

    def admitted(self, prediction, length):
        share = self.twin.safety_blocks
        return not self.regions or self.unsure(prediction) or self.free - length >= share

    def held_by(self, tenant):
        return sum(
            region.length for region in self.regions.values() if region.op.tenant == tenant
        )

    def within_quota(self, op, length):
        most = self.policy.tenant_share * self.geometry.blocks
        return self.held_by(op.tenant) + length <= most * (1 + FUZZ)

    # refusals

    def allocate_refused(self, op, prediction, sizes, result):
        length = max(sizes)
        self.refused = True
        self.counts["refused_allocates"] += 1
        reason = result.reason
        if reason == Reason.TABLE_FULL:
            assert len(self.regions) >= self.geometry.max_regions or self.waiting, "it is not"
        elif reason == Reason.QUOTA:
            most = self.policy.tenant_share * self.geometry.blocks
            assert self.held_by(op.tenant) + length > most * (1 - FUZZ), "the quota is kept"
        elif reason == Reason.SAFETY_SHARE:
            assert self.regions and not self.unsure(prediction), "the share is not for it"
            if self.counted:
                assert self.free - min(sizes) < self.twin.safety_blocks, "the share is kept"
        else:
            self.lacking(result, length, length, None)

    def extend_refused(self, region, least, result):
        self.refused = True
        self.counts["refused_extends"] += 1
        oldest_first = sorted(self.regions.values(), key=lambda region: region.birth)
        advice = [other.handle for other in oldest_first[1:] if other.handle not in self.pinned]
        expected = advice[-1] if advice else 0
        assert result.preempt_handle == expected, f"preempt {expected}"
        if result.reason == Reason.TABLE_FULL:
            assert self.waits and self.waiting or not self.known, "no run waits"
            return
        self.lacking(result, least - region.length, least, region)

    def lacking(self, result, blocks, length, region):
        """Check that a run of `length`, or `blocks` behind `region`, could not be had."""
        reason = result.reason
        assert reason in (
            Reason.NO_SPACE,
            Reason.FRAGMENTED,
            Reason.COPY_BUDGET,
            Reason.WAITS_FOR_COMPLETION,
            Reason.PINNED,
        ), "that is no reason"
        if reason == Reason.PINNED:
            assert self.pinned and (self.slides or self.relocates), "no pin is in the way"
        if reason == Reason.COPY_BUDGET:
            assert self.slides or (region is not None and self.relocates), "it needs no copies"
            assert self.bounded, "copies are unlimited"
            assert result.copy_tokens_needed or self.geometry.max_copies < EVER
        if self.counted:
            assert (reason == Reason.NO_SPACE) <= (self.free < blocks), "enough are free"
            if self.free >= blocks and self.slides and not self.pinned and not self.bounded:
                raise AssertionError("making way would have won enough")
        if not self.known:
            return
        runs = free_runs(self.owner)
        if region is None:
            assert longest(runs) < length, "a hole fits"
        else:
            assert self.free_behind(region) < blocks, "there is room behind it"
            free_to_go = region.handle not in self.pinned and region.handle not in self.relocated
            if self.relocates and free_to_go and longest(runs) >= length:
                assert reason == Reason.COPY_BUDGET, "a hole fits"
                assert self.budget < region.used or self.geometry.max_copies < EVER
        self.lack_is_told_right(reason, blocks, length, region, runs)

    def lack_is_told_right(self, reason, blocks, length, region, runs):
        later = free_runs(self.owner, waiting_too=True)
        if reason == Reason.WAITS_FOR_COMPLETION:
            assert self.waiting, "nothing waits"
            if region is None:
                assert self.free + self.waiting >= length, "what waits would not do"
        if reason == Reason.NO_SPACE:
            assert self.free + self.waiting < blocks, "what waits would do"
        if reason == Reason.FRAGMENTED:
            assert self.free >= blocks, "too few are free"
            assert longest(later) < length, "what waits would do"

    @property
    def bounded(self):
        """Whether copies are limited so that a plan could fail for it."""
        tokens = 2 * sum(region.used for region in self.regions.values())
        pieces = self.geometry.blocks * (len(self.ops) + 1)
        return self.budget < tokens or self.geometry.max_copies < pieces


# --- the twin ---


class Twin:
    """What a pool's books have to be, and the memory of its engine."""

    def __init__(self, geometry, policy):
        self.geometry, self.policy, self.engine = geometry, policy, None
        self.memory = Memory(geometry.blocks * geometry.block_tokens)
        self.births = 0
        self.counters = Counter()
        self.completions = []
        self.forget()

    def forget(self):
        """Begin with empty books."""
        self.owner = [FREE] * self.geometry.blocks
        self.regions, self.issued = {}, set()
        self.seq = self.completed_seq = 0
        self.written = Counter()
        self.last = None

    @property
    def safety_blocks(self):
        return ceil(self.policy.safety_share * self.geometry.blocks)
