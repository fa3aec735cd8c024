"""The demo where beginnings are reused: what the device sees, alone and around a pool."""

from __future__ import annotations

import pytest
from talking import BLOCK, conversations

from odma_service.demo.checked import CheckedMemory
from odma_service.demo.device import Device, Move
from odma_service.demo.play import STEPS
from odma_service.pool import Pool, PoolSpec
from odma_service.pool.geometry import Geometry
from odma_service.pool.policy import named
from odma_service.replay.load import limits_for, load_of
from odma_service.replay.loop import Loop
from odma_service.replay.pooled import EngineKind
from odma_service.values import Allocate, Copy, Place, PlaneGroup

EPOCH = 1
SIZE = 12_000


def device(**others):
    return Device(512, **({"ordered": True, "may_overlap": True} | others))


def writing(memory, request, ids, start_token, tokens, reused=0):
    """Write a request whose first tokens are those of blocks of 16."""
    memory.begin(request, ids, 16)
    memory.promise(request, start_token, 0, reused)
    memory.write(request, start_token, reused, tokens)
    memory.check()
    return memory.violations


def test_what_was_kept_is_what_the_next_one_finds():
    memory = device()
    writing(memory, 1, (7, 8), 0, 40)
    memory.vacate(1, 0, 40)
    assert writing(memory, 2, (7, 8), 0, 48, reused=32) == 0
    assert memory.tokens_checked == 40 + 48


def test_what_was_given_up_too_early_is_missed():
    memory = device()
    writing(memory, 1, (7, 8), 0, 40)
    memory.vacate(1, 0, 40)
    writing(memory, 3, (), 24, 4)
    memory.vacate(2, 24, 4)
    assert writing(memory, 2, (7, 8), 0, 48, reused=32) == 4


def test_a_key_that_lies_is_seen():
    memory = device()
    writing(memory, 1, (7, 8), 0, 40)
    memory.vacate(1, 0, 40)
    assert writing(memory, 2, (7, 9), 0, 48, reused=32) == 16


def test_a_gather_that_is_left_out_is_seen():
    for dropped, violations in ((0, 0), (1, 32)):
        memory = device(drop_copy=dropped)
        writing(memory, 1, (7, 8), 0, 40)
        memory.run(1, [Copy(5, 0, 64, 32, False)], {5})
        assert writing(memory, 2, (7, 8), 64, 48, reused=32) == violations


def test_what_several_read_lives_as_long_as_one_of_them():
    memory = device()
    writing(memory, 1, (7, 8), 0, 40)
    memory.begin(2, (7, 8), 16)
    memory.promise(2, 0, 0, 32)
    memory.vacate(1, 0, 40)
    memory.check()
    assert memory.violations == 0
    memory.run(2, [Copy(0, 200, 10, 4, False)], {0})
    memory.check()
    assert memory.violations == 4
    memory.vacate(2, 0, 32)
    memory.check()
    assert memory.violations == 4


def test_what_is_shared_moves_for_all_who_read_it():
    memory = device()
    writing(memory, 1, (7, 8), 0, 40)
    memory.begin(2, (7, 8), 16)
    memory.promise(2, 0, 0, 32)
    memory.run(1, [Copy(1, 0, 100, 40, False)], {1})
    memory.move(1, [Move(1, 0, 100, 40), Move(2, 0, 100, 32)])
    memory.check()
    assert (memory.violations, memory.tokens_checked) == (0, 80)


def test_a_final_token_that_is_written_again_is_seen():
    memory = device()
    writing(memory, 1, (7, 8), 0, 40)
    memory.write(1, 0, 3, 4)
    assert memory.violations == 1


def test_two_cannot_be_promised_different_tokens_in_one_place():
    memory = device()
    writing(memory, 1, (7, 8), 0, 32)
    memory.begin(2, (7, 9), 16)
    memory.promise(2, 0, 0, 32)
    assert memory.violations == 16


def test_with_several_streams_what_is_gathered_from_stays_until_that_is_done():
    memory = device(ordered=False)
    writing(memory, 1, (7, 8), 0, 32)
    memory.run(1, [Copy(5, 0, 64, 32, False)], {5})
    memory.vacate(1, 0, 32)
    assert writing(memory, 2, (7, 8), 64, 40, reused=32) == 0
    memory.complete(0)
    assert writing(memory, 3, (), 16, 8) > 0


# Around a pool in this process


class Embedded(CheckedMemory):
    """An engine with a pool of its own."""

    def __init__(self, pool, device, policy, kind):
        version = pool.policy().version
        super().__init__(device, policy, kind, version=version, block_tokens=BLOCK)
        self.pool, self.gathers, self.answered = pool, [], 0

    def _call(self, batch):
        answer = self.pool.apply(EPOCH, batch, None)
        new = {result.handle for result in answer.results if isinstance(result, Place)}
        copies = enumerate(answer.copies, self.answered + 1)
        self.gathers += [number for number, copy in copies if copy.handle in new]
        self.answered += len(answer.copies)
        return answer


class ForgetfulPool(Embedded):
    """Its pool has given up what it says is reused."""

    def _call(self, batch):
        answer = super()._call(batch)
        results = [
            result._replace(reused_tokens=BLOCK)
            if isinstance(op, Allocate) and isinstance(result, Place) and op.prompt_tokens > BLOCK
            else result
            for op, result in zip(batch.ops, answer.results, strict=True)
        ]
        return answer._replace(results=results)


class LyingEngine(Embedded):
    """All its prompts have one beginning, it says."""

    def _keys(self, request, tokens):
        return super()._keys(request, tokens) and bytes(16)


def played(tmp_path, memory=Embedded, *, drop_copy=0, common_blocks=12, **kind):
    trace = conversations(12, 10, 6, common_blocks=common_blocks)
    limits = limits_for(trace, SIZE, 300)
    load = load_of(trace, limits)
    engine = EngineKind(**({"granule_tokens": BLOCK} | kind))
    record = named("elastic", limits.model_length_tokens, limits.capacity_tokens)
    spec = PoolSpec(
        name="demo",
        open_id="demo",
        geometry=Geometry((PlaneGroup(56, 1_024),)),
        capacity_tokens=limits.capacity_tokens,
        model_length_tokens=limits.model_length_tokens,
        moves=engine.moves,
        single_ordered_stream=engine.single_stream,
        copies_may_overlap=engine.copies_may_overlap,
        max_ops=1_024,
        granule_tokens=engine.granule_tokens,
        reads_two_runs=engine.reads_two_runs,
    )
    device = Device(
        limits.capacity_tokens,
        ordered=engine.single_stream,
        may_overlap=engine.copies_may_overlap,
        drop_copy=drop_copy,
    )
    pool = Pool.create(
        tmp_path / f"{memory.__name__}{drop_copy}.arena", spec, EPOCH, "demo", record
    )
    try:
        owner = memory(pool, device, record, engine)
        loop = Loop(load, owner, STEPS, 32)
        while loop.advance():
            pass
        loop.give_back()
        owner.complete()
        counters = pool.report().counters
        assert (counters.copies, counters.copied_tokens) == (device.copies, device.copied_tokens)
    finally:
        pool.close()
    assert sorted(loop.history.finished) == list(range(len(load)))
    return owner, device, loop.history


@pytest.mark.parametrize("granule_tokens", [0, 64, 128])
@pytest.mark.parametrize("reads_two_runs", [False, True])
@pytest.mark.parametrize("single_stream", [False, True])
def test_every_token_is_where_it_should_be(tmp_path, granule_tokens, reads_two_runs, single_stream):
    _, device, history = played(
        tmp_path,
        granule_tokens=granule_tokens,
        reads_two_runs=reads_two_runs and granule_tokens > 0,
        single_stream=single_stream,
        copies_may_overlap=single_stream,
    )
    assert device.violations == 0
    assert device.tokens_checked > 0
    assert bool(history.reused_tokens) == bool(granule_tokens)


def test_each_gather_that_is_left_out_is_seen(tmp_path):
    owner, device, _ = played(tmp_path)
    assert device.violations == 0
    assert owner.gathers
    for number in owner.gathers[:3]:
        assert played(tmp_path, drop_copy=number)[1].violations > 0


@pytest.mark.parametrize("memory", [ForgetfulPool, LyingEngine])
def test_who_says_what_is_not_so_is_seen(memory, tmp_path):
    assert played(tmp_path, memory, common_blocks=0)[1].violations > 0
