"""Prompts, their keys and tokens go nowhere but where they are meant to: no log line holds one."""

from __future__ import annotations

import socket
import subprocess
import sys
import urllib.request
from base64 import b64encode

import grpc
import pytest
from certificates import LOCAL, Authority
from descriptors import RPCS, about, error_info, invoke
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from odma_service.rpc.v1 import memory_service_pb2 as pb
from odma_service.rpc.v1 import types_pb2 as types

PROMPT = "the-prompt-that-nobody-may-read"
TOKEN = "the-token-that-nobody-may-read"
KEY = b"the-hidden-key-1"
MARKERS = (PROMPT, TOKEN, KEY.decode(), KEY.hex(), b64encode(KEY).decode()[:20])

NAMED = {"name", "pool_name", "open_id", "preset", "request_id", "request_class", "tenant"}
"""Texts that are names and may be logged."""


def marked(message: Message, tail: str = "") -> Message:
    """Put the prompt into every text of a message that is no name, made messages included."""
    for field in message.DESCRIPTOR.fields:
        if field.message_type is types.PoolRef.DESCRIPTOR:
            continue
        if field.message_type:
            inner = getattr(message, field.name)
            marked(inner.add() if field.is_repeated else inner, tail)
            if not field.is_repeated:
                inner.SetInParent()
        elif field.type == FieldDescriptor.TYPE_STRING and field.name not in NAMED:
            assert not field.is_repeated
            setattr(message, field.name, PROMPT + tail)
        elif field.name == "keys":
            message.keys = KEY + tail.encode()
    return message


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@pytest.mark.parametrize("form", ["console", "json"])
def test_no_log_line_holds_a_prompt_a_key_or_a_token(servers, tmp_path, form):
    authority = Authority(tmp_path)
    own = authority.sign("server", *LOCAL)
    tokens = tmp_path / "tokens.toml"
    tokens.touch(mode=0o600)
    tokens.write_text(f'[[identity]]\nname = "a"\nrole = "engine"\ntoken = "{TOKEN}"\n')
    flags = ("--tls-cert", str(own.cert), "--tls-key", str(own.key), "--token-file", str(tokens))
    decisions = tmp_path / "decisions.jsonl"
    metrics_listen = f"127.0.0.1:{free_port()}"
    flags += ("--decision-log", str(decisions), "--metrics-listen", metrics_listen)
    server = servers(*flags, "--log-level", "debug", "--log-format", form, "--reflection")
    codes = set()
    with grpc.secure_channel(server.target, authority.trusted().credentials()) as channel:

        def call(rpc: str, *requests: Message, token: str = TOKEN) -> None:
            metadata = [("authorization", f"Bearer {token}")]
            error = invoke(channel, rpc, list(requests), metadata=metadata)
            codes.add(error_info(error).reason if error else "OK")

        opening = pb.OpenPoolRequest(
            name="main",
            open_id="once",
            geometry=types.Geometry(planes=[types.PlaneGroup(count=2, bytes_per_token=64)]),
            capacity_tokens=4096,
            moves=types.MOVES_ANY,
            granule_tokens=64,
        )
        open_pool = "/odma.v1.MemoryService/OpenPool"
        call(open_pool, opening)
        for rpc in RPCS:
            for tail in ("", "x" * 20_000):
                for pool in (None, types.PoolRef(name="main", epoch=1)):
                    call(rpc, marked(about(rpc, pool), tail))
                call(rpc, marked(about(rpc, None), tail), token=TOKEN + "-almost")
        opening.model.config_json = PROMPT
        call(open_pool, opening)
        batches(channel, call)
    with urllib.request.urlopen(f"http://{metrics_listen}/metrics", timeout=30) as page:
        metrics = page.read().decode()
    server.terminate()
    log = server.log.read_text()
    assert "odma_" in metrics
    assert decisions.read_text()
    assert {"OK", "INVALID", "IDENTITY", "EPOCH_OVER"} <= codes
    assert "pool opened" in log
    for marker in MARKERS:
        assert marker not in log
        assert marker not in metrics
        assert marker not in decisions.read_text()
    assert own.key.read_text().splitlines()[1] not in log


def batches(channel, call):
    """Send prompts in batches that are done, refused, changed and repeated."""
    opened = pb.OpenPoolRequest(
        name="other",
        open_id="once",
        geometry=types.Geometry(planes=[types.PlaneGroup(count=2, bytes_per_token=64)]),
        capacity_tokens=256,
        moves=types.MOVES_ANY,
        granule_tokens=64,
    )
    open_pool = channel.unary_unary(
        "/odma.v1.MemoryService/OpenPool",
        pb.OpenPoolRequest.SerializeToString,
        pb.OpenPoolResponse.FromString,
    )
    ref = open_pool(opened, metadata=[("authorization", f"Bearer {TOKEN}")]).pool
    apply = "/odma.v1.MemoryService/Apply"
    alloc = pb.Alloc(request_id="r", prompt_tokens=80, request_class="chat", text=PROMPT, keys=KEY)
    full = pb.Alloc(request_id="full", prompt_tokens=250, text=PROMPT, keys=3 * KEY)
    request = pb.ApplyRequest(
        pool=ref, seq=1, ops=[pb.Op(allocate=alloc), pb.Op(allocate=full), pb.Op(allocate=full)]
    )
    call(apply, request)
    call(apply, request)
    request.ops[0].allocate.text += "-changed"
    call(apply, request)
    call("/odma.v1.MemoryService/Allocate", pb.AllocateRequest(pool=ref, allocate=full))
    free = pb.Freeing(handle=2**32, end=pb.END_FINISHED, keep_tokens=130, keys=KEY)
    call("/odma.v1.MemoryService/Free", pb.FreeRequest(pool=ref, free=free))
    call("/odma.v1.MemoryService/ClosePool", pb.ClosePoolRequest(pool=ref))


FAILING = """
from odma_service.service import config
from odma_service.service import server
from odma_service.service.rpc.statuses import told

server._configure_log(config.load({"log_level": "debug", "log_format": "%s"}))

def answer(request):
    prompt = [request]
    raise RuntimeError("a bug")

try:
    answer("the-prompt-" + "that-nobody-may-read")
except RuntimeError as error:
    told(error, "Apply")
"""


@pytest.mark.parametrize("form", ["console", "json"])
def test_the_log_of_a_bug_shows_no_local_variables(form):
    run = subprocess.run(
        [sys.executable, "-c", FAILING % form], capture_output=True, text=True, check=True
    )
    assert "a call failed inside" in run.stderr
    assert "RuntimeError: a bug" in run.stderr
    assert PROMPT not in run.stderr
