"""OpenAI's own client against `odma serve-model`, whose cache a service places."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from contextlib import contextmanager
from threading import Timer

import openai
import pytest
from servers import PLAIN, wait_for

from odma_service.client.local import ODMA
from odma_service.rpc.v1 import pool_service_pb2 as pool_pb

START_SECONDS = 200
pytestmark = pytest.mark.timeout(300)  # a server that imports torch starts slowly

READY = "odma model ready on "
POOL = "served"
HELLO = [{"role": "user", "content": "Hello"}]


@contextmanager
def serving(model_dir, *flags, environment=None):
    """Run a server of the model; yield its address."""
    command = [*ODMA, "serve-model", str(model_dir), "--listen", "127.0.0.1:0", *flags]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env={**PLAIN, "OMP_NUM_THREADS": "1", **(environment or {})},
    )
    deadline = Timer(START_SECONDS, process.kill)
    deadline.start()
    try:
        line = process.stdout.readline()
        deadline.cancel()
        assert line.startswith(READY)
        yield line.removeprefix(READY).strip(), process
    finally:
        deadline.cancel()
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def address(model_dir, server):
    flags = ("--target", server.target, "--pool", POOL, "--capacity-tokens", "512")
    with serving(model_dir, *flags) as (address, _):
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def books(service):
    """Return a function that reads the pool, once nothing is left in it."""

    def read():
        wait_for(lambda: not service.get_pool(POOL).summary.regions, "regions to be given back")
        return service.get_pool(POOL).counters

    return read


def chat(client, **asked):
    asked = {"model": "tiny", "messages": HELLO, "temperature": 0, "max_tokens": 20, **asked}
    return client.chat.completions.create(**asked)


def complete(client, **asked):
    asked = {"model": "tiny", "prompt": "Hello", "temperature": 0, "max_tokens": 20, **asked}
    return client.completions.create(**asked)


def test_a_chat_is_answered(client):
    answer = chat(client)
    [choice] = answer.choices
    assert answer.object == "chat.completion"
    assert choice.message.role == "assistant"
    assert len(choice.message.content) == 20  # a byte a token
    assert choice.finish_reason == "length"
    assert answer.usage.prompt_tokens == len("user: Hello\nassistant: ")
    assert answer.usage.completion_tokens == 20


def test_a_stream_says_the_same(client):
    whole = chat(client).choices[0].message.content
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    *texts, usage = chunks
    assert texts[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in texts) == whole
    assert [chunk.choices[0].finish_reason for chunk in texts][-2:] == [None, "length"]
    assert usage.choices == []
    assert usage.usage.completion_tokens == 20
    assert len({chunk.id for chunk in chunks}) == 1


def test_completions_are_answered_whole_and_streamed(client):
    whole = complete(client)
    assert whole.object == "text_completion"
    assert whole.usage.prompt_tokens == 5
    streamed = complete(client, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == whole.choices[0].text


def test_a_completion_has_16_tokens_where_nothing_is_said(client):
    answer = client.completions.create(model="tiny", prompt="Hello")
    assert answer.usage.completion_tokens == 16


def test_several_prompts_have_several_answers_each_in_its_place(client):
    texts = [complete(client, prompt=prompt).choices[0].text for prompt in ("Hello", "World")]
    both = complete(client, prompt=["Hello", "World"], n=2)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in both.choices] == [texts[0], texts[0], texts[1], texts[1]]


def test_a_prompt_may_be_tokens(client):
    tokens = complete(client, prompt=[10, 20, 30])
    assert tokens.usage.prompt_tokens == 3
    assert complete(client, prompt=[[10, 20, 30]]).choices[0].text == tokens.choices[0].text


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_stops_before_a_stop_and_ends_its_request(client, books, stream):
    before = books()
    text = complete(client, max_tokens=200).choices[0].text
    stop = text[12:15]
    asked = {"stop": ["never said", stop], "max_tokens": 200, "stream": stream}
    answer = complete(client, **asked)
    chunks = list(answer) if stream else [answer]
    assert "".join(chunk.choices[0].text for chunk in chunks) == text.partition(stop)[0]
    assert chunks[-1].choices[0].finish_reason == "stop"
    after = books()
    assert (after.hit_limit - before.hit_limit, after.finished - before.finished) == (1, 1)


def test_a_seed_repeats_a_random_answer(client):
    one, two, three = (chat(client, temperature=1, seed=seed) for seed in (4, 4, 5))
    assert one.choices == two.choices
    assert one.choices != three.choices


def test_parallel_clients_get_what_they_get_alone(client):
    from concurrent.futures import ThreadPoolExecutor

    prompts = [f"{i} is a number" for i in range(12)]

    def ask(prompt):
        return complete(client, prompt=prompt, max_tokens=60).choices[0].text

    expected = [ask(prompt) for prompt in prompts]
    with ThreadPoolExecutor(12) as threads:
        assert list(threads.map(ask, prompts)) == expected


def test_a_stream_that_its_client_closes_gives_its_memory_back(client, books):
    before = books()
    with chat(client, max_tokens=450, stream=True) as stream:
        for _ in range(3):
            next(stream)
    after = books()
    assert after.allocates == before.allocates + 1
    assert after.hit_limit == before.hit_limit


def test_a_client_that_goes_away_gives_its_memory_back(address, service, books):
    before = books()
    host, _, port = address.removeprefix("http://").removesuffix("/v1").rpartition(":")
    body = json.dumps({"model": "tiny", "messages": HELLO, "max_tokens": 450}).encode()
    with socket.create_connection((host, int(port))) as wire:
        wire.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        wait_for(lambda: service.get_pool(POOL).summary.regions, "the request to run")
    after = books()
    assert after.allocates == before.allocates + 1
    assert after.hit_limit == before.hit_limit


def test_the_model_is_listed(client):
    [model] = client.models.list().data
    assert model.id == "tiny"
    assert client.models.retrieve("tiny").id == "tiny"


@pytest.mark.parametrize(
    ("asked", "param", "message"),
    [
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"presence_penalty": 1}, "presence_penalty", "less than or equal to 0"),
        ({"logprobs": True}, "logprobs", "False"),
        ({"tools": [{"type": "function"}]}, "tools", "at most 0"),
        ({"extra_body": {"best": 1}}, "best", "Unrecognized request argument supplied: best"),
        ({"messages": []}, "messages", "at least 1"),
        ({"stop": [""]}, "stop", "none empty"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None, "text"),
    ],
)
def test_what_is_not_served_is_refused_by_name(client, asked, param, message):
    with pytest.raises(openai.BadRequestError, match=message) as refused:
        chat(client, **asked)
    assert refused.value.type == "invalid_request_error"
    assert param is None or refused.value.param == param


def test_a_request_that_never_fits_is_refused_as_too_long(client):
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            chat(client, max_tokens=500, stream=stream)
        assert refused.value.code == "context_length_exceeded"


def test_an_unknown_model_and_an_unknown_path_are_not_found(client):
    with pytest.raises(openai.NotFoundError) as refused:
        chat(client, model="other")
    assert refused.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="tiny", input="x")


@pytest.mark.parametrize(
    ("kind", "body", "status"),
    [
        ("text/plain", b"{}", 415),
        ("application/json", b"{", 400),
        ("application/json", b" " * 2**23, 413),
    ],
)
def test_a_body_that_is_no_request_is_refused(address, kind, body, status):
    import httpx

    told = httpx.post(f"{address}/completions", content=body, headers={"Content-Type": kind})
    assert told.status_code == status
    assert told.json()["error"]["type"] == "invalid_request_error"


def test_a_key_is_asked_for_where_one_is_set(model_dir):
    with serving(model_dir, environment={"ODMA_API_KEY": "secret"}) as (address, _):
        with openai.OpenAI(base_url=address, api_key="other", max_retries=0) as stranger:
            with pytest.raises(openai.AuthenticationError):
                complete(stranger)
            with pytest.raises(openai.AuthenticationError):
                stranger.models.list()
        with openai.OpenAI(base_url=address, api_key="secret", max_retries=0) as friend:
            assert complete(friend).choices


def test_a_server_that_is_stopped_closes_its_pool(model_dir, server, service, name):
    with serving(model_dir, "--target", server.target, "--pool", name) as (_, process):
        assert service.get_pool(name).summary.capacity_tokens == 4_096
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(30) == 0
    assert service.get_pool(name).summary.state == pool_pb.POOL_STATE_CLOSED


def test_an_engine_whose_pool_was_taken_ends_its_server(model_dir, server, service, name):
    with serving(model_dir, "--target", server.target, "--pool", name) as (address, process):
        service.open_pool(name, **taken_from(service, name)).close_pool()
        with openai.OpenAI(base_url=address, api_key="x", max_retries=0) as client:
            with pytest.raises(openai.InternalServerError) as failed:
                complete(client)
            assert failed.value.status_code == 503
        assert process.wait(30) == 2


def taken_from(service, name):
    """Return what opens a pool again, as another owner."""
    from odma_service.values import Moves, PlaneGroup

    planes = [PlaneGroup(6, 2 * 16 * 4)]
    return {"planes": planes, "capacity_tokens": 4_096, "moves": Moves.ANY, "take_over": True}
