"""The arena and its naive twin never disagree, whatever an engine asks for.

The same made-up engine is driven twice: by Hypothesis, which shrinks what it finds, and
by plain random numbers, which come much faster. ODMA_TWIN_EXAMPLES=N makes the runs as
long as wanted, with other numbers each time.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from dataclasses import replace
from math import nan
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from twin import Twin

from odma_service._native import (
    CLASS_OTHER,
    CLASS_POOL,
    Arena,
    ArenaGeometry,
    EngineRecord,
    PolicyRecord,
)
from odma_service.errors import (
    EpochError,
    InvalidError,
    SeqChangedError,
    SeqGapError,
    SeqOldError,
    VersionError,
)
from odma_service.values import (
    Allocate,
    Batch,
    End,
    Extend,
    Free,
    Moves,
    Overflow,
    Place,
    Reason,
    Refusal,
    Start,
    TenantShare,
    Trim,
    Used,
)

EXAMPLES = int(os.environ.get("ODMA_TWIN_EXAMPLES", "0"))
SEED = int(time.time()) * 1000 if EXAMPLES else 0
WORLDS, STEPS = 48, 400

pytestmark = pytest.mark.timeout(0 if EXAMPLES else 600)


# --- an engine that asks for odd things ---


class World:
    """An arena, its twin, and what their engine does. `roll(n)` is a number below n."""

    def __init__(self, roll, blocks=None):
        self.directory = Path(tempfile.mkdtemp(prefix="twin-"))
        self.roll = roll
        self.geometry = self.some_geometry(blocks or 8 + roll(193))
        self.capacity = self.geometry.blocks * self.geometry.block_tokens
        self.unit = self.geometry.block_tokens
        self.arena = Arena.create(self.directory / "pool", self.geometry)
        self.twin = Twin(self.geometry, self.arena.policy())
        self.epoch, self.ids, self.mood = 0, 0, 0
        self.change_policy()
        self.begin_epoch()

    def close(self):
        self.arena.close()
        shutil.rmtree(self.directory)

    def one_of(self, *choices):
        return choices[self.roll(len(choices))]

    def rarely(self, rarity):
        return self.roll(rarity) == rarity - 1

    # what there is

    def some_geometry(self, blocks):
        unit = self.one_of(1, 2, 4, 8, 16)
        capacity = blocks * unit
        granule = self.one_of(0, 64) if capacity >= 256 else 0
        return ArenaGeometry(
            blocks=blocks,
            block_tokens=unit,
            max_regions=self.one_of(60, 60, 60, 60, 60, 30, 10, 1 + self.roll(4)),
            max_ops=1 + self.roll(24),
            max_copies=self.one_of(4096, 4096, 4096, 12, 3, 1),
            model_length_tokens=1 + capacity // self.one_of(1, 2, 4, 40) + self.roll(capacity),
            digest=self.roll(1000),
            granule_tokens=granule,
        )

    def some_engine(self):
        """Return any engine, or more often one of those that move much."""
        moves, ordered = self.one_of(
            (self.one_of(*Moves), bool(self.roll(2))),
            (Moves.ANY, True),
            (Moves.ANY, True),
            (Moves.OWN_GROWTH, True),
            (self.one_of(Moves.ANY, Moves.OWN_GROWTH), False),
        )
        return EngineRecord(
            moves=moves,
            single_ordered_stream=ordered,
            copies_may_overlap=bool(self.roll(2)),
            planes=1 + self.roll(60),
            descriptor_seconds=self.one_of(0.0, 1e-7, 1e-5),
            token_seconds=self.one_of(0.0, 3e-7, 1e-5),
        )

    def some_policy(self):
        """Return any policy, or more often one that moves much."""
        limits = {1 + self.roll(self.capacity * 5 // 4) for _ in range(self.one_of(0, 0, 3, 16))}
        policy = PolicyRecord(
            name="random",
            start=self.one_of(*Start),
            overflow=self.one_of(*Overflow, Overflow.COMPACT),
            step_tokens=1 + self.roll(self.one_of(1, 8, 64)),
            limits_tokens=tuple(sorted(limits)),
            overflow_risk=self.roll(65) / 64,
            safety_share=self.one_of(0.0, 0.05, 0.1, 0.3, 0.9),
            unsure_ratio=self.one_of(0.0, 1.0, 2.0, 5.0),
            growth=self.one_of(1.0, 1.5, 2.0, 4.0, 1.1),
            tenant_share=self.one_of(1.0, 1.0, 0.5, 0.21),
            max_copy_tokens=self.one_of(2**31, 2**31, self.roll(self.capacity), 0),
        )
        if self.roll(2):
            policy = replace(
                policy,
                start=Start.STEP,
                overflow=self.one_of(Overflow.COMPACT, Overflow.COMPACT, Overflow.RELOCATE),
                step_tokens=1 + self.roll(2 * self.unit),
                limits_tokens=(),
                safety_share=self.one_of(0.0, 0.02),
                growth=1.0,
                tenant_share=1.0,
            )
        return replace(policy, tenants=self.some_tenants(1 - policy.safety_share))

    def some_tenants(self, share):
        """Return no tenants, or some that are guaranteed at most `share` together."""
        names = ("one", "other", "third")[: self.one_of(0, 0, 1, 2, 3)]
        tenants = []
        for name in names:
            guaranteed = self.one_of(0.0, 0.25, 0.5, 1.0, self.roll(65) / 64) * share
            share -= guaranteed
            maximum = self.one_of(1.0, 1.0, guaranteed, guaranteed + (1 - guaranteed) / 2)
            tenants.append(TenantShare(name, guaranteed, max(maximum, 1 / 64, guaranteed)))
        return tuple(tenants)

    # operations

    def some_handle(self):
        live = list(self.twin.regions)
        if live and not self.rarely(25):
            return live[self.roll(len(live))]
        issued = sorted(self.twin.issued)
        if issued and self.roll(3):
            return issued[self.roll(len(issued))]
        return self.one_of(0, self.roll(2**20), 2**63, 2**20 * (1 + self.roll(2**20)))

    def some_op(self):
        # moods: to fill the pool, to change it, to empty it
        weights = ((1, 1, 6, 8), (2, 2, 12, 6), (4, 1, 6, 3))[self.mood]
        if not self.twin.regions and self.roll(8):
            return self.some_allocate()
        number = self.roll(sum(weights))
        ops = (self.some_free, self.some_trim, self.some_extend, self.some_allocate)
        for weight, op in zip(weights, ops, strict=True):
            if number < weight:
                return op()
            number -= weight
        raise AssertionError

    def some_free(self):
        output_tokens = 2**24 + 1 if self.rarely(60) else self.roll(self.capacity)
        end = 9 if self.rarely(60) else self.one_of(*End)
        handle = self.some_handle()
        keep, keys = self.some_keep(self.twin.regions.get(handle))
        return Free(handle, end, output_tokens, keep, keys)

    def some_keep(self, region):
        """Return what a free keeps: tokens, and keys that continue the region's."""
        granule = self.geometry.granule_tokens
        if not granule or region is None or self.rarely(4):
            return (self.roll(200), b"") if self.rarely(60) else (0, b"")
        written = max(self.twin.written[region.handle], region.reused)
        keep = self.one_of(written, written, self.roll(written + 1))
        if self.rarely(40):
            keep = self.roll(2 * self.capacity)
        more = keep // granule - len(region.keys)
        return keep, self.some_keys(region.chain, max(0, more)) if self.roll(3) else b""

    def some_keys(self, chain, granules):
        """Return so many keys that continue a chain of keys: often those that others have."""
        keys = []
        for _ in range(granules):
            number = self.one_of(*[0] * 12, 1, self.roll(1000))
            chain = hashlib.blake2b(chain + b"%d" % number, digest_size=16).digest()
            keys.append(chain)
        return b"".join(keys)

    def some_trim(self):
        handle = self.some_handle()
        region = self.twin.regions.get(handle)
        if region is None:
            return Trim(handle, self.roll(50))
        length, used = region.length * self.unit, self.twin.written[handle]
        lengths = (used, used + self.roll(self.unit), length, self.roll(length + 2), 2**31)
        return Trim(handle, self.one_of(*lengths))

    def some_extend(self):
        handle = self.some_handle()
        region = self.twin.regions.get(handle)
        length = region.length * self.unit if region else 10
        least = length + 1 + self.roll(self.unit * self.one_of(1, 3, 10))
        if region and self.roll(8):
            least = min(least, max(region.maximum, 1))
        if self.rarely(10):
            least = self.one_of(self.roll(length + 1), 2**32 - 1)
        want = least + self.roll(3 * self.unit) - self.rarely(10) if self.rarely(4) else 0
        return Extend(handle, least, min(max(want, 0), 2**32 - 1))

    def some_id(self):
        if self.rarely(12) and self.twin.regions:
            return self.one_of(*self.twin.regions.values()).op.request_id
        if self.rarely(80):
            return self.one_of("", "ä" * 33, "with\0null")
        self.ids += 1
        return self.one_of(f"request {self.ids}", f"{self.ids}" + "x" * 50)

    def some_allocate(self):
        request_id = self.some_id()
        for region in self.twin.regions.values():
            if region.op.request_id == request_id and self.roll(2):
                return region.op
        most = self.one_of(2, 4, 8, self.geometry.blocks // 8, self.geometry.blocks // 2)
        prompt = (
            1 + self.roll(max(1, most * self.unit)) + self.geometry.granule_tokens * self.roll(4)
        )
        generated = self.roll(most * self.unit) if self.rarely(5) else 0
        held = prompt + generated
        more = self.roll(self.unit * self.one_of(1, 8, 8, 8, self.geometry.blocks))
        maximum = self.one_of(None, held + more, held + more, held + more)
        if maximum is not None and self.roll(20):
            maximum = min(maximum, self.capacity)
        keys, granule = b"", self.geometry.granule_tokens
        if granule and self.roll(5):
            keys = self.some_keys(b"%d" % self.one_of(0, 0, 0, 1), held // granule)
            keys = keys[: 16 * self.one_of(1000, 1000, 1000, self.roll(9))]
        if self.rarely(60):
            keys += self.one_of(self.some_keys(b"too many", held // 64 + 1), b"x")
        return Allocate(
            request_id,
            keys=keys,
            prompt_tokens=self.one_of(0, 2**32 - 1) if self.rarely(60) else prompt,
            generated_tokens=generated,
            max_total_tokens=0 if self.rarely(60) else maximum,
            request_class=self.one_of("", "chat", "code", f"class {self.roll(90)}"),
            tenant=self.one_of("", "one", "other", "third"),
            overflow_risk=self.one_of(None, None, self.roll(65) / 64, 1.0, 0.0, 0.1 + self.roll(9)),
            predicted_output_tokens=self.one_of(None, 1 + self.roll(100)),
            text=self.one_of(None, None, "words", "other words"),
        )

    def some_prediction(self, op):
        if not isinstance(op, Allocate) or not self.roll(3):
            return None
        most = self.one_of(1, 40, self.capacity, 4 * self.capacity)
        values = [self.roll(most) / 4 for _ in range(7)]
        if not self.rarely(60):
            values.sort()
        if self.rarely(90):
            values[self.roll(7)] = nan
        return tuple(values)

    # batches

    def some_used(self):
        said = []
        for handle, region in self.twin.regions.items():
            if self.rarely(15):
                continue
            length = region.length * self.unit
            used = min(length, self.twin.written[handle] + self.roll(2 * self.unit + 1))
            if self.rarely(12):
                used = self.one_of(0, length, self.roll(length + 1))
            shareable = self.one_of(0, used) if self.geometry.granule_tokens else 0
            said.append(Used(handle, used, self.rarely(25), shareable))
        return said

    def some_batch(self):
        if self.rarely(15):
            self.mood = self.one_of(0, 0, 1, 1, 2)
        count = self.roll(1 + self.one_of(1, 4, 10, self.geometry.max_ops))
        ops = [self.some_op() for _ in range(min(count, self.geometry.max_ops))]
        seq, completed = self.twin.seq, self.twin.completed_seq
        batch = Batch(
            seq=seq + 1,
            completed_seq=self.one_of(seq, completed, completed + self.roll(seq - completed + 1)),
            used=self.some_used(),
            ops=ops,
            max_copy_tokens=self.one_of(None, 2**31, 2**31, 0, self.roll(self.one_of(9, 50, 500))),
            pass_refused=bool(self.roll(2)),
        )
        return batch, [self.some_prediction(op) for op in ops]

    def entries(self):
        return self.arena.regions(room=self.geometry.most_entries)

    def apply(self, batch, predictions):
        answer = self.arena.apply(self.epoch, batch, predictions)
        self.twin.apply(batch, predictions, answer, self.entries())
        self.last = batch, predictions, answer
        return answer

    def step(self):
        self.apply(*self.some_batch())

    def insist(self):
        """Ask for room without copies, then with the copies that are said to be needed."""
        op = self.one_of(self.some_extend, self.some_allocate)()
        predictions = [self.some_prediction(op)]
        seq = self.twin.seq
        batch = Batch(seq + 1, seq, self.some_used(), [op], max_copy_tokens=0)
        result = self.apply(batch, predictions).results[0]
        if isinstance(result, Refusal) and result.reason == Reason.COPY_BUDGET:
            batch = batch._replace(seq=seq + 2, max_copy_tokens=result.copy_tokens_needed)
            result = self.apply(batch, predictions).results[0]
            if self.geometry.max_copies == 4096 and self.twin.engine.single_ordered_stream:
                assert isinstance(result, Place), f"{op} got all it needed: {result}"

    def unary(self):
        op = self.some_op()
        prediction = self.some_prediction(op)
        result = self.arena.unary(self.epoch, op, prediction)
        self.twin.unary(op, prediction, result, self.entries())

    # what must change nothing

    def books(self):
        report = self.arena.report()._replace(rebooted=False)
        return report, self.entries(), self.arena.policy(), self.arena.tenants()

    def must_fail(self, error, batch, epoch=None):
        before = self.books()
        with pytest.raises(error):
            self.arena.apply(self.epoch if epoch is None else epoch, batch)
        assert self.books() == before

    def ask_again(self):
        """Repeat the last batch: the stored answer, whatever is predicted now."""
        batch, _, answer = self.last
        before = self.books()
        stored = answer._replace(replayed=True)
        predictions = [self.some_prediction(op) for op in batch.ops]
        assert self.arena.apply(self.epoch, batch, predictions) == stored
        assert self.arena.replay(self.epoch, batch) == stored
        assert self.books() == before

    def ask_differently(self):
        """Repeat the last seq with another body."""
        batch, _, _ = self.last
        other = self.changed(batch)
        if other != batch:
            self.must_fail(SeqChangedError, other)
            with pytest.raises(SeqChangedError):
                self.arena.replay(self.epoch, other)

    def changed(self, batch):
        used, ops = list(batch.used), list(batch.ops)
        if ops and self.roll(2):
            i = self.roll(len(ops))
            ops[i] = self.changed_op(ops[i])
        elif used and self.roll(2):
            i = self.roll(len(used))
            used[i] = self.one_of(
                used[i]._replace(pinned=not used[i].pinned),
                used[i]._replace(used_tokens=used[i].used_tokens + 1),
                used[i]._replace(handle=used[i].handle + 1),
            )
        else:
            return self.one_of(
                batch._replace(pass_refused=not batch.pass_refused),
                batch._replace(completed_seq=batch.completed_seq + 1),
                batch._replace(max_copy_tokens=None if batch.max_copy_tokens else 1),
                batch._replace(used=used[:-1]),
                batch._replace(ops=ops[:-1]),
                batch._replace(ops=ops[::-1]),
                batch._replace(used=used[::-1]),
            )
        return batch._replace(used=used, ops=ops)

    def changed_op(self, op):
        if isinstance(op, Free):
            return self.one_of(
                op._replace(handle=op.handle + 1),
                op._replace(output_tokens=op.output_tokens + 1),
                op._replace(keep_tokens=op.keep_tokens + 1),
                op._replace(keys=op.keys + b"y" * 16),
            )
        if isinstance(op, Trim):
            return op._replace(to_tokens=op.to_tokens - 1 if op.to_tokens else 1)
        if isinstance(op, Extend):
            return self.one_of(
                op._replace(least_tokens=op.least_tokens - 1 if op.least_tokens else 1),
                op._replace(want_tokens=op.want_tokens - 1 if op.want_tokens else 1),
                Trim(op.handle, op.least_tokens),
            )
        return self.one_of(
            op._replace(prompt_tokens=op.prompt_tokens - 1 if op.prompt_tokens else 1),
            op._replace(generated_tokens=op.generated_tokens + 1),
            op._replace(max_total_tokens=op.max_total_tokens + 1 if op.max_total_tokens else 1),
            op._replace(request_id=op.request_id + "y"),
            op._replace(request_class=op.request_class + "y"),
            op._replace(tenant=op.tenant + "y"),
            op._replace(keys=op.keys + b"y" * 16),
            op._replace(text=(op.text or "") + "y"),
            op._replace(overflow_risk=0.75 if op.overflow_risk != 0.75 else None),
            op._replace(predicted_output_tokens=(op.predicted_output_tokens or 0) + 1),
        )

    def ask_wrongly(self):
        """Send a batch that breaks a rule of its own."""
        batch, _ = self.some_batch()
        seq, used = batch.seq, batch.used
        live = list(self.twin.regions)
        dead = self.one_of(0, 2**40 + 1, *sorted(self.twin.issued - set(live)))
        wrong = [
            (EpochError, batch, self.epoch + 1),
            (EpochError, batch, self.epoch - 1),
            (SeqGapError, batch._replace(seq=seq + 1 + self.roll(9))),
            (SeqOldError, batch._replace(seq=self.roll(max(1, seq - 1)))),
            (InvalidError, batch._replace(completed_seq=seq)),
            (InvalidError, batch._replace(ops=[Trim(1, 1)] * (self.geometry.max_ops + 1))),
            (InvalidError, batch._replace(used=[Used(dead, 0)])),
            (InvalidError, batch._replace(seq=-1)),
            (InvalidError, batch._replace(completed_seq=2**64)),
        ]
        if self.twin.completed_seq:
            wrong.append((InvalidError, batch._replace(completed_seq=self.twin.completed_seq - 1)))
        if used:
            length = self.twin.regions[used[0].handle].length * self.unit
            too_many = used[0]._replace(used_tokens=length + 1)
            wrong.append((InvalidError, batch._replace(used=[*used, used[self.roll(len(used))]])))
            wrong.append((InvalidError, batch._replace(used=[*used[1:], too_many])))
        self.must_fail(*self.one_of(*wrong))

    # what happens between batches

    def change_policy(self):
        policy = self.some_policy()
        version = self.arena.policy().version
        if self.rarely(3):
            with pytest.raises(VersionError):
                self.arena.set_policy(policy, version + 1)
        assert self.arena.set_policy(policy, self.one_of(0, version)) == version + 1
        self.twin.set_policy(self.arena.policy())
        assert self.twin.policy == policy.__class__(
            **{field: getattr(policy, field) for field in policy.__slots__ if field != "version"},
            version=version + 1,
        )

    def begin_epoch(self):
        before = self.epoch
        if before and self.roll(2):
            self.arena.end_epoch(before)
        self.epoch += 1 + self.roll(3)
        engine = self.some_engine()
        self.arena.open_epoch(self.epoch, engine, "boot", b"words")
        assert self.arena.engine == engine
        self.twin.forget()
        self.twin.engine = engine
        self.last = None
        if before:
            with pytest.raises(EpochError):
                self.arena.end_epoch(before)

    def reattach(self):
        """Close the books and open them again: nothing is lost."""
        before = self.books()
        self.arena.close()
        geometry = self.one_of(None, self.geometry)
        self.arena = Arena.attach(self.directory / "pool", geometry, self.one_of("boot", None))
        after = self.books()
        assert after == before, f"{after}, not {before}"
        assert self.arena.description() == b"words"

    def reboot(self):
        """Attach after a reboot of the host: the epoch is over."""
        self.arena.close()
        self.arena = Arena.attach(self.directory / "pool", None, "another boot")
        report = self.arena.report()
        assert (report.epoch, report.last_epoch, report.live) == (0, self.epoch, 0)
        assert report.rebooted
        with pytest.raises(EpochError):
            self.arena.apply(self.epoch, Batch(1, 0, [], []))
        self.arena.check()
        self.begin_epoch_after_reboot()

    def begin_epoch_after_reboot(self):
        self.twin.forget()
        self.epoch += 1
        self.twin.engine = self.some_engine()
        self.arena.open_epoch(self.epoch, self.twin.engine, "boot", b"words")
        self.last = None

    def reconcile(self):
        handles = [handle for handle in self.twin.regions if self.roll(4)]
        handles += [self.some_handle() for _ in range(self.roll(3))]
        completed = self.one_of(self.twin.seq, self.roll(self.twin.seq + 1))
        kept, freed = self.arena.reconcile(self.epoch, handles, completed)
        self.twin.reconcile(handles, kept, freed, self.entries(), completed)

    def check(self):
        self.arena.check()
        report = self.arena.report()
        assert report.epoch == self.epoch
        self.twin.check_report(report)
        self.twin.check_entries(self.entries())
        self.twin.check_tenants(self.arena.tenants())

    def check_learnt(self):
        indexes = {None: CLASS_POOL, "(other)": CLASS_OTHER}
        for name, expected in self.twin.completions.items():
            index = indexes[name] if name in indexes else self.arena.class_index(name)
            assert [tuple(entry) for entry in self.arena.completions(index)] == expected
            assert self.arena.histogram(index).completions >= len(expected)


# --- driven by Hypothesis ---


class Dice:
    """Rolls what Hypothesis has drawn, so that it can shrink it, then what follows from that."""

    def __init__(self, numbers):
        self.numbers, self.more = iter(numbers), Random(sum(numbers))

    def __call__(self, limit):
        number = next(self.numbers, None)
        return self.more.randrange(limit) if number is None else number % limit


dice = st.lists(st.integers(0, 2**16), max_size=40).map(Dice)


class ArenaAgainstTwin(RuleBasedStateMachine):
    """An arena and a list of block owners never disagree."""

    world = None

    @initialize(roll=dice)
    def make(self, roll):
        self.world = World(roll)

    def teardown(self):
        if self.world is not None:
            self.world.close()

    @invariant()
    def the_books_agree(self):
        if self.world is not None:
            self.world.check()

    @rule(roll=dice)
    def step(self, roll):
        self.world.roll = roll
        self.world.step()

    @rule(roll=dice)
    def one_more_step(self, roll):
        self.world.roll = roll
        self.world.step()

    @rule(roll=dice)
    def a_few_steps(self, roll):
        self.world.roll = roll
        for _ in range(5):
            self.world.step()

    @rule(roll=dice)
    def insist(self, roll):
        self.world.roll = roll
        self.world.insist()

    @rule(roll=dice)
    def unary(self, roll):
        self.world.roll = roll
        self.world.unary()

    @precondition(lambda self: self.world.last is not None)
    @rule(roll=dice)
    def ask_again(self, roll):
        self.world.roll = roll
        self.world.ask_again()
        self.world.ask_differently()

    @rule(roll=dice)
    def ask_wrongly(self, roll):
        self.world.roll = roll
        self.world.ask_wrongly()

    @rule(roll=dice)
    def change_policy(self, roll):
        self.world.roll = roll
        self.world.change_policy()

    @rule(roll=dice)
    def reattach(self, roll):
        self.world.roll = roll
        self.world.reattach()

    @rule(roll=dice)
    def reconcile(self, roll):
        self.world.roll = roll
        self.world.reconcile()
        self.world.check_learnt()

    @rule(roll=dice)
    def begin_epoch(self, roll):
        self.world.roll = roll
        if self.world.rarely(3):
            self.world.reboot()
        else:
            self.world.begin_epoch()


test_the_arena_agrees_with_its_twin = ArenaAgainstTwin.TestCase
test_the_arena_agrees_with_its_twin.settings = settings(
    max_examples=EXAMPLES or 450,
    stateful_step_count=40,
    deadline=None,
    derandomize=not EXAMPLES,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate, Phase.shrink),
)


# --- driven by plain random numbers ---


def live(world, steps):
    """Let a world live for so many batches, with something else between them now and then."""
    for number in range(steps):
        world.step()
        if world.rarely(8):
            world.unary()
        if world.rarely(10):
            world.insist()
        if world.rarely(10):
            world.ask_again()
        if world.rarely(10):
            world.ask_differently()
        if world.rarely(12):
            world.ask_wrongly()
        if world.rarely(60):
            world.change_policy()
        if world.rarely(80):
            world.reattach()
        if world.rarely(120):
            world.reconcile()
        if number % 5 == 0:
            world.check()
        if world.rarely(200):
            world.check_learnt()
            world.one_of(world.reboot, world.begin_epoch, world.begin_epoch)()


def agrees(seed, steps, blocks=None):
    world = World(Random(seed).randrange, blocks)
    try:
        live(world, steps)
        world.check()
        world.check_learnt()
    except (Exception, pytest.fail.Exception) as error:
        raise AssertionError(f"seed {seed}, seq {world.twin.seq}: {error}") from error
    finally:
        world.close()


@pytest.mark.parametrize("part", range(4))
def test_the_arena_agrees_with_its_twin_for_many_batches(part):
    worlds = max(WORLDS, EXAMPLES) // 4
    for seed in range(SEED + part * worlds, SEED + (part + 1) * worlds):
        agrees(seed, STEPS)


def test_the_arena_agrees_with_its_twin_on_long_runs():
    for seed in range(SEED, SEED + max(6, EXAMPLES // 50)):
        agrees(seed, 60, blocks=5000 + 3000 * (seed % 3))
