"""The engine: batches, ends, cancelled requests, random answers, and a service that restarts."""

from __future__ import annotations

import pytest
from decoders import CAPACITY_TOKENS, TIGHT, alone, decoder, requests, serve

from odma_service.client import Client
from odma_service.engines.transformers import (
    EmbeddedPool,
    Engine,
    Planes,
    Request,
    Sampling,
    open_pool,
)
from odma_service.errors import InvalidError, RefusedError, UnavailableError
from odma_service.values import End, PolicyChange


@pytest.fixture(scope="module")
def model():
    return decoder("qwen2")


@pytest.fixture(scope="module")
def expected(model):
    return alone(model, requests())


@pytest.fixture
def planes(model):
    return Planes(model, CAPACITY_TOKENS)


@pytest.fixture
def memory(planes):
    with EmbeddedPool(planes, TIGHT) as pool:
        yield pool


@pytest.fixture
def engine(model, planes, memory):
    return Engine(model, planes, memory, batch_cap=8, prefill_tokens=24)


def outputs(asked):
    return [request.output for request in asked]


@pytest.mark.parametrize("policy", ["static", "s3", "odma", "elastic"])
def test_answers_are_the_same_under_every_policy(model, expected, policy):
    asked = requests()
    serve(model, asked, policy=PolicyChange(name=policy))
    assert outputs(asked) == expected


def test_a_service_places_the_cache_as_an_embedded_pool_does(
    model, planes, service, name, expected
):
    asked = requests()
    pool = open_pool(service, name, planes, TIGHT)
    engine = Engine(model, planes, pool, batch_cap=8, prefill_tokens=24)
    for request in asked:
        engine.submit(request)
    while engine.busy:
        engine.step()
    books = service.get_pool(name)
    assert outputs(asked) == expected
    assert books.summary.free_tokens == CAPACITY_TOKENS
    assert books.counters.copies == engine.counts["copies"] > 0
    assert books.counters.preempted == engine.counts["preempted"] > 0
    assert books.counters.hit_limit == len(asked)
    pool.close_pool()


def test_a_service_that_dies_and_comes_back_costs_no_token(model, planes, servers, expected):
    server = servers()
    with Client(server.target, retry_seconds=0) as service:
        pool = open_pool(service, "engine", planes, TIGHT)
        engine = Engine(model, planes, pool, batch_cap=8, prefill_tokens=24)
        asked = requests()
        for request in asked:
            engine.submit(request)
        while engine.counts["applies"] < 8:
            engine.step()
        server.kill()
        while pool_answers(engine):
            pass  # steps without a batch
        assert not pool_answers(engine)
        server.start()
        while not pool_answers(engine):
            pass
        while engine.busy:
            engine.step()
    assert outputs(asked) == expected


def pool_answers(engine):
    try:
        engine.step()
    except UnavailableError:
        return False
    return True


def test_a_stop_token_ends_an_answer_and_belongs_to_it(model, engine, expected):
    [_, asked, *_] = requests()
    stop = expected[1][4]
    asked.stop_tokens = frozenset({stop})
    engine.submit(asked)
    while not asked.over:
        engine.step()
    assert asked.output == expected[1][: expected[1].index(stop) + 1]
    assert asked.end is End.FINISHED


def test_the_last_token_is_told_before_memory_is_given_back(engine, memory):
    asked = Request([1, 2, 3], 1)
    engine.submit(asked)
    assert engine.step() == [asked]
    assert asked.end is End.HIT_LIMIT
    assert engine.busy
    assert memory.pool.report().live == 1
    assert engine.step() == []
    assert not engine.busy
    assert memory.pool.report().live == 0


def test_a_cancelled_request_gives_its_memory_back_in_the_next_step(engine, memory):
    first, second = Request([1] * 40, 50), Request([2] * 40, 50)
    engine.submit(first)
    engine.submit(second)
    for _ in range(6):
        engine.step()
    assert memory.pool.report().live == 2
    engine.finish(first)
    engine.step()
    assert memory.pool.report().live == 1
    assert first.end is End.ABORTED
    assert first.place is None


def test_a_cancelled_request_of_the_queue_never_begins(engine, memory):
    first = Request([1] * 40, 50)
    engine.submit(first)
    engine.finish(first)
    assert engine.step() == []
    assert not engine.busy
    assert memory.seq == 0


def test_a_request_that_is_cancelled_while_its_batch_has_no_answer_gives_its_memory_back(
    model, planes, servers
):
    server = servers()
    with Client(server.target, retry_seconds=0) as service:
        pool = open_pool(service, "engine", planes, TIGHT)
        engine = Engine(model, planes, pool)
        asked = Request([1] * 40, 50)
        engine.submit(asked)
        server.kill()
        with pytest.raises(UnavailableError):
            engine.step()
        engine.finish(asked)
        server.start()
        while not pool_answers(engine):
            pass
        while engine.busy:
            engine.step()
        assert asked.output == []
        assert service.get_pool("engine").summary.regions == 0


def test_a_request_in_its_chunks_does_not_hold_up_the_others(engine):
    long, short = Request([1] * 200, 2), Request([2] * 4, 7)
    engine.submit(short)
    engine.submit(long)
    while not short.over:
        engine.step()
    assert engine.counts["mixed_steps"] > 4
    assert 0 < long.computed < 200


def test_nothing_is_asked_again_while_nothing_has_changed(engine):
    engine.submit(Request([1] * 200, 40))
    engine.submit(Request([2] * 200, 40))
    for _ in range(30):
        engine.step()
    assert engine.counts["applies"] < 6


@pytest.mark.parametrize(
    ("request_of", "rule"),
    [
        (lambda: Request([], 5), "prompt: at least 1 token"),
        (lambda: Request([1], 0), "most_tokens: at least 1"),
        (lambda: Request([1], 5, sampling=Sampling(temperature=3)), "temperature: 0 to 2"),
        (lambda: Request([1], 5, sampling=Sampling(top_p=0)), "top_p: above 0"),
        (lambda: Request([1] * 280, 9), "most_tokens: at most 288 tokens together"),
        (lambda: Request([300], 9), "prompt: tokens from 0 to 299"),
        (lambda: Request([-1], 9), "prompt: tokens from 0 to 299"),
    ],
)
def test_a_request_that_never_fits_is_refused(engine, request_of, rule):
    with pytest.raises(InvalidError, match=rule):
        engine.submit(request_of())
    assert not engine.busy


def test_a_request_that_the_pool_never_takes_is_given_up(model):
    planes = Planes(model, CAPACITY_TOKENS)
    with EmbeddedPool(planes, PolicyChange(name="static")) as pool:
        engine = Engine(model, planes, pool)
        engine.longest_tokens *= 2  # a pool that is smaller than the engine thinks
        lost, served = Request([1] * 300, 50), Request([1] * 30, 5)
        engine.submit(lost)
        engine.submit(served)
        assert engine.step()[0] is lost
        while engine.busy:
            engine.step()
    assert isinstance(lost.error, RefusedError)
    assert len(served.output) == 5


def test_the_same_seed_gives_the_same_answer_beside_other_requests(model):
    def asked():
        return Request([5, 6, 7], 30, sampling=Sampling(temperature=1.0, top_p=0.9, seed=11))

    one, two = asked(), asked()
    serve(model, [one])
    serve(model, [*requests(6), two, *requests(6)])
    assert one.output == two.output


def test_another_seed_gives_another_answer(model):
    asked = [Request([5, 6, 7], 30, sampling=Sampling(1.0, seed=seed)) for seed in (1, 2)]
    serve(model, asked)
    assert asked[0].output != asked[1].output


def test_the_narrowest_choice_is_the_likeliest_token(model):
    greedy, narrow = requests(1)[0], requests(1)[0]
    narrow.sampling = Sampling(temperature=1.0, top_p=1e-6)
    serve(model, [greedy, narrow])
    assert greedy.output == narrow.output


def test_tokens_are_drawn_as_often_as_they_are_likely():
    import torch

    from odma_service.engines.transformers.engine import draw

    request = Request([1], 1, sampling=Sampling(temperature=0.5, seed=3))
    scores = torch.tensor([0.1, 0.2, 0.7]).log()  # squared by the temperature
    counts = torch.zeros(3)
    for _ in range(4_000):
        counts[draw(scores, request)] += 1
    assert torch.allclose(counts / 4_000, torch.tensor([0.01, 0.04, 0.49]) / 0.54, atol=0.03)
