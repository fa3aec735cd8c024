"""Random and mutated messages over every rpc, against a real server.

    make fuzz-wire SECONDS=60

Messages are made from the descriptors, with names, epochs, handles and seqs of pools that live,
so that they get far; or they are such messages with some bytes changed, or no messages at all.
Bad is an answer INTERNAL or UNKNOWN, or none in time, or one that lacks its details; a server
that dies or logs a traceback; books that break a rule afterwards. What was sent is printed then,
and the exit code is 1. In the end comes what the calls covered of the service's code.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import grpc
from descriptors import GEOMETRIES, RPCS, SECONDS, error_info, form_of
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from paths import ROOT
from servers import Server

from odma_service.pool import Pool
from odma_service.rpc.v1 import memory_service_pb2 as pb
from odma_service.rpc.v1 import types_pb2 as types

TOKENS = {
    "token-of-the-engine": ("engine", "engine", 90),
    "token-of-another-one": ("another", "engine", 4),
    "token-of-the-operator": ("operator", "operator", 4),
    "token-of-a-reader": ("engine", "read-only", 1),
    "token-of-nobody": (None, None, 1),
}
"""The name and role behind each token, and how often it is sent."""

THREADS = 3
ENDLESS_SECONDS = 0.05
"""So long an endless stream is read."""

BAD = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DEADLINE_EXCEEDED}
BAD |= {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
GRPCS_OWN = {"Received message larger", "exactly one request message"}
"""What gRPC says where it cannot give details."""

OTHERS = {
    f"/{service.full_name}/{method.name}": method
    for file in (health_pb2, reflection_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
ALL: dict[str, MethodDescriptor] = RPCS | OTHERS
OFTEN = ("Apply", "Stream", "OpenPool", "Allocate", "Extend")

NAMES = ("a", "b", "c", "d.e", "f-g_h", "I")
NUMBERS = (0, 1, 2, 15, 16, 17, 255, 1024, 4096, 65_537, 2**24, 2**28, 2**31, 2**32 - 1)
NUMBERS_64 = (*NUMBERS, 2**53 - 1, 2**53, 2**63, 2**64 - 1)
REALS = (0.0, -0.0, 0.05, 0.5, 0.9, 1.0, 1.5, 4.0, 1e9, -1.0, 1e308, 5e-324, math.nan, math.inf)
KEY = b"of one granule.."
PLAUSIBLE: dict[str, tuple[Any, ...]] = {
    "ttl_seconds": (0, 1),
    "retention_seconds": (0, 60),
    "block_tokens": (0, 0, 16),
    "want_tokens": (0, 0, 400),
    "moves": (1, 2, 3),
    "access": (0, 1),  # each new device and access is calibrated, which takes a second or more
    "page_size": (0, 1, 5),
    "limits": (0, 1, 5),
    "clear_limits": (False,),
    "max_copy_tokens": (0, 64, 4096),
    "granule_tokens": (0, 64, 64),
    "reads_two_runs": (False,),
    "keys": (b"", b"", b"", KEY, KEY, KEY + KEY[::-1], KEY[::-1]),
    "keep_tokens": (0, 0, 64, 128),
    "shareable_tokens": (0, 0, 0, 64),
    "capacity_bytes": (2**20, 2**22),
    "tensor_parallel": (0, 1, 2),
    "element_bytes": (0, 2),
    "overflow_risk": (0.05, 0.5),
    "safety_share": (0.0, 0.1),
    "unsure_ratio": (0.0, 4.0),
    "growth": (1.0, 1.5),
    "tenant_share": (0.5, 1.0),
    "guaranteed_share": (0.0, 0.3),
    "maximum_share": (0.5, 1.0),
    "clear_tenants": (False,),
    "window": (0, 16),
    "expected_version": (1, 2),
}
CONFIG = (
    '{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, '
    '"hidden_size": 64, "torch_dtype": "bfloat16"}'
)
TEXTS = ("", "x", "chat", "static", "s3", "odma", "elastic", "mlu370-x4", "é" * 20, "x" * 65)
TEXTS += ("\0", "../x", "%s%n", "{}", "[" * 5000, "x" * 20_000, '{"num_hidden_layers": 1e999}')


class Life(NamedTuple):
    """What is known of a pool."""

    epoch: int
    seq: int
    handles: tuple[int, ...]


class Maker:
    """Makes messages for one thread. `lives` is shared, and as stale as it may be."""

    def __init__(self, random: Random, lives: dict[str, Life]) -> None:
        self._random = random
        self._lives = lives
        self._name = NAMES[0]
        self._sensible = False

    def content(self, method: MethodDescriptor) -> bytes:
        """Return the bytes of a message for an rpc, which may be none."""
        draw = self._random.random()
        self._name = self._random.choice(NAMES)
        if draw < 0.01:
            return self._random.randbytes(self._random.choice((1, 10, 100, 1000)))
        if draw < 0.011:
            return b"\x32\x00" * (self._random.choice((2, 4)) * 2**20 + 1)
        self._sensible = draw < 0.8
        message = self._message(method.input_type)
        self._sensible = False
        if draw < 0.4 and method.input_type.fields:
            field = self._random.choice(method.input_type.fields)
            message.ClearField(field.name)
            self._fill(message, field)
        content = message.SerializeToString()
        return self._mutated(content) if draw < 0.15 else content

    def _message(self, kind: Descriptor) -> Message:
        """Return a message of a kind, with most of its fields set."""
        message = GetMessageClass(kind)()
        if kind is types.Geometry.DESCRIPTOR and (self._sensible or self._random.random() < 0.8):
            message.CopyFrom(self._random.choice(GEOMETRIES))
            return message
        for field in self._fields(kind):
            self._fill(message, field)
        return message

    def _fields(self, kind: Descriptor) -> Iterator[FieldDescriptor]:
        chosen = {oneof.name: self._random.choice(oneof.fields) for oneof in kind.oneofs}
        for field in kind.fields:
            alone = field.containing_oneof
            if alone is not None and len(alone.fields) > 1:
                if chosen[alone.name] is field and self._random.random() < 0.98:
                    yield field
            elif self._random.random() < (0.3 if alone is not None else 0.93):
                yield field

    def _fill(self, message: Message, field: FieldDescriptor) -> None:
        if field.is_repeated:
            drawn = (self._value(field) for _ in range(self._count(field.name)))
            entries = [value for value in drawn if value is not None]
            if self._sensible and field.name in {"limits_tokens", "handles"}:
                entries = sorted(set(entries))
            getattr(message, field.name).extend(entries)
        elif field.message_type:
            getattr(message, field.name).CopyFrom(self._message(field.message_type))
        elif (value := self._value(field)) is not None:
            setattr(message, field.name, value)

    def _count(self, name: str) -> int:
        draw = self._random.random()
        if draw < 0.001:
            return 1500
        if name == "used" and draw < 0.7:
            return 0
        return int(self._random.expovariate(0.5))

    def _value(self, field: FieldDescriptor) -> Any:
        """Return a value for a field; None if a sensible message leaves it out."""
        if field.message_type:
            return self._message(field.message_type)
        known = self._known(field)
        if self._sensible:
            return known
        if known is not None and self._random.random() < 0.8:
            return known
        kind = field.cpp_type
        if kind == FieldDescriptor.CPPTYPE_STRING:
            text = self._random.choice(TEXTS)
            return text.encode() if field.type == FieldDescriptor.TYPE_BYTES else text
        if kind == FieldDescriptor.CPPTYPE_BOOL:
            return self._random.random() < 0.5
        if kind in {FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT}:
            return self._random.choice(REALS)
        if kind == FieldDescriptor.CPPTYPE_ENUM:
            numbers = [value.number for value in field.enum_type.values]
            return self._random.choice([*numbers, *numbers, *numbers, 99, -1])
        wide = kind in {FieldDescriptor.CPPTYPE_UINT64, FieldDescriptor.CPPTYPE_INT64}
        signed = kind in {FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64}
        number = self._random.choice(NUMBERS_64 if wide else NUMBERS)
        return min(number, 2**31 - 1) if signed else number

    def _known(self, field: FieldDescriptor) -> Any:
        """Return a value that makes sense for a field of this name, if there is one."""
        life = self._lives.get(self._name, Life(1, 0, ()))
        random = self._random
        match field.name:
            case "name" if field.containing_type.name == "PolicyChange":
                return random.choice(("", "static", "s3", "odma", "elastic"))
            case "name" if field.containing_type.name == "TenantShare":
                return random.choice(("chat", f"t{random.randrange(100)}"))
            case "name" | "pool_name":
                return self._name
            case "preset":
                return random.choice(("", "mlu370-x4"))
            case "open_id":
                return random.choice("pqr")
            case "epoch":
                return life.epoch
            case "seq":
                return life.seq + (random.random() < 0.9)
            case "completed_seq":
                return max(life.seq - (random.random() < 0.1), 0)
            case "config_json":
                return CONFIG
            case "text":
                return "a prompt"
            case "service" | "file_containing_symbol":
                return random.choice(("odma.v1.MemoryService", "", "odma.v1.PoolService"))
            case "file_by_filename":
                return "odma/v1/types.proto"
            case "offset_bytes" | "length_bytes":
                return random.randrange(1, 2**20)
            case name if name in PLAUSIBLE:
                return random.choice(PLAUSIBLE[name])
            case "handle" | "handles":
                return random.choice(life.handles) if life.handles else None
            case "request_id":
                return f"r{random.randrange(200)}"
            case "request_class" | "tenant":
                return random.choice(("", "chat", "code"))
            case "capacity_tokens":
                return random.choice((256, 4096, 65_536))
            case "max_regions":
                return random.choice((0, 8, 64))
            case "max_total_tokens" | "least_tokens" | "model_length_tokens":
                return random.randrange(1, 400)
            case "prompt_tokens" | "used_tokens":
                return random.randrange(1, 160)
            case name if name.endswith("_tokens"):
                return random.randrange(1, 60)
        if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
            return random.random() < 0.5
        if field.enum_type:
            return random.choice(field.enum_type.values).number
        return None

    def _mutated(self, content: bytes) -> bytes:
        changed = bytearray(content)
        for _ in range(self._random.choice((1, 1, 2, 8))):
            at = self._random.randrange(len(changed) + 1)
            match self._random.randrange(4):
                case 0:
                    changed[at:at] = self._random.randbytes(self._random.randrange(1, 9))
                case 1:
                    del changed[at : at + self._random.randrange(1, 9)]
                case 2 if at < len(changed):
                    changed[at] ^= 1 << self._random.randrange(8)
                case _:
                    changed[at:at] = changed[at // 2 : at]
        return bytes(changed)


class Fuzzer:
    """Calls one server until it is told to stop, or something is bad."""

    def __init__(self, target: str, seed: int) -> None:
        self._target = target
        self._seed = seed
        self._lives: dict[str, Life] = {}
        self.outcomes: dict[str, Counter[str]] = defaultdict(Counter)
        self.bad: list[str] = []

    def run(self, *, calls: int | None, seconds: float | None) -> None:
        """Make so many calls, or call for so long."""
        end = time.monotonic() + seconds if seconds else math.inf
        each = math.ceil(calls / THREADS) if calls else sys.maxsize
        threads = [
            threading.Thread(target=self._work, args=(Random(f"{self._seed}/{i}"), each, end))
            for i in range(THREADS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _work(self, random: Random, calls: int, end: float) -> None:
        maker = Maker(random, self._lives)
        weights = [6 if rpc.endswith(OFTEN) else 1 for rpc in ALL]
        with grpc.insecure_channel(self._target) as channel:
            while calls > 0 and time.monotonic() < end and not self.bad:
                calls -= 1
                [rpc] = random.choices(list(ALL), weights)
                try:
                    code = self._call(channel, rpc, maker, random)
                except Exception as error:  # noqa: BLE001 a bug of ours must not end as a success
                    self.bad.append(f"{rpc}: {error!r}")
                    return
                self.outcomes[rpc][code] += 1

    def _call(self, channel: grpc.Channel, rpc: str, maker: Maker, random: Random) -> str:
        """Call an rpc once, a stream with a few messages; return how it ended."""
        method = ALL[rpc]
        sent: list[bytes] = []
        answered = threading.Semaphore(0)
        patient, many = random.random() < 0.9, random.randrange(1, 6)
        breaks_off = random.random() < 0.1

        def sending() -> Iterator[bytes]:
            for i in range(many):
                if i and patient:
                    answered.acquire(timeout=SECONDS)
                sent.append(maker.content(method))
                yield sent[-1]

        parse = GetMessageClass(method.output_type).FromString
        stub = getattr(channel, form_of(method))(rpc, None, parse)
        [token] = random.choices(list(TOKENS), [often for *_, often in TOKENS.values()])
        endless = method.server_streaming and not method.client_streaming
        argument = sending() if method.client_streaming else next(sending())
        try:
            answer = stub(
                argument,
                timeout=ENDLESS_SECONDS if endless else SECONDS,
                metadata=[("authorization", f"Bearer {token}")],
            )
            if not method.server_streaming:
                self._learn(method, sent[0], answer)
                return "OK"
            for i, response in enumerate(answer):
                if method.client_streaming and method.input_type.name == "StreamRequest":
                    self._learn(method, sent[i], response)
                answered.release()
                if breaks_off:
                    answer.cancel()
                    break
        except grpc.RpcError as error:
            if endless and error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                return "OK"
            return self._judge(rpc, sent, error)
        finally:
            answered.release(many)
        return "OK"

    def _judge(self, rpc: str, contents: list[bytes], error: grpc.RpcError) -> str:
        code, text = error.code(), error.details() or ""
        flaw = f"answers {code.name}" if code in BAD else ""
        if not flaw and rpc in RPCS and not any(own in text for own in GRPCS_OWN):
            try:
                error_info(error)
            except AssertionError:
                flaw = f"answers {code.name} without details"
        if flaw:
            sent = ", ".join(content[:2000].hex() for content in contents)
            self.bad.append(f"{rpc} {flaw}: {text}; sent {sent}")
        return str(code.name)

    def _learn(self, method: MethodDescriptor, content: bytes, answer: Message) -> None:
        """Keep what later messages need to get far."""
        try:
            request = GetMessageClass(method.input_type).FromString(content)
        except DecodeError:
            self.bad.append(f"{method.name} is OK for {content[:2000].hex()}")
            return
        if isinstance(answer, pb.OpenPoolResponse):
            self._lives[answer.pool.name] = Life(answer.pool.epoch, 0, ())
            return
        if isinstance(request, pb.StreamRequest):
            request, answer = request.apply, answer.apply
        life = self._lives.get(request.pool.name) if hasattr(request, "pool") else None
        if life is None:
            return
        if isinstance(answer, pb.ApplyResponse):
            given = [r.place.handle for r in answer.results if r.HasField("place")]
            handles = tuple([*life.handles, *given][-40:])
            self._lives[request.pool.name] = Life(life.epoch, answer.seq, handles)
        elif isinstance(answer, pb.AllocateResponse):
            handles = (*life.handles[-40:], answer.place.handle)
            self._lives[request.pool.name] = life._replace(handles=handles)
        elif isinstance(answer, pb.ReconcileResponse):
            kept = tuple(place.handle for place in answer.kept)
            self._lives[request.pool.name] = Life(life.epoch, answer.last_seq, kept)


class Covered:
    """`odma serve` as a process that notes which lines of the service run."""

    def __init__(self, directory: Path) -> None:
        self._data = directory / "coverage"
        covering = ("-m", "coverage", "run", f"--data-file={self._data}", "--branch")
        covering += ("--include=*/odma_service/service/*",)
        flags = ("--reflection", "--max-pools", "5", "--log-level", "debug")
        flags += ("--token-file", str(_token_file(directory)), "--metrics-listen", "127.0.0.1:0")
        flags += ("--decision-log", str(directory / "decisions.jsonl"))
        self._server = Server(
            directory,
            flags,
            environment={"PYTHONFAULTHANDLER": "1"},
            program=(sys.executable, *covering, "-m", "odma_service"),
        ).start()
        self._process, self.target = self._server.process, self._server.target

    def stop(self) -> list[str]:
        """End the server; return what is wrong with how it ended, its log and its books."""
        bad = []
        if self._process.poll() is not None:
            bad.append(f"the server died, exit code {self._process.returncode}")
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGABRT)  # tells where its threads are
            self._process.communicate()
            bad.append("the server does not stop:\n" + self._server.log.read_text()[-8000:])
        if self._process.returncode != 0 and not bad:
            bad.append(f"the server ended with exit code {self._process.returncode}")
        log = self._server.log.read_text()
        if "Traceback" in log or "a call failed inside" in log:
            bad.append("the server's log has a traceback:\n" + log[-4000:])
        for file in self._server.pool_dir.glob("*.pool"):
            with Pool.attach(file, "") as pool:
                pool.check()
        return bad

    def report(self) -> dict[str, Any]:
        """Return the coverage of each module of the service in per cent, and of all."""
        if not self._data.exists():
            return {"total": None, "modules": {}}
        out = self._data.with_suffix(".json")
        command = [sys.executable, "-m", "coverage", "json", f"--data-file={self._data}"]
        subprocess.run([*command, "-o", str(out), "-q"], check=True, cwd=ROOT)
        found = json.loads(out.read_text())
        covered = {
            Path(name).name: round(file["summary"]["percent_covered"], 1)
            for name, file in sorted(found["files"].items())
            if file["summary"]["num_statements"]
        }
        return {"total": round(found["totals"]["percent_covered"], 1), "modules": covered}


def _token_file(directory: Path) -> Path:
    file = directory / "tokens.toml"
    file.touch(mode=0o600)
    file.write_text(
        "".join(
            f'[[identity]]\nname = "{name}"\nrole = "{role}"\ntoken = "{token}"\n'
            for token, (name, role, _) in TOKENS.items()
            if name
        )
    )
    return file


def fuzz(*, seed: int, calls: int | None = None, seconds: float | None = None) -> dict[str, Any]:
    """Fuzz a server of its own; return what was bad, the outcomes by rpc, and the coverage."""
    with tempfile.TemporaryDirectory() as directory:
        server = Covered(Path(directory))
        fuzzer = Fuzzer(server.target, seed)
        try:
            fuzzer.run(calls=calls, seconds=seconds)
        finally:
            bad = fuzzer.bad + server.stop()
        return {
            "seed": seed,
            "calls": sum(counts.total() for counts in fuzzer.outcomes.values()),
            "bad": bad,
            "outcomes": {rpc: dict(counts) for rpc, counts in sorted(fuzzer.outcomes.items())},
            "coverage": server.report(),
        }


def main() -> None:
    """Fuzz for so long; print the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    result = fuzz(seed=options.seed, seconds=options.seconds)
    print(json.dumps(result, indent=2))
    sys.exit(1 if result["bad"] else 0)


if __name__ == "__main__":
    main()
