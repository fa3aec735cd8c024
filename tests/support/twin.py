"""A pool written a second time: a list with the owner of every block, and the contract.

The twin chooses nothing. It is given each batch together with the arena's answer,
checks that the answer keeps every promise of the contract, and takes it over. Where
the contract leaves a choice open (which of two equal holes, who makes way) the arena's
choice is checked and followed.

Answers tell places as after the whole batch. The walk through a batch knows the places
in between until a region has moved at a time that the answer does not tell; from there
on it knows lengths only, and the places again at the end. A batch of one operation is
always known exactly. Longer ones are followed as far as that goes, for a rule may hold for
the first operation of a batch and fail for the second.

Kept runs are free blocks here, or blocks that wait, so every rule about refusals is also the
rule that keeping refuses nobody. What they hold is read from the memory: a token of a granule
that has a key is named by that key, so it can be seen whether a run holds what it is kept for,
and whether a region holds what is said to need no prefill.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from copy import copy as shallow
from dataclasses import dataclass
from itertools import groupby, pairwise
from math import ceil, expm1, isfinite, log1p

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
FUZZ = 1e-9  # of the last digits of a product or a logarithm
CLASSES, RING = 64, 256
MISTAKES = (Reason.INVALID, Reason.NOT_FOUND)
KEY = 16
NAMED = 512  # names of one key's tokens
CLAIM_CALLS = 4096  # that a claim stands for; one that changed something counts for 64
CHANGE_CALLS = 64


@dataclass
class Region:
    """A live region. Its place is in blocks; `said` is what the batch called used, None: full."""

    handle: int
    op: Allocate
    prediction: tuple[float, ...] | None
    maximum: int
    birth: int
    start: int
    length: int
    said: int | None
    keys: tuple[int, ...] = ()  # names of its granules' keys
    chain: bytes = b""  # the last of its keys
    keyed: int = 0  # granules that others may reuse
    reused: int = 0  # tokens that it found written
    void: bool = False  # a Reconcile has taken its keys

    def used(self, block_tokens):
        return self.length * block_tokens if self.said is None else self.said

    def carried(self, block_tokens, granule):
        """What a move has to carry: what is used, reused, or may be reused by others."""
        return max(self.used(block_tokens), self.reused, self.keyed * granule)


def free_runs(owner, waiting_too=False):
    """Return (start, length) of every run that is free, or will be once nothing waits."""
    runs, at = [], 0
    for free, cells in groupby(owner, lambda who: who == FREE or (waiting_too and who < FREE)):
        length = sum(1 for _ in cells)
        if free:
            runs.append((at, length))
        at += length
    return runs


def longest(runs):
    return max((length for _, length in runs), default=0)


def changes(results):
    """Whether a result says that something was changed."""
    return any(isinstance(r, Place) or r == Freed(already_free=False) for r in results)


# --- lengths ---


def up(tokens, unit):
    return -(-tokens // unit)


def output_at(prediction, risk, most):
    """Output tokens exceeded with probability `risk`: linear in the level and in log(1 + tokens).

    Flat below the first quantile; beyond the last one it goes on to `most`.
    """
    level, last = 1 - risk, prediction[-1]
    points = [(0.0, prediction[0]), *zip(QUANTILE_LEVELS, prediction, strict=True), (1.0, most)]
    if level > QUANTILE_LEVELS[-1] and last >= most:
        return most
    (low, few), (high, many) = next(pair for pair in pairwise(points) if level <= pair[1][0])
    part = (level - low) / (high - low)
    return expm1(log1p(few) + part * (log1p(many) - log1p(few)))


def rounded(policy, tokens, maximum, unit):
    """Blocks by the policy: the smallest limit, else a multiple of step, never above maximum."""
    tokens = ceil(tokens)
    limits = [limit for limit in policy.limits_tokens if limit >= tokens]
    length = limits[0] if limits else up(tokens, policy.step_tokens) * policy.step_tokens
    return up(min(length, maximum), unit)


def first_blocks(policy, op, prediction, maximum, unit):
    """What a new region should measure, and may: the last digit of a logarithm may be off."""
    held = op.prompt_tokens + op.generated_tokens
    least = held * policy.growth if op.generated_tokens else 0
    starts = [maximum]
    if policy.start == Start.STEP:
        starts = [held + policy.step_tokens]
    elif policy.start == Start.QUANTILE and prediction is not None:
        risk = policy.overflow_risk if op.overflow_risk is None else op.overflow_risk
        output = output_at(prediction, risk, maximum - op.prompt_tokens)
        about = (output, output * (1 - FUZZ), output * (1 + FUZZ))
        starts = [max(held + 1, op.prompt_tokens + tokens) for tokens in about]
    return [rounded(policy, max(start, least), maximum, unit) for start in starts]


def aim_blocks(policy, op, maximum, unit):
    """What a region that is extended should measure, if there is room enough."""
    if op.want_tokens:
        return min(up(op.want_tokens, unit), up(maximum, unit))
    grown = rounded(policy, op.least_tokens * policy.growth, maximum, unit)
    return max(up(op.least_tokens, unit), grown)


# --- memory ---


class Memory:
    """One plane of the device's memory.

    A token's name is its region's birth and its index; in a granule that has a key it is that
    key and its index there, below 0.
    """

    def __init__(self, tokens, granule):
        self.cells = np.full(tokens, -1, np.int64)
        self.granule = granule

    def names(self, region, first, last):
        """Return the names of the tokens [first, last) of a region."""
        tokens = np.arange(first, last)
        if not region.keys or first >= last:
            return (region.birth << 24) + tokens
        granules = np.minimum(tokens // self.granule, len(region.keys) - 1)
        by_key = -2 - (np.array(region.keys)[granules] * NAMED + tokens % self.granule)
        has_key = tokens < len(region.keys) * self.granule
        return np.where(has_key, by_key, (region.birth << 24) + tokens)

    def write(self, region, start_token, first, last):
        """Let a region have its tokens [first, last)."""
        self.cells[start_token + first : start_token + last] = self.names(region, first, last)

    def holds(self, region, start_token, last):
        """Whether the tokens [0, last) of a region are there."""
        there = self.cells[start_token : start_token + last]
        return bool((there == self.names(region, 0, last)).all())

    def run(self, copies, regions, unit, dead):
        """Execute `copies`; after each of them every live token is where it should be.

        Return where the regions lie then, in tokens, and how many tokens were carried. Copies
        of regions that are new adopt or gather: what they bring is looked at in the end.
        """
        if not copies or not regions:
            for copy in copies:
                self.copy(copy)
            full = (r for r in regions.values() if r.carried(unit, self.granule))
            return {region.handle: region.start * unit for region in full}, Counter()
        parts, names, places, live, at = {}, [], [], [], 0
        for handle, region in regions.items():
            tokens = np.arange(region.carried(unit, self.granule))
            parts[handle] = slice(at, at + len(tokens))
            at += len(tokens)
            names.append(self.names(region, 0, len(tokens)))
            places.append(region.start * unit + tokens)
            live.append(np.full(len(tokens), handle not in dead))
        names, places, live = (np.concatenate(x) for x in (names, places, live))
        carried = Counter()
        for copy in copies:
            assert self.granule or copy.handle in parts, f"a copy of a new region: {copy}"
            self.copy(copy)
            if copy.handle not in parts:
                kept = (self.cells[places] == names) | ~live
                assert kept.all(), f"tokens {places[~kept]} are lost after {copy}"
                continue
            where = places[parts[copy.handle]]
            taken = (where >= copy.from_token) & (where < copy.from_token + copy.tokens)
            assert taken.sum() == copy.tokens, f"it carries what is not its region's: {copy}"
            where[taken] += copy.to_token - copy.from_token
            carried[copy.handle] += copy.tokens
            kept = (self.cells[places] == names) | ~live
            assert kept.all(), f"tokens {places[~kept]} are lost after {copy}"
        for handle, tokens in carried.items():
            used = regions[handle].carried(unit, self.granule)
            assert tokens % used == 0, f"{handle}: {tokens} tokens were copied of {used}"
        ends = {handle: places[part] for handle, part in parts.items()}
        for handle, where in ends.items():
            assert (np.diff(where) == 1).all(), f"{handle} is scattered"
        return {handle: int(where[0]) for handle, where in ends.items() if len(where)}, carried

    def copy(self, copy):
        source = slice(copy.from_token, copy.from_token + copy.tokens)
        target = slice(copy.to_token, copy.to_token + copy.tokens)
        assert copy.tokens > 0, copy
        assert max(source.stop, target.stop) <= len(self.cells), f"it leaves the arena: {copy}"
        shares = abs(copy.from_token - copy.to_token) < copy.tokens
        assert copy.overlaps == shares, f"it is wrong about its overlap: {copy}"
        self.cells[target] = self.cells[source].copy()


# --- the walk through a batch ---


class Walk:
    """The books during a batch, or a unary call, operation by operation.

    `restless` says that regions may have been moved for others, at times that the answer does
    not tell.
    """

    def __init__(self, twin, ops, results, predictions, *, unary=False):
        self.policy, self.engine, self.geometry = twin.policy, twin.engine, twin.geometry
        self.unit, self.seq = twin.geometry.block_tokens, twin.seq
        self.ops, self.results, self.predictions = ops, results, predictions
        self.unary, self.restless = unary, False
        self.pass_refused, self.pinned, self.budget, self.copied = False, set(), 0, 0
        self.safety_blocks = twin.safety_blocks

        self.owner, self.untouched = list(twin.owner), list(twin.untouched)
        self.regions = {handle: shallow(region) for handle, region in twin.regions.items()}
        self.issued, self.births = set(twin.issued), twin.births
        self.turns = twin.turns
        self.claims = dict(twin.claims)
        self.held_up = set()  # tenants of which an operation was refused
        self.asked = set()  # request ids of its new regions
        self.asked_now = set()  # their handles
        self.reuses = bool(twin.granule)
        self.granule, self.chain = twin.granule, twin.chain
        self.found = twin.standing()  # what may be reused: names of keys
        self.kept_now = []  # regions that were freed, and kept
        self.holding = False  # something may be gathered from, and is not given out before that
        self.known = True  # the places
        self.lost = False  # not even the lengths
        self.refused = False
        self.needed_moves = False  # something was placed where nothing fitted
        self.went = set()  # regions that were relocated
        self.vague = set()  # regions whose length will be known at the end
        self.counts, self.learnt, self.class_names = Counter(), [], []
        self.growths = self.find_growths()
        self.grown = Counter(results[i].handle for i in self.growths)
        self.evacuations = self.find_evacuations()

    def find_growths(self):
        """Return the operations that may have given a region its place."""
        growths, new = [], set()
        for i, (op, result) in enumerate(zip(self.ops, self.results, strict=True)):
            if not isinstance(result, Place) or isinstance(op, Trim):
                continue
            if isinstance(op, Extend) or result.handle not in self.issued | new:
                growths.append(i)
                new.add(result.handle)
        return growths

    def find_evacuations(self):
        """Return the refused operations for which others may have been moved already."""
        reason = Reason.WAITS_FOR_COMPLETION if self.evacuates else Reason.COPY_BUDGET
        return [
            i
            for i, result in enumerate(self.results)
            if (self.evacuates or self.slides)
            and isinstance(self.ops[i], Extend | Allocate)
            and isinstance(result, Refusal)
            and result.reason == reason
        ]

    def run(self):
        for i, (op, result) in enumerate(zip(self.ops, self.results, strict=True)):
            try:
                self.one(i, op, result)
            except AssertionError as error:
                raise AssertionError(f"{error}\noperation {i}: {op}\n  -> {result}") from None
        return self

    def one(self, i, op, result):
        away = self.restless and i in self.evacuations
        if isinstance(result, Refusal):
            self.check_details(op, result, changed=away)
        if isinstance(op, Free):
            self.free_op(op, result)
        elif isinstance(op, Trim):
            self.trim_op(op, result)
        elif isinstance(op, Extend):
            self.extend_op(i, op, result)
        else:
            self.allocate_op(i, op, result)
        if away:
            self.known = False

    # what there is

    @property
    def waits(self):
        """Whether what is given back has to wait for a completion."""
        return not (self.engine.single_ordered_stream or self.unary)

    @property
    def relocates(self):
        """Whether a region that grows may go elsewhere."""
        may = self.engine.moves != Moves.NONE and self.policy.overflow != Overflow.PREEMPT
        return may and not self.unary

    @property
    def moves_others(self):
        return self.engine.moves == Moves.ANY and self.policy.overflow == Overflow.COMPACT

    @property
    def slides(self):
        """Whether others may be slid out of its way."""
        return self.moves_others and self.engine.single_ordered_stream and not self.unary

    @property
    def evacuates(self):
        """Whether others may be sent away, so that it has room once that is completed."""
        return self.moves_others and self.waits

    @property
    def counted(self):
        return not self.lost and not self.holding and (self.known or not self.waits)

    @property
    def free(self):
        if self.known:
            return self.owner.count(FREE)
        return self.geometry.blocks - sum(region.length for region in self.regions.values())

    @property
    def waiting(self):
        return sum(who < FREE for who in self.owner)

    @property
    def limited(self):
        """Whether copies are so limited that a plan could fail for it."""
        regions = self.regions.values()
        tokens = 2 * sum(region.carried(self.unit, self.granule) for region in regions)
        return self.budget - self.copied < tokens or not self.many_copies

    @property
    def many_copies(self):
        """Whether an answer holds more copies than there can be, pieces of a block included."""
        return self.geometry.max_copies >= self.geometry.blocks * (len(self.ops) + 1)

    def in_blocks(self, place):
        return place.start_token // self.unit, place.length_tokens // self.unit

    def hand_over(self, start, length, who):
        self.owner[start : start + length] = [who] * length

    def vacate(self, start, length):
        self.hand_over(start, length, -self.seq if self.waits else FREE)

    def free_behind(self, region, waiting_too=False):
        end = region.start + region.length
        runs = free_runs(self.owner, waiting_too)
        return next((length for start, length in runs if start == end), 0)

    def in_best_hole(self, start, length):
        """Whether [start, start + length) lies in a shortest hole that fits."""
        fitting = [run for run in free_runs(self.owner) if run[1] >= length]
        holes = [run for run in fitting if run[0] <= start and start + length <= sum(run)]
        if self.reuses:  # what is kept is given up where that is cheapest
            return bool(holes)
        return bool(holes) and holes[0][1] == min(size for _, size in fitting)

    def exactly(self, i):
        """Whether the place that the answer tells for operation i is the one it was given."""
        alone = not self.restless or [*self.growths, *self.evacuations] == [i]
        told = self.results[i].length_tokens and self.grown[self.results[i].handle] == 1
        return self.known and alone and told

    def final_length(self, i, handle):
        """Whether the length that the answer tells for operation i is the one it was given."""
        later = (op for op in self.ops[i + 1 :] if isinstance(op, Trim | Free))
        return self.grown[handle] == 1 and all(op.handle != handle for op in later)

    # mistakes

    def check_details(self, op, result, *, changed):
        if self.known and not changed:
            told = (
                result.free_tokens,
                result.largest_run_tokens,
                result.awaiting_completion_tokens,
            )
            true = (self.free, longest(free_runs(self.owner)), self.waiting)
            assert told == tuple(blocks * self.unit for blocks in true), f"{told}, not {true}"
        if result.reason != Reason.COPY_BUDGET:
            assert result.copy_tokens_needed == 0, "it needs no copies"
        assert bool(result.field) == (result.reason in MISTAKES), "a field for no mistake"
        advised = isinstance(op, Extend | Allocate) and result.reason not in MISTAKES
        assert advised or result.preempt_handle == 0, "nobody should be preempted for this"

    def is_mistaken(self, result, rules):
        """Whether the operation breaks rules; then the result has to tell one of them."""
        if rules:
            assert isinstance(result, Refusal), f"it breaks {rules}"
            told = (result.reason, result.field.partition(":")[0])
            assert told in rules, f"it breaks {rules}"
        elif isinstance(result, Refusal):
            assert result.reason not in MISTAKES, "nothing is wrong with it"
        return bool(rules)

    def dead(self, handle):
        return set() if handle in self.regions else {(Reason.NOT_FOUND, "handle")}

    # free and trim

    def free_op(self, op, result):
        rules = set()
        if op.end not in tuple(End):
            rules.add((Reason.INVALID, "end"))
        if op.output_tokens > 2**24:
            rules.add((Reason.INVALID, "output_tokens"))
        if op.handle not in self.issued:
            rules.add((Reason.NOT_FOUND, "handle"))
        if op.handle in self.regions:
            rules |= self.keep_rules(self.regions[op.handle], op)
        if self.is_mistaken(result, rules):
            return
        assert result == Freed(already_free=op.handle not in self.regions)
        if result.already_free:
            return
        region = self.regions.pop(op.handle)
        self.keep(region, op)
        if self.known:
            self.vacate(region.start, region.length)
        self.counts["frees"] += 1
        for end, counter in (
            (End.FINISHED, "finished"),
            (End.HIT_LIMIT, "hit_limit"),
            (End.PREEMPTED, "preempted"),
        ):
            self.counts[counter] += op.end == end
        if op.end in (End.FINISHED, End.HIT_LIMIT):
            self.learnt.append((region, op.output_tokens, op.end == End.HIT_LIMIT))

    def keep_rules(self, region, op):
        """Return the rules that a free breaks by what it keeps."""
        if not op.keep_tokens and not op.keys:
            return set()
        if not self.reuses:
            return {(Reason.INVALID, "keys")}
        rules, keys = set(), len(op.keys) // KEY
        used = region.length * self.unit if self.unary else region.used(self.unit)
        if op.keep_tokens > max(used, region.reused):
            rules.add((Reason.INVALID, "keep_tokens"))
        if len(op.keys) % KEY or (
            keys and len(region.keys) + keys > op.keep_tokens // self.granule
        ):
            rules.add((Reason.INVALID, "keys"))
        return rules

    def keep(self, region, op):
        """Take over what others may reuse of a region that ends."""
        if region.void or not op.keep_tokens:
            return
        region.keys = self.chain(region.keys, op.keys)
        region.keyed = min(op.keep_tokens // self.granule, len(region.keys))
        region.keys = region.keys[: region.keyed]
        self.found |= set(region.keys)
        self.kept_now.append(region)

    def trim_op(self, op, result):
        rules = self.dead(op.handle)
        if not rules and op.handle in self.vague:
            self.take_vaguely(op, result)
            return
        blocks = up(op.to_tokens, self.unit)
        if not rules:
            region = self.regions[op.handle]
            full = region.length * self.unit
            used = full if self.unary else max(1, region.carried(self.unit, self.granule))
            used = max(used, len(region.keys) * self.granule)
            if blocks != region.length and not used <= op.to_tokens <= full:
                rules.add((Reason.INVALID, "to_tokens"))
        if self.is_mistaken(result, rules):
            return
        if isinstance(result, Refusal):
            assert result.reason == Reason.TABLE_FULL, "that is no reason"
            assert not self.known or self.waiting, "nothing waits"
            return
        assert isinstance(result, Place)
        assert result.handle == op.handle
        if self.known:
            self.vacate(region.start + blocks, region.length - blocks)
        region.length = blocks
        self.counts["trims"] += 1

    def take_vaguely(self, op, result):
        """Take over a change of a region whose length is not known now."""
        region = self.regions[op.handle]
        if isinstance(result, Place):
            assert result.handle == op.handle
            self.counts["trims" if isinstance(op, Trim) else "extends"] += 1
            region.length = up(op.to_tokens if isinstance(op, Trim) else op.least_tokens, self.unit)
            if result.length_tokens:
                region.length = self.in_blocks(result)[1]
        elif isinstance(op, Extend):
            self.counts["refused_extends"] += result.reason not in MISTAKES
            self.refused |= result.reason not in MISTAKES
            if result.reason not in MISTAKES:
                self.held_up.add(region.op.tenant)

    # extend

    def extend_rules(self, op):
        rules = self.dead(op.handle)
        if not rules:
            maximum = up(self.regions[op.handle].maximum, self.unit) * self.unit
            if not 1 <= op.least_tokens <= maximum:
                rules.add((Reason.INVALID, "least_tokens"))
            if op.want_tokens and not op.least_tokens <= op.want_tokens <= 2**28:
                rules.add((Reason.INVALID, "want_tokens"))
        return rules

    def extend_op(self, i, op, result):
        if self.is_mistaken(result, self.extend_rules(op)):
            return
        if op.handle in self.vague:
            self.take_vaguely(op, result)
            return
        region = self.regions[op.handle]
        least = up(op.least_tokens, self.unit)
        if isinstance(result, Refusal):
            assert least > region.length, "it is long enough"
            self.check_extend_refused(region, least, result)
            return
        assert isinstance(result, Place)
        assert result.handle == op.handle
        self.counts["extends"] += 1
        if least > region.length:
            self.check_grown(i, op, region, least, *self.in_blocks(result))
        elif self.final_length(i, op.handle):
            assert result.length_tokens == region.length * self.unit, "it was long enough"

    def check_grown(self, i, op, region, least, start, length):
        aim = aim_blocks(self.policy, op, region.maximum, self.unit)
        behind = self.free_behind(region) if self.known else 0
        in_place = self.known and region.length + behind >= least
        if not self.final_length(i, op.handle):
            length = min(aim, region.length + behind) if in_place else aim
            if (self.reuses or not in_place) and aim != least:
                self.known, self.lost = False, True
                self.vague.add(op.handle)
        assert least <= length <= aim, f"{least} to {aim} blocks by the policy, not {length}"
        if in_place and not self.reuses:
            assert length == min(aim, region.length + behind), f"{behind} are free behind it"
        elif self.known and not self.reuses:
            assert length in (aim, least), f"{aim} or {least} blocks by the policy"
        if self.exactly(i):
            if in_place and (not self.reuses or start == region.start):
                assert start == region.start, "it could have grown in place"
            else:
                self.check_moved(region, start, length, aim)
        self.settle(i, region, start, length)

    def check_moved(self, region, start, length, aim):
        """Check how a region has won room that was not behind it."""
        if start == region.start:
            assert self.slides, "there is no room behind it, and nobody may make way"
            self.needed_moves = True
            return
        assert self.relocates, "it may not move"
        assert region.handle not in self.pinned, "it is pinned"
        can_go = region.handle not in self.went or not self.waits
        if (
            can_go
            and not self.limited
            and longest(free_runs(self.owner)) >= aim
            and not self.reuses
        ):
            assert length == aim, f"a hole of {aim} blocks was there"
        before = next((run for run in free_runs(self.owner) if sum(run) == region.start), None)
        if self.reuses:  # what is kept is given up where that is cheapest
            mine = {FREE, region.handle} if self.engine.single_ordered_stream else {FREE}
            if not set(self.owner[start : start + length]) <= mine:
                assert self.slides, "others are in its way"
                self.needed_moves = True
            return
        slid_itself = before is not None and before[0] == start
        end = region.start + region.length + self.free_behind(region)
        if slid_itself and start + length <= end:
            assert self.engine.single_ordered_stream or self.in_best_hole(start, length)
        elif not self.in_best_hole(start, length):
            assert self.slides, "it is not in a best hole"
            self.needed_moves = True

    def settle(self, i, region, start, length, *, fresh=False):
        """Take over the place of a region that was placed or has grown."""
        exact = self.exactly(i)
        moved = not fresh and start != region.start
        if exact and moved:
            self.went.add(region.handle)
        if exact and not self.needed_moves:
            empty = region.used(self.unit) == 0 or not self.waits
            mine = {FREE, region.handle} if not moved or empty else {FREE}
            cells = self.owner[start : start + length]
            assert len(cells) == length, "it is outside of the arena"
            adopts = self.reuses and fresh and region.reused  # what a late answer reads, too
            assert adopts or set(cells) <= mine, f"[{start}, +{length}) is not free"
            if moved:
                self.vacate(region.start, region.length)
            self.hand_over(start, length, region.handle)
        if not exact or self.restless:
            self.known = False
        if not fresh and region.said is None and not self.unary:
            region.said = region.length * self.unit
        region.start, region.length = start, length
        self.count_safety_hit("unsure" if fresh else "growth")

    def count_safety_hit(self, cause):
        if not self.counted:
            self.counts["uncounted_hits"] += 1
        elif len(self.regions) > 1:
            self.counts[f"safety_hits_{cause}"] += self.free < self.safety_blocks

    # allocate

    def maximum_of(self, op):
        capacity = self.geometry.blocks * self.unit
        if op.max_total_tokens is None:
            return min(self.geometry.model_length_tokens, capacity)
        return op.max_total_tokens

    def allocate_rules(self, op, prediction):
        maximum = self.maximum_of(op)
        rules = {
            "request_id": 1 <= len(op.request_id.encode()) <= 64 and "\0" not in op.request_id,
            "request_class": len(op.request_class.encode()) <= 32,
            "tenant": len(op.tenant.encode()) <= 32,
            "predicted_output_tokens": op.predicted_output_tokens != 0,
            "max_total_tokens": 1 <= maximum <= self.geometry.blocks * self.unit,
            "prompt_tokens": 1 <= op.prompt_tokens <= maximum - op.generated_tokens,
            "overflow_risk": op.overflow_risk is None or 0 <= op.overflow_risk <= 1,
            "keys": self.keys_fit(op),
            "prediction": prediction is None
            or (
                all(isfinite(value) and value >= 0 for value in prediction)
                and all(a <= b for a, b in pairwise(prediction))
            ),
        }
        return {(Reason.INVALID, field) for field, kept in rules.items() if not kept}

    def keys_fit(self, op):
        if not op.keys:
            return True
        whole, keys = len(op.keys) % KEY == 0, len(op.keys) // KEY
        held = op.prompt_tokens + op.generated_tokens
        return self.reuses and whole and keys <= held // self.granule

    def allocate_op(self, i, op, result):
        prediction = self.predictions[i]
        if op.request_id in self.asked:
            twice = {(Reason.INVALID, "request_id")}
            self.is_mistaken(result, twice | self.allocate_rules(op, prediction))
            return
        if self.is_asked_again(op, prediction, result):
            return
        rules = self.allocate_rules(op, prediction)
        least = self.least_blocks(op)
        most = self.most_with(op, least)
        if least > most:
            rules |= {(Reason.INVALID, "max_total_tokens"), (Reason.INVALID, "prompt_tokens")}
        if self.is_mistaken(result, rules):
            return
        sizes = first_blocks(self.policy, op, prediction, self.maximum_of(op), self.unit)
        sizes = [min(size, most) for size in sizes]
        covered = self.is_covered(op.tenant, *sizes)
        if self.is_skipped(op, result, covered):
            return
        if isinstance(result, Refusal):
            self.check_allocate_refused(op, prediction, sizes, result, covered)
        else:
            assert isinstance(result, Place)
            assert result.handle not in self.issued, "the handle was used before"
            self.check_placed(i, op, prediction, sizes, result)

    def least_blocks(self, op):
        """Return the blocks that a request cannot do without to be let in."""
        maximum, held = self.maximum_of(op), op.prompt_tokens + op.generated_tokens
        whole = self.policy.start == Start.MAXIMUM and not op.generated_tokens
        return up(maximum if whole else min(held + 1, maximum), self.unit)

    def most_with(self, op, least):
        """Return what its tenant may hold with it; one that comes back may be more, alone."""
        shares = {name: maximum for name, _, maximum in self.policy.tenants}
        most = self.share(shares.get(op.tenant, self.policy.tenant_share))
        return max(most, least) if op.generated_tokens else most

    def is_skipped(self, op, result, covered):
        """Whether it stands behind a refused one; a guarantee is ahead of other tenants'."""
        skipped = isinstance(result, Refusal) and result.reason == Reason.SKIPPED
        if self.pass_refused:
            assert not skipped, "it may pass those before it"
        elif op.tenant in self.held_up:
            assert skipped, "its tenant's order is kept"
        elif self.refused:
            assert covered is None or skipped == (not covered), f"{skipped=} though {covered=}"
        else:
            assert not skipped, "nothing is ahead of it"
        if skipped:
            assert result.preempt_handle == 0, "nobody should be preempted for this"
            self.held_up.add(op.tenant)
        return skipped

    def is_asked_again(self, op, prediction, result):
        """Whether its request lives: then it gets that region, or asks with other numbers."""
        for region in self.regions.values():
            if region.op.request_id != op.request_id:
                continue
            if self.allocate_rules(op, prediction):
                return False
            numbers = (op.prompt_tokens, op.generated_tokens, self.maximum_of(op))
            if numbers == (region.op.prompt_tokens, region.op.generated_tokens, region.maximum):
                assert isinstance(result, Place), "it lives"
                assert result.handle == region.handle, "it lives"
                told = region.handle not in self.asked_now and result.length_tokens
                assert not told or result.reused_tokens == region.reused, "it has reused as much"
            else:
                assert self.is_mistaken(result, {(Reason.INVALID, "request_id")})
            return True
        return False

    def check_placed(self, i, op, prediction, sizes, result):
        start, length = self.in_blocks(result)
        if not self.final_length(i, result.handle):
            length = sizes[0]
        assert length in sizes, f"{sizes} blocks by the policy, not {length}"
        assert len(self.regions) < self.geometry.max_regions, "the table is full"
        assert self.lost or not self.over_quota(op, length), "the tenant has its share"
        if not self.lost and not self.is_covered(op.tenant, length):
            assert not self.claims_of_others(op.tenant, sure=True), "it overtakes a claim"
        _, claimed, request_id = self.claims.get(op.tenant, (0, 0, ""))
        if request_id == op.request_id and claimed is not None:
            del self.claims[op.tenant]
        if self.counted:
            assert self.free >= length, "too few are free"
            admitted = self.free - length >= self.safety_blocks or not self.regions
            assert admitted or self.is_unsure(prediction), "the rest is the safety pool"
        if self.exactly(i):
            if longest(free_runs(self.owner)) < length:
                assert self.slides, "nothing fits, and nobody may make way"
                self.needed_moves = True
            elif not self.reuses:
                assert self.in_best_hole(start, length), "it is not in a best hole"
        self.hole = longest(free_runs(self.untouched))
        self.asked.add(op.request_id)
        self.births += 1
        said = None if self.unary else 0
        region = Region(
            result.handle, op, prediction, self.maximum_of(op), self.births, start, length, said
        )
        if self.reuses:
            self.check_reused(op, region, result)
        self.class_names.append(op.request_class)
        self.issued.add(result.handle)
        self.regions[result.handle] = region
        self.settle(i, region, start, length, fresh=True)
        self.counts["allocates"] += 1
        if self.holding:
            self.known = False

    def check_reused(self, op, region, result):
        """Check that no more is reused than stands, and as much where nothing is in the way."""
        self.counts["prompt_tokens"] += op.prompt_tokens + op.generated_tokens
        region.keys, region.reused = self.chain((), op.keys), result.reused_tokens
        region.chain = op.keys[-KEY:]
        region.keyed = region.reused // self.granule
        most = (op.prompt_tokens + op.generated_tokens - 1) // self.granule
        stands = [name in self.found for name in region.keys[:most]]
        most = stands.index(False) if False in stands else len(stands)
        assert region.reused % self.granule == 0, "it reuses parts of granules"
        assert region.keyed <= most, f"only {most} granules stand anywhere"
        self.asked_now.add(result.handle)
        easy = (
            len(self.ops) == 1
            and not self.unary
            and self.hole >= region.length
            and self.budget >= most * self.granule
            and self.geometry.max_copies == 4096
        )
        assert not easy or region.keyed == most, f"{most} granules stand, and nothing is in the way"
        self.holding |= most > 0 and not self.unary

    def is_unsure(self, prediction):
        if prediction is None or self.policy.unsure_ratio == 0:
            return False
        return prediction[5] / max(1, prediction[2]) > self.policy.unsure_ratio

    # tenants

    def share(self, share):
        """Return the blocks of a share."""
        return int(share * self.geometry.blocks)

    def held(self, tenant):
        regions = self.regions.values()
        return sum(region.length for region in regions if region.op.tenant == tenant)

    def guaranteed(self, tenant):
        shares = {name: self.share(guaranteed) for name, guaranteed, _ in self.policy.tenants}
        return shares.get(tenant, 0)

    def over_quota(self, op, length):
        most = self.most_with(op, self.least_blocks(op))
        return most < self.geometry.blocks and self.held(op.tenant) + length > most

    def is_covered(self, tenant, *sizes):
        """Whether its guarantee covers so many blocks more; None: not known."""
        if not self.guaranteed(tenant):
            return False
        covered = {self.held(tenant) + size <= self.guaranteed(tenant) for size in sizes}
        return None if self.lost or len(covered) > 1 else covered.pop()

    def claimed(self, tenant):
        """Return the blocks of its claim, 0 if none stands, None if that is not known."""
        turn, blocks, _ = self.claims.get(tenant, (-CLAIM_CALLS, 0, ""))
        if self.turns - turn >= CLAIM_CALLS:
            return 0
        if self.lost or blocks is None:
            return None
        return blocks if self.held(tenant) + blocks <= self.guaranteed(tenant) else 0

    def claims_of_others(self, tenant, *, sure):
        """Whether others' claims stand: surely, or perhaps."""
        others = [self.claimed(name) for name, _, _ in self.policy.tenants if name != tenant]
        return any(blocks or (blocks is None and not sure) for blocks in others)

    def borrowers(self, asker):
        """Return the regions of tenants other than the asker that hold more than is guaranteed."""
        over = {
            tenant
            for tenant in {region.op.tenant for region in self.regions.values()}
            if tenant != asker and self.held(tenant) > self.guaranteed(tenant)
        }
        return [region for region in self.regions.values() if region.op.tenant in over]

    def youngest(self, regions):
        """Return the handle of the youngest that is not pinned, 0 if there is none."""
        free = [region for region in regions if region.handle not in self.pinned]
        return max(free, key=lambda region: region.birth).handle if free else 0

    def advice_for_growth(self, region, more):
        oldest = min(self.regions.values(), key=lambda region: region.birth)
        if not self.policy.tenants:
            return self.youngest(r for r in self.regions.values() if r is not oldest)
        tenant = region.op.tenant
        others = self.borrowers(tenant)
        own = [region for region in self.regions.values() if region.op.tenant == tenant]
        first = self.youngest(others) if self.is_covered(tenant, more) else 0
        return first or self.youngest(r for r in own + others if r is not oldest)

    def check_claim(self, op, result, length, covered):
        """Check whom a refused allocate names, and remember its claim."""
        if covered is None:
            self.claims[op.tenant] = (self.turns, None, op.request_id)
            return
        expected = 0
        if covered:
            self.claims[op.tenant] = (self.turns, length, op.request_id)
            coming = result.free_tokens + result.awaiting_completion_tokens
            short = coming < (length + self.safety_blocks) * self.unit
            named = {Reason.FRAGMENTED}
            if not result.awaiting_completion_tokens:
                named.add(Reason.TABLE_FULL)
            if short:
                named |= {Reason.NO_SPACE, Reason.SAFETY_SHARE}
            if result.reason in named:
                expected = self.youngest(self.borrowers(op.tenant))
        assert result.preempt_handle == expected, f"{expected} should make way"

    # refusals

    def check_allocate_refused(self, op, prediction, sizes, result, covered):
        self.refused |= result.reason != Reason.QUOTA
        self.held_up.add(op.tenant)
        self.counts["refused_allocates"] += 1
        if covered is not False or not self.lost:
            self.check_claim(op, result, sizes[0], covered)
        if len(set(sizes)) > 1:
            return
        length = sizes[0]
        if result.reason not in (Reason.TABLE_FULL, Reason.QUOTA, Reason.CLAIMED):
            behind = covered is False and self.claims_of_others(op.tenant, sure=True)
            assert not behind, "a claim is ahead of it"
        if result.reason == Reason.TABLE_FULL:
            full = len(self.regions) >= self.geometry.max_regions
            assert full or not self.known or self.waiting, "it is not full"
        elif result.reason == Reason.QUOTA:
            assert self.lost or self.over_quota(op, length), "its share would do"
        elif result.reason == Reason.CLAIMED:
            assert not covered, "its guarantee covers it"
            assert self.claims_of_others(op.tenant, sure=False), "nobody else has a claim"
        elif result.reason == Reason.SAFETY_SHARE:
            assert self.regions, "it would be the only one"
            assert not self.is_unsure(prediction), "the safety pool is for it"
            if self.counted:
                assert self.free - length < self.safety_blocks, "the share would be kept"
        else:
            self.check_lack(result, length, length, None)

    def check_extend_refused(self, region, least, result):
        self.refused = True
        self.counts["refused_extends"] += 1
        self.held_up.add(region.op.tenant)
        if not (self.lost and self.policy.tenants):
            advice = self.advice_for_growth(region, least - region.length)
            comes = result.reason == Reason.WAITS_FOR_COMPLETION
            expected = (0, advice) if comes and self.restless else (0,) if comes else (advice,)
            assert result.preempt_handle in expected, f"{expected} should make way"
        if result.reason == Reason.TABLE_FULL:
            assert self.waits, "nothing waits"
            assert not self.known or self.waiting, "nothing waits"
        else:
            self.check_lack(result, least - region.length, least, region)

    def check_lack(self, result, more, length, region):
        """Check that `length` blocks, which are `more` than `region` has, were not to be had."""
        reason = result.reason
        if reason == Reason.PINNED:
            assert self.pinned, "nothing is pinned"
            assert self.slides or (self.relocates and region is not None), "nothing would move"
        elif reason == Reason.COPY_BUDGET:
            grows = self.relocates and region is not None
            assert self.slides or self.evacuates or grows, "nothing would move"
            assert self.limited, "copies are unlimited"
            if self.many_copies and not self.growths and len(self.evacuations) <= 1:
                assert result.copy_tokens_needed > self.budget - self.copied, (
                    "that many are allowed"
                )
        elif reason == Reason.NO_SPACE:
            assert not self.counted or self.free < more, "enough blocks are free"
        elif reason == Reason.FRAGMENTED:
            assert not self.counted or self.free >= more, "too few blocks are free"
        else:
            assert reason == Reason.WAITS_FOR_COMPLETION, "that is no reason"
            assert self.waits or self.unary or self.holding, "nothing waits"
        if self.counted and self.slides and not self.pinned and not self.limited:
            assert self.free < more, "others could have made way"
        if self.known:
            self.check_no_room(reason, more, length, region)
            self.check_wait(reason, more, length, region)

    def check_no_room(self, reason, more, length, region):
        hole = longest(free_runs(self.owner))
        if region is None:
            assert hole < length, "a hole fits"
            return
        assert self.free_behind(region) < more, "there is room behind it"
        tied = region.handle in self.pinned or (self.waits and region.handle in self.went)
        if self.relocates and not tied and hole >= length:
            assert self.limited, "a hole fits"
            sent_away = self.restless and reason == Reason.WAITS_FOR_COMPLETION
            assert sent_away or reason == Reason.COPY_BUDGET, "a hole fits"

    def check_wait(self, reason, more, length, region):
        """Check that what waits is named as the reason where it would do, and only there."""
        elsewhere = region is None or self.relocates
        would_do = elsewhere and longest(free_runs(self.owner, waiting_too=True)) >= length
        if region is not None:
            would_do |= self.free_behind(region, waiting_too=True) >= more
        if reason == Reason.WAITS_FOR_COMPLETION:
            assert self.restless or (self.waiting and would_do), "what waits would not do"
        elif reason in (Reason.NO_SPACE, Reason.FRAGMENTED) and self.waiting:
            assert not would_do, "what waits would do"


# --- the twin ---


class Twin:
    """What a pool's books have to be, and the memory of its engine."""

    def __init__(self, geometry, policy):
        self.geometry, self.policy, self.engine = geometry, policy, None
        self.unit, self.granule = geometry.block_tokens, geometry.granule_tokens
        self.counters, self.kept_tokens = Counter(), 0
        self.key_names, self.parents = {}, []  # of keys: their names; and what comes before each
        self.class_names = []
        self.completions = defaultdict(list)  # by class name, and of all under None
        self.forget()

    def forget(self):
        """Begin an epoch: the books are empty, what was learnt stays."""
        self.memory = Memory(self.geometry.blocks * self.unit, self.granule)
        self.owner = [FREE] * self.geometry.blocks
        self.untouched = list(self.owner)  # as owner, and kept blocks are not free
        self.kept = []  # names of the keys of each kept run
        self.late = []  # what answers that are not completed gather: seq, token, names
        self.regions, self.issued, self.written = {}, set(), Counter()
        self.seq = self.completed_seq = self.births = self.turns = 0
        self.claims = {}  # by tenant: turn, blocks (None: not known), request id

    # what is kept

    def chain(self, names, keys):
        """Return names of keys, continued by `keys`; each follows one other, always the same."""
        names = list(names)
        for i in range(0, len(keys) - len(keys) % KEY, KEY):
            key = keys[i : i + KEY]
            if key not in self.key_names:
                self.key_names[key] = len(self.parents)
                self.parents.append((names[-1] if names else None, len(names)))
            name = self.key_names[key]
            assert self.parents[name] == (names[-1] if names else None, len(names)), "a bad test"
            names.append(name)
        return tuple(names)

    def standing(self):
        """Return the names of all keys that may be reused."""
        regions = self.regions.values()
        return {name for region in regions for name in region.keys[: region.keyed]} | {
            name for names in self.kept for name in names
        }

    def read_kept(self, entry):
        """Return the names of the keys of what lies in a kept run; it has to be one beginning."""
        cells = self.memory.cells[entry.start_token :][: entry.shareable_tokens]
        assert entry.shareable_tokens % self.granule == 0, f"{entry} keeps parts of granules"
        assert 0 < entry.shareable_tokens <= entry.length_tokens, f"{entry} is kept for nothing"
        assert (cells <= -2).all(), f"{entry} keeps what is no key's"
        names, tokens = np.divmod(-2 - cells, NAMED)
        assert (tokens == np.arange(len(cells)) % self.granule).all(), f"{entry} is scattered"
        assert (names.reshape(-1, self.granule) == names[:: self.granule, None]).all()
        chain = tuple(int(name) for name in names[:: self.granule])
        for i, name in enumerate(chain):
            assert self.parents[name] == (chain[i - 1] if i else None, i), f"{entry} is mixed"
        return chain

    def check_kept(self, entries):
        self.kept = [self.read_kept(entry) for entry in entries if entry.kept]
        for entry in entries:
            if entry.live:
                region = self.regions[entry.handle]
                assert entry.shareable_tokens == region.keyed * self.granule, f"{region}"
        owner = self.owners(entries)
        for entry in entries:
            if entry.kept:
                start, length = entry.start_token // self.unit, entry.length_tokens // self.unit
                owner[start : start + length] = [-1] * length
        self.untouched = owner

    def keep_names(self, batch, results):
        """Name the tokens that the frees of a batch give keys to."""
        ended = set()
        for op, result in zip(batch.ops, results, strict=True):
            region = self.regions.get(op.handle) if isinstance(op, Free) else None
            if region is None or result != Freed() or op.handle in ended:
                continue
            ended.add(op.handle)
            self.name_kept(region, op)

    def name_kept(self, region, op):
        if not op.keep_tokens or region.void:
            return
        before, region.keys = region.keys, self.chain(region.keys, op.keys)
        last = min(len(region.keys), op.keep_tokens // self.granule) * self.granule
        if last:
            self.memory.write(region, region.start * self.unit, region.reused, last)
        region.keys = before

    def look_at_late(self):
        """Insist that what late answers gather is untouched until they are completed."""
        self.late = [entry for entry in self.late if entry[0] > self.completed_seq]
        for seq, token, names in self.late:
            there = self.memory.cells[token : token + len(names)]
            assert (there == names).all(), f"answer {seq} gathers from {token}, it was overwritten"

    def set_policy(self, policy):
        if policy.tenants != self.policy.tenants:
            self.claims = {}
        self.policy = policy

    @property
    def safety_blocks(self):
        guaranteed = sum(int(share * self.geometry.blocks) for _, share, _ in self.policy.tenants)
        share = ceil(self.policy.safety_share * self.geometry.blocks)
        return min(share, self.geometry.blocks - guaranteed)

    # what the arena did

    def apply(self, batch, predictions, answer, entries):
        """Check the answer to a batch and the books after it, and take them over."""
        assert (answer.seq, answer.replayed) == (batch.seq, False)
        assert answer.policy_version == self.policy.version
        assert len(answer.results) == len(batch.ops)
        self.begin(batch)
        walk = self.walk(batch, predictions, answer)
        dead = self.regions.keys() - walk.regions.keys()
        if self.granule:
            self.keep_names(batch, answer.results)
        if self.granule and not self.engine.single_ordered_stream:
            for copy in answer.copies:
                names = self.memory.cells[copy.from_token : copy.from_token + copy.tokens].copy()
                self.late.append((batch.seq, copy.from_token, names))
        starts, carried = self.memory.run(answer.copies, self.regions, self.unit, dead)
        self.check_copies(walk, answer.copies)
        places = self.final_places(walk, answer)
        for handle, region in walk.regions.items():
            region.start, length = places[handle]
            assert length == region.length or handle in walk.vague, f"{length} blocks of {region}"
            region.length = length
            if handle in starts:
                assert starts[handle] == region.start * self.unit, f"{handle} was not copied there"
            if handle not in self.regions and region.reused:
                there = self.memory.holds(region, region.start * self.unit, region.reused)
                assert there, f"{region} does not find what it reuses"
            if handle in walk.pinned:
                assert region.start == self.regions[handle].start, f"pinned {handle} has moved"
                assert not carried[handle], f"pinned {handle} was copied"
        self.check_owners(walk, entries)
        changed = self.completed or answer.moved or changes(answer.results)
        self.turns += (CHANGE_CALLS - 1) * bool(changed)
        self.counters["batches"] += 1
        self.counters["copies"] += len(answer.copies)
        self.counters["copied_tokens"] += sum(copy.tokens for copy in answer.copies)
        self.take_over(walk, entries)

    def begin(self, batch):
        """Do what comes before the operations, and let the engine write what it calls used."""
        self.seq, self.completed_seq = batch.seq, batch.completed_seq
        self.turns += 1
        waited = sum(who < FREE for who in self.owner)
        self.owner = [FREE if -self.completed_seq <= who < FREE else who for who in self.owner]
        self.completed = sum(who < FREE for who in self.owner) < waited
        self.look_at_late()
        said = {used.handle: used.used_tokens for used in batch.used}
        shareable = {u.handle: u.shareable_tokens // max(1, self.granule) for u in batch.used}
        for handle, region in self.regions.items():
            region.said = said.get(handle)
            used, first = region.used(self.unit), self.written[handle]
            start, first = region.start * self.unit, min(used, first)
            held = max(first, region.reused, region.keyed * self.granule)
            assert self.memory.holds(region, start, held), f"{handle} has lost tokens"
            first = max(first, region.reused)
            self.memory.write(region, start, first, used)
            self.written[handle] = used
            if not region.void:
                region.keyed = max(region.keyed, min(shareable.get(handle, 0), len(region.keys)))

    def walk(self, batch, predictions, answer):
        walk = Walk(self, batch.ops, answer.results, predictions)
        limit = batch.max_copy_tokens
        walk.budget = self.policy.max_copy_tokens if limit is None else limit
        walk.copied = sum(copy.tokens for copy in answer.copies)
        walk.pass_refused = batch.pass_refused
        walk.pinned = {used.handle for used in batch.used if used.pinned}
        if walk.slides or walk.evacuations:
            walk.restless = self.something_moved(walk, answer)
        return walk.run()

    def something_moved(self, walk, answer):
        """Whether regions have moved, or empty ones may have, which takes no copies."""
        if answer.moved or any(copy.handle in self.regions for copy in answer.copies):
            return True
        for result in answer.results:
            region = self.regions.get(result.handle) if isinstance(result, Place) else None
            if region and result.length_tokens and result.start_token != region.start * self.unit:
                return True
        regions = self.regions.values()
        empty = any(region.carried(self.unit, self.granule) == 0 for region in regions)
        new = any(isinstance(walk.ops[i], Allocate) for i in walk.growths)
        return empty or new

    def check_copies(self, walk, copies):
        assert sum(copy.tokens for copy in copies) <= walk.budget, "more tokens than allowed"
        assert len(copies) <= self.geometry.max_copies, "more copies than allowed"
        if not self.engine.copies_may_overlap:
            assert not any(copy.overlaps for copy in copies), "a copy overlaps"
        if self.engine.single_ordered_stream:
            return
        targets = set()
        for copy in copies:
            source = self.owner[copy.from_token // self.unit]
            if copy.handle in self.regions or not self.granule:
                assert source == copy.handle, f"its source is not its region's old place: {copy}"
            target = set(range(copy.to_token, copy.to_token + copy.tokens))
            assert not targets & target, f"it writes what another has written: {copy}"
            targets |= target
            owners = {self.owner[token // self.unit] for token in target}
            assert owners == {FREE}, f"it writes what was not free before the batch: {copy}"

    def final_places(self, walk, answer):
        """Return (start, length) of every live region as the answer tells them."""
        told = {}
        for result in answer.results:
            if not isinstance(result, Place):
                continue
            place = (result.start_token // self.unit, result.length_tokens // self.unit)
            assert told.setdefault(result.handle, place) == place, "a region has two places"
            assert (result.handle in walk.regions) == bool(place[1]), "it is dead, or it is not"
        places = {
            handle: told.get(handle, (region.start, region.length))
            for handle, region in walk.regions.items()
        }
        moved = {place.handle: place for place in answer.moved}
        assert len(moved) == len(answer.moved), "a region is listed twice"
        for handle, place in moved.items():
            region = self.regions.get(handle)
            assert region is not None, f"{place} was not there before"
            assert handle in walk.regions, f"{place} is dead"
            assert handle not in told, f"{place} is among the results"
            assert place.start_token != region.start * self.unit, f"{place} has not moved"
            places[handle] = (place.start_token // self.unit, place.length_tokens // self.unit)
        for handle, (start, _) in places.items():
            if handle in self.regions and start != self.regions[handle].start:
                grew = walk.relocates and walk.grown[handle]
                assert walk.slides or walk.evacuations or grew, f"{handle} may not move"
        return places

    def check_owners(self, walk, entries):
        """Compare the arena's list of its entries with what the answer has said."""
        owner = self.owners(entries)
        for region in walk.regions.values():
            cells = owner[region.start : region.start + region.length]
            assert cells == [region.handle] * region.length, f"{region} is not in the books"
        if walk.known and not (self.granule and self.late):
            assert owner == walk.owner, "blocks are waiting, or not, against the rules"
        for before, now in zip(self.owner, owner, strict=True):
            if before < FREE and self.granule:
                adopted = now > FREE and now not in self.regions and walk.regions[now].reused
                assert adopted or now in (before, -self.seq), (
                    "a block was given out before its completion"
                )
            elif before < FREE:
                assert now == before, "a block was given out before its completion"
            elif now < FREE:
                assert now == -self.seq, "a block waits for another batch"
                assert walk.waits, "a block waits for nothing"
            elif before > FREE and walk.waits:
                assert now == before, "a block was given out, or freed, in the batch it was vacated"

    def owners(self, entries):
        """Return the owner of every block by the arena's list."""
        owner = [FREE] * self.geometry.blocks
        for entry in entries:
            start, length = entry.start_token // self.unit, entry.length_tokens // self.unit
            assert length > 0, f"{entry} is empty"
            assert start + length <= len(owner), f"{entry} leaves the arena"
            cells = owner[start : start + length]
            assert cells == [FREE] * length, f"{entry} overlaps another"
            assert not entry.kept or self.granule, f"{entry} is kept"
            who = entry.handle if entry.live else -entry.awaits_seq
            owner[start : start + length] = [who] * length
        return owner

    def take_over(self, walk, entries):
        self.owner = self.owners(entries)
        self.regions, self.issued, self.births = walk.regions, walk.issued, walk.births
        self.claims = walk.claims
        for region in walk.regions.values():
            self.written[region.handle] = max(self.written[region.handle], region.reused)
        if self.granule:
            self.check_kept(entries)
            for region in walk.kept_now:
                self.kept_tokens += region.keyed * self.granule
        self.counters.update(walk.counts)
        for name in walk.class_names:
            if name not in self.class_names:
                self.class_names.append(name)
        for region, output_tokens, censored in walk.learnt:
            self.learn(region, output_tokens, censored)

    def learn(self, region, output_tokens, censored):
        completion = (region.prediction, region.op.prompt_tokens, output_tokens, censored)
        for name in (None, self.class_of(region.op.request_class)):
            self.completions[name] = [*self.completions[name], completion][-RING:]

    def class_of(self, name):
        return name if name in self.class_names[:CLASSES] else "(other)"

    def unary(self, op, prediction, result, entries):
        """Check a unary call, which copies nothing, and take it over."""
        self.turns += 1
        walk = Walk(self, [op], [result], [prediction], unary=True).run()
        self.turns += (CHANGE_CALLS - 1) * changes([result])
        assert walk.known, "it may not move anything"
        if isinstance(op, Free) and result == Freed() and op.keep_tokens:
            self.name_kept(self.regions[op.handle], op)
        if not self.late:
            assert self.owners(entries) == walk.owner
        for region in walk.regions.values():
            if region.handle not in self.regions:
                there = self.memory.holds(region, region.start * self.unit, region.reused)
                assert there, f"{region} does not find what it reuses"
        self.take_over(walk, entries)

    def reconcile(self, handles, kept, freed, entries, completed_seq):
        """Check what was kept and freed, and take it over."""
        assert sorted(freed) == sorted(self.regions.keys() - set(handles))
        assert [place.handle for place in kept] == list(handles)
        for place in kept:
            region = self.regions.get(place.handle)
            there = (region.start * self.unit, region.length * self.unit) if region else (0, 0)
            assert (place.start_token, place.length_tokens) == there
        for handle in freed:
            del self.regions[handle]
        self.owner = [who if who in self.regions else FREE for who in self.owner]
        assert self.owners(entries) == self.owner
        self.late = []
        if self.granule and completed_seq != self.seq:
            assert not any(entry.kept for entry in entries), "what is kept is doubtful"
            for region in self.regions.values():
                region.keyed, region.void, region.keys = 0, True, ()
                self.memory.write(region, region.start * self.unit, 0, self.written[region.handle])
        if self.granule:
            self.check_kept(entries)
        self.completed_seq = self.seq
        self.counters["frees"] += len(freed)

    # what the arena says

    def check_report(self, report):
        runs = free_runs(self.owner)
        regions = self.regions.values()
        expected = {
            "seq": self.seq,
            "completed_seq": self.completed_seq,
            "live": len(self.regions),
            "free_runs": len(runs),
            "free_tokens": self.owner.count(FREE) * self.unit,
            "awaiting_completion_tokens": sum(who < FREE for who in self.owner) * self.unit,
            "largest_run_tokens": longest(runs) * self.unit,
            "reserved_tokens": sum(region.length for region in regions) * self.unit,
            "safety_tokens": self.safety_blocks * self.unit,
            "used_tokens": sum(region.used(self.unit) for region in regions),
            "classes": min(CLASSES, len(self.class_names)),
        }
        if self.granule:  # kept runs are no free ones; what a move has carried is said to be used
            del expected["free_runs"], expected["used_tokens"]
            self.check_reuse(report.reuse)
        said = {field: getattr(report, field) for field in expected}
        assert said == expected, f"{said}, not {expected}"
        counted = report.counters._asdict()
        if self.counters.pop("uncounted_hits", 0):
            for cause in ("safety_hits_growth", "safety_hits_unsure"):
                self.counters[cause] = counted[cause]
        for name in counted.keys() - {"relocations", "compactions"}:
            assert counted[name] == self.counters[name], f"{name}: {counted}, not {self.counters}"

    def check_reuse(self, reuse):
        kept = sum(map(len, self.kept)) * self.granule
        assert (reuse.kept_runs, reuse.kept_tokens) == (len(self.kept), kept)
        assert reuse.prompt_tokens == self.counters["prompt_tokens"]
        assert reuse.given_up_tokens <= self.kept_tokens, "more was given up than kept"

    def check_tenants(self, uses):
        """Compare what the arena says of the policy's tenants with a recount."""
        walk = Walk(self, [], [], [])
        assert [use.name for use in uses] == [name for name, _, _ in self.policy.tenants]
        for use, (_, _, maximum) in zip(uses, self.policy.tenants, strict=True):
            regions = [r for r in self.regions.values() if r.op.tenant == use.name]
            claimed = walk.claimed(use.name)
            expected = (
                len(regions),
                sum(region.length for region in regions) * self.unit,
                walk.guaranteed(use.name) * self.unit,
                walk.share(maximum) * self.unit,
                use.claimed_tokens if claimed is None else claimed * self.unit,
            )
            assert use[1:] == expected, f"{use}, not {expected}"

    def check_entries(self, entries):
        assert self.owners(entries) == self.owner
        births = []
        for entry in entries:
            if not entry.live:
                continue
            region = self.regions[entry.handle]
            births.append((region.birth, entry.birth))
            most = region.carried(self.unit, self.granule)
            assert region.used(self.unit) <= entry.used_tokens <= most
            assert entry.prompt_tokens == region.op.prompt_tokens
            assert entry.generated_tokens == region.op.generated_tokens
            assert entry.max_total_tokens == region.maximum
            assert entry.request_class == self.class_of(region.op.request_class)
            assert entry.request_id == region.op.request_id
        births.sort()
        assert all(a[1] < b[1] for a, b in pairwise(births)), "births are out of order"
        starts = [entry.start_token for entry in entries]
        assert starts == sorted(starts)
