"""Plays the conformance scenarios against a server.

    python tests/conformance/runner.py 127.0.0.1:50051 [PART OF A NAME]

tests/conformance/README.md explains the file and what is checked.
"""

from __future__ import annotations

import json
import secrets
import sys
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from odma_service.client import Client, PoolClient
from odma_service.client.stream import ApplyStream
from odma_service.rpc.v1 import (
    emulator_service_pb2,
    emulator_service_pb2_grpc,
    memory_service_pb2,
    memory_service_pb2_grpc,
    pool_service_pb2,
    pool_service_pb2_grpc,
    predictor_service_pb2,
    predictor_service_pb2_grpc,
    types_pb2,
)
from odma_service.values import KEY_BYTES
from odma_service.wire import answer_to, batch_from

FILE = Path(__file__).with_name("scenarios.json")
BY_NAME = {"GetPool", "ListRegions"}
WITHOUT_POOL = BY_NAME | {"OpenPool", "ListPools", "Predict", "EstimateAccess"}
SERVICES = {
    "MemoryService": (memory_service_pb2, memory_service_pb2_grpc),
    "PoolService": (pool_service_pb2, pool_service_pb2_grpc),
    "PredictorService": (predictor_service_pb2, predictor_service_pb2_grpc),
    "EmulatorService": (emulator_service_pb2, emulator_service_pb2_grpc),
}
TIMEOUT_SECONDS = 10.0
Names = dict[str, Any]


class Failure(Exception):
    """What was seen is not what the scenario says."""


def insist(fact: object, message: str) -> None:
    """Fail with `message` unless `fact`."""
    if not fact:
        raise Failure(message)


# --- messages and patterns ---


def is_name(value: object) -> bool:
    """Whether a value stands for another."""
    return isinstance(value, str) and value.startswith("$")


def same(a: object, b: object) -> bool:
    """Whether two plain values are equal; true is not 1."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def fill(value: Any, names: Names) -> Any:
    """Replace names and expressions in a message."""
    if is_name(value):
        insist(value in names, f"{value} is not bound")
        return names[value]
    if isinstance(value, list):
        return [fill(item, names) for item in value]
    if not isinstance(value, dict):
        return value
    if "$plus" in value:
        return sum(fill(value["$plus"], names))
    if "$times" in value:
        times, item = fill(value["$times"], names)
        return item * times if isinstance(item, str) else [item] * times
    if "$keys" in value:
        keys = "".join(letter * KEY_BYTES for letter in fill(value["$keys"], names))
        return b64encode(keys.encode()).decode()
    return {key: fill(item, names) for key, item in value.items()}


def match(pattern: Any, value: Any, names: Names, path: str) -> None:
    """Fail unless `value` matches; bind the names that are met first."""
    if pattern == "$any":
        return
    if is_name(pattern):
        bound = names.setdefault(pattern, value)
        insist(same(value, bound), f"{path}: {pattern} is {bound!r}, not {value!r}")
    elif isinstance(pattern, list):
        fits = isinstance(value, list) and len(value) == len(pattern)
        insist(fits, f"{path}: {pattern}, not {value!r}")
        for i, (item, element) in enumerate(zip(pattern, value, strict=True)):
            match(item, element, names, f"{path}[{i}]")
    elif not isinstance(pattern, dict):
        insist(same(pattern, value), f"{path}: {pattern!r}, not {value!r}")
    elif any(map(is_name, pattern)):
        for kind, wanted in pattern.items():
            fits = holds(kind, wanted, value, names, path)
            insist(fits, f"{path}: {kind} {wanted!r}, not {value!r}")
    else:
        insist(isinstance(value, dict), f"{path}: {pattern}, not {value!r}")
        for key, item in pattern.items():
            insist(key in value, f"{path} has no {key}")
            match(item, value[key], names, f"{path}.{key}")


def holds(kind: str, wanted: Any, value: Any, names: Names, path: str) -> bool:
    """Whether a value keeps one constraint."""
    match kind:
        case "$in":
            return any(same(item, value) for item in fill(wanted, names))
        case "$range":
            low, high = fill(wanted, names)
            return bool(low <= value <= high)
        case "$contains":
            return isinstance(value, str) and wanted in value
        case "$not":
            return not same(fill(wanted, names), value)
        case "$plus":
            return same(sum(fill(wanted, names)), value)
        case "$as":
            match(wanted, value, names, path)
            return True
        case "$unordered":
            return isinstance(value, list) and in_some_order(wanted, value, names, path)
    raise Failure(f"{kind} is no pattern")


def in_some_order(patterns: list[Any], values: list[Any], names: Names, path: str) -> bool:
    """Whether each pattern has a value of its own."""
    left = list(values)
    for pattern in patterns:
        for value in left:
            trial = dict(names)
            try:
                match(pattern, value, trial, path)
            except Failure:
                continue
            names.update(trial)
            left.remove(value)
            break
        else:
            return False
    return not left


def plain(message: Message) -> dict[str, Any]:
    """Return a message as plain values: an unset message field is None, enums are names."""
    values: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)

        def one(item: Any, field: Any = field) -> Any:
            if field.type == field.TYPE_MESSAGE:
                return plain(item)
            if field.type == field.TYPE_ENUM:
                known = field.enum_type.values_by_number.get(item)
                return known.name if known else item
            return item

        if field.is_repeated:
            values[field.name] = [one(item) for item in value]
        elif field.has_presence and not message.HasField(field.name):
            values[field.name] = None
        else:
            values[field.name] = one(value)
    return values


# --- the engine ---


@dataclass
class Held:
    """A region as the engine sees it, and the keys of its granules."""

    start: int
    length: int
    written: int = 0
    reused: int = 0
    shared_start: int = 0
    shared: int = 0
    keys: tuple[bytes, ...] = ()

    @property
    def own(self) -> range:
        """The tokens that nobody else holds."""
        return range(self.start, self.start + self.length - self.shared)

    def at(self, token: int) -> int:
        """Where a token lies."""
        shared = token < self.shared
        return self.shared_start + token if shared else self.start + token - self.shared


def keys_in(op: Mapping[str, Any]) -> tuple[bytes, ...]:
    """Return the keys that an Alloc or a Freeing brings."""
    data = b64decode(op.get("keys", ""))
    return tuple(data[i : i + KEY_BYTES] for i in range(0, len(data), KEY_BYTES))


class Engine:
    """What an engine knows of one epoch, and the memory that it writes."""

    def __init__(self, request: Mapping[str, Any], opened: Mapping[str, Any], client: PoolClient):
        self.request = request
        self.opened = opened
        self.client = client
        self.seq = 0
        self.capacity = opened["capacity_tokens"]
        self.ordered = request.get("single_ordered_stream", False)
        self.granule = opened["granule_tokens"]
        self.regions: dict[int, Held] = {}
        self.memory: list[tuple[int | bytes, int] | None] = [None] * self.capacity
        self.vacated_by = [0] * self.capacity  # seq of the batch that left it
        self.read_by = [0] * self.capacity  # seq of the batch that gathered from it

    def applied(self, batch: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
        """Take an answer of Apply: copies first, then places."""
        used = {one["handle"]: one for one in batch["used"]}
        for handle, held in self.regions.items():
            self._write(handle, held, used.get(handle, {}).get("used_tokens", 0))
        for op in batch["ops"]:
            if "free" in op:
                self._name(op["free"])
        owners = self._owners()
        self._copy(batch, answer, used, owners)
        for op, result in zip(batch["ops"], answer["results"], strict=True):
            if result["place"]:
                self.placed(result["place"], op.get("allocate", {}))
            elif "free" in op and not result["refusal"]:
                self.regions.pop(op["free"]["handle"], None)
        for place in answer["moved"]:
            self.placed(place, {})
        self._vacate(owners, batch)
        self.seq = answer["seq"]

    def placed(self, place: Mapping[str, int], asked: Mapping[str, Any]) -> None:
        """Take a place; its region may be new, then `asked` is its Alloc."""
        if place["length_tokens"] == 0:
            return
        reused = place["reused_tokens"]
        before = self.regions.get(place["handle"]) or Held(0, 0, reused, keys=keys_in(asked))
        self.regions[place["handle"]] = Held(
            place["start_token"],
            place["length_tokens"],
            min(before.written, place["length_tokens"]),
            reused,
            place["shared_start_token"],
            place["shared_tokens"],
            before.keys,
        )

    def freed(self, free: Mapping[str, Any]) -> None:
        """A region is no more, by a unary Free."""
        self._name(free)
        self.regions.pop(free["handle"], None)

    def kept(self, handles: Sequence[int]) -> None:
        """Only these regions are left, and nothing waits."""
        self.regions = {h: held for h, held in self.regions.items() if h in handles}
        self.vacated_by = [0] * self.capacity
        self.read_by = [0] * self.capacity

    def check(self) -> None:
        """The rules that hold between calls."""
        block = self.opened["block_tokens"]
        self._owners()
        for handle, held in self.regions.items():
            whole = held.start % block == 0 and held.length % block == 0
            insist(whole, f"{handle} is not whole blocks")
            insist(held.own.stop <= self.capacity, f"{handle} ends beyond the capacity")
            for i in range(held.written):
                here = self.memory[held.at(i)] == self._token(handle, i)
                insist(here, f"token {i} of {handle} is lost")

    def _token(self, handle: int, i: int) -> tuple[int | bytes, int]:
        """Return what a written token is: the same in all requests whose granule has this key."""
        keys = self.regions[handle].keys
        keyed = self.granule and i // self.granule < len(keys)
        return (keys[i // self.granule] if keyed else handle), i

    def _write(self, handle: int, held: Held, tokens: int) -> None:
        for i in range(held.written, tokens):
            self.memory[held.at(i)] = self._token(handle, i)
        held.written = max(held.written, tokens)

    def _name(self, free: Mapping[str, Any]) -> None:
        """Give what a region has written the keys that its Free brings."""
        if free["handle"] in self.regions:
            held = self.regions[free["handle"]]
            held.keys += keys_in(free)
            for i in range(held.written):
                self.memory[held.at(i)] = self._token(free["handle"], i)

    def _owners(self) -> list[int]:
        owners = [0] * self.capacity
        for handle, held in self.regions.items():
            for i in held.own[: self.capacity]:
                insist(not owners[i], f"{handle} and {owners[i]} both hold token {i}")
                owners[i] = handle
        return owners

    def _may_move(self, handle: int, batch: Mapping[str, Any]) -> bool:
        growing = {op["extend"]["handle"] for op in batch["ops"] if "extend" in op}
        moves = self.request["moves"]
        return moves == "MOVES_ANY" or (moves == "MOVES_OWN_GROWTH" and handle in growing)

    def _copy(
        self,
        batch: Mapping[str, Any],
        answer: Mapping[str, Any],
        used: Mapping[int, Mapping[str, Any]],
        owners: Sequence[int],
    ) -> None:
        ended = {op["free"]["handle"] for op in batch["ops"] if "free" in op}
        new = {
            result["place"]["handle"]: result["place"]["reused_tokens"]
            for op, result in zip(batch["ops"], answer["results"], strict=True)
            if "allocate" in op and result["place"]
        }
        at = {
            handle: [held.at(i) for i in range(held.written)]
            for handle, held in self.regions.items()
            if handle not in ended
        }
        targets: set[int] = set()
        for copy in answer["copies"]:
            what = f"copy {copy}"
            handle, tokens = copy["handle"], copy["tokens"]
            source, target = copy["from_token"], copy["to_token"]
            gathers = handle in new and handle not in self.regions
            if not gathers:
                insist(self._may_move(handle, batch), f"{what} is against {self.request['moves']}")
            said = used.get(handle, {})
            insist(not said.get("pinned"), f"{what} is of a pinned region")
            if gathers:
                most = new[handle]
            elif handle:
                insist(handle in self.regions, f"{what} is of no live region")
                held = self.regions[handle]
                most = said.get("used_tokens", 0) if said else held.length
                most = max(most, held.reused, len(held.keys) * self.granule)
            else:
                insist(self.granule, f"{what} is of a kept run, and none is kept")
                most = self.capacity
            insist(1 <= tokens <= most, f"{what} carries more than {most}")
            overlaps = abs(source - target) < tokens
            insist(copy["overlaps"] == overlaps, f"{what}: overlaps is wrong")
            insist(
                not overlaps or self.request.get("copies_may_overlap"), f"{what} may not overlap"
            )
            span = range(target, target + tokens)
            if not self.ordered:
                done = batch["completed_seq"]
                safe = all(
                    not owners[i]
                    and i not in targets
                    and max(self.vacated_by[i], self.read_by[i]) <= done
                    for i in span
                )
                insist(safe, f"{what} writes where something may still read")
                targets.update(span)
                if gathers:
                    self.read_by[source : source + tokens] = [batch["seq"]] * tokens
            self.memory[target : target + tokens] = self.memory[source : source + tokens]
            places = at.get(handle, [])
            moved = [i - source + target if source <= i < source + tokens else i for i in places]
            at[handle] = moved
            for one, places in at.items():
                for i, place in enumerate(places):
                    here = self.memory[place] == self._token(one, i)
                    insist(here, f"{what} loses token {i} of {one}")
        carried = sum(copy["tokens"] for copy in answer["copies"])
        most = batch.get("max_copy_tokens", carried)
        insist(carried <= most, f"copies carry {carried} tokens, not {most}")

    def _vacate(self, before: Sequence[int], batch: Mapping[str, Any]) -> None:
        for i, (old, new) in enumerate(zip(before, self._owners(), strict=True)):
            if new and new != old and not self.ordered:
                held = self.regions[new]
                adopted = i - held.start + held.shared < held.reused  # read, and not written
                last = max(self.vacated_by[i], 0 if adopted else self.read_by[i])
                done = not old and last <= batch["completed_seq"]
                insist(done, f"token {i} is given out before its completion")
            if old and new != old:
                self.vacated_by[i] = batch["seq"]


# --- playing ---


class Player:
    """Plays one scenario."""

    def __init__(self, client: Client, channel: grpc.Channel, script: Mapping[str, Any]) -> None:
        self.client = client
        self.defaults = script["defaults"]
        self.parts = script["parts"]
        mark = secrets.token_hex(6)
        self.names: Names = {"$name": f"conformance-{mark}"}
        self.names |= {f"${name}": f"{mark}{name}" for name in ("id", "id2", "id3")}
        self.engines: dict[str, Engine] = {}
        self.streams: dict[str, ApplyStream] = {}
        self.rpcs: dict[str, tuple[Callable[..., Message], type[Message]]] = {}
        for service, (messages, stubs) in SERVICES.items():
            stub = getattr(stubs, f"{service}Stub")(channel)
            for method in messages.DESCRIPTOR.services_by_name[service].methods:
                request = getattr(messages, method.input_type.name)
                self.rpcs[method.name] = getattr(stub, method.name), request

    def play(self, steps: Sequence[Mapping[str, Any]]) -> None:
        """Play steps in order; fail with the number of the step."""
        for i, step in enumerate(steps, start=1):
            try:
                self.step(step)
            except Exception as error:
                raise Failure(f"step {i} ({step.get('rpc', 'other')}): {error}") from error

    def step(self, step: Mapping[str, Any]) -> None:
        if "repeat" in step:
            for _ in range(step["repeat"]):
                outside = dict(self.names)
                self.play(step["steps"])
                self.names = outside
        elif "sort" in step:
            regions = self.engine.regions
            handles = sorted(fill(step["sort"], self.names), key=lambda h: regions[h].start)
            self.names |= dict(zip(step["as"], handles, strict=True))
        elif "play" in step:
            self.play(self.parts[step["play"]])
        elif "error" in step:
            self.fail(step, step["error"])
        elif "invalid" in step:
            self.fail(step, invalid(step["invalid"]))
        else:
            self.succeed(step)

    def fail(self, step: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        """Call past the client, to see the status as it is on the wire."""
        before = self.books()
        rpc, send = step["rpc"], step.get("send", {})
        method, request = self.rpcs[rpc]
        if "stream" in step:
            method = self.stream(step["stream"])
        try:
            answer = method(ParseDict(self.message(rpc, send), request()), timeout=TIMEOUT_SECONDS)
        except grpc.RpcError as error:
            match(wanted, status_of(error), self.names, "error")
        else:
            raise Failure(f"no error, but {answer}")
        insist(self.books() == before, "the books changed")

    def succeed(self, step: Mapping[str, Any]) -> None:
        rpc, send, expect = step["rpc"], step.get("send", {}), step.get("expect", {})
        message = self.message(rpc, send)
        before = self.books()
        if "stream" in step:
            filled = ParseDict(message, memory_service_pb2.ApplyRequest())
            response: Message = self.client.call(self.stream(step["stream"]), filled)
        else:
            response = self.call(rpc, message, own_seq="seq" in send)
        answer = plain(response)
        self.note(rpc, message, answer, response)
        if rpc == "Apply":
            expect = {"replayed": False, "copies": [], "moved": [], **expect}
        match(expect, answer, self.names, "answer")
        insist(not answer.get("replayed") or self.books() == before, "the books changed")
        self.agree()

    def call(self, rpc: str, message: Mapping[str, Any], own_seq: bool) -> Message:
        """Call through the client, which counts seq unless the step does."""
        method, request = self.rpcs[rpc]
        filled = ParseDict(message, request())
        if rpc != "Apply" or own_seq or filled.pool != self.engine.client.ref:
            return self.client.call(method, filled)
        batch = batch_from(filled)
        answer = self.engine.client.apply(
            batch.used,
            batch.ops,
            completed_seq=batch.completed_seq,
            max_copy_tokens=batch.max_copy_tokens,
            pass_refused=batch.pass_refused,
        )
        return answer_to(answer)

    def stream(self, name: str) -> ApplyStream:
        """Return the stream of a name, opened when the name is first met."""
        if name not in self.streams:
            self.streams[name] = ApplyStream(self.client.memory).__enter__()
        return self.streams[name]

    def message(self, rpc: str, send: Mapping[str, Any]) -> dict[str, Any]:
        """Return what is sent: the step's message with the fields that it leaves out."""
        message: dict[str, Any] = fill(dict(send), self.names)
        if rpc == "OpenPool":
            message = {
                "name": self.names["$name"],
                "open_id": self.names["$id"],
                **self.defaults,
                **message,
            }
            message = {key: value for key, value in message.items() if value is not None}
        if rpc in BY_NAME:
            message = {"name": self.names["$name"], **message}
        if rpc not in WITHOUT_POOL:
            message = {"pool": self.names.get("$pool"), **message}
        if rpc == "Apply":
            engine = self.engines.get(message["pool"]["name"])
            seq = engine.seq if engine else 0
            message = {"seq": seq + 1, "completed_seq": seq, "used": [], "ops": [], **message}
        return message

    @property
    def engine(self) -> Engine:
        return self.engines[self.names["$pool"]["name"]]

    def note(
        self, rpc: str, message: Mapping[str, Any], answer: Mapping[str, Any], response: Message
    ) -> None:
        """Tell the engine what was answered."""
        if rpc == "OpenPool":
            name = answer["pool"]["name"]
            self.names["$pool"] = answer["pool"]
            known = self.engines.get(name)
            if known is None or known.opened["pool"]["epoch"] != answer["pool"]["epoch"]:
                self.engines[name] = Engine(message, answer, PoolClient(self.client, response))
            else:  # perhaps under another owner number
                known.client.ref.CopyFrom(response.pool)
        elif rpc == "ClosePool":
            self.engines.pop(message["pool"]["name"], None)
        elif rpc == "ForgetPool":
            self.names.pop("$pool", None)
        elif rpc == "Apply" and not answer["replayed"]:
            insist(answer["seq"] == message["seq"], f"the answer is of seq {answer['seq']}")
            counts = len(answer["results"]) == len(message["ops"])
            insist(counts, "a result for each operation")
            self.engine.applied(message, answer)
            self.engine.client.seq = answer["seq"]
        elif rpc in ("Allocate", "Extend"):
            self.engine.placed(answer["place"], message.get("allocate", {}))
        elif rpc == "Free":
            self.engine.freed(message["free"])
        elif rpc == "Reconcile":
            self.engine.kept(message["handles"])

    def books(self) -> dict[str, Any] | None:
        """Return the books of the scenario's pool, without clocks and counters."""
        if "$pool" not in self.names:
            return None
        name = self.names["$pool"]["name"]
        books = plain(self.client.get_pool(name))
        summary = books.pop("summary")
        del books["counters"]
        regions = [plain(region) for region in self.client.list_regions(name)]
        return {**books, "pool": summary["pool"], "free": summary["free_tokens"], "all": regions}

    def agree(self) -> None:
        """Insist that every engine and the service believe the same."""
        for name, engine in self.engines.items():
            engine.check()
            pool = self.client.get_pool(name)
            regions = self.client.list_regions(name)
            live = {
                region.place.handle: (region.place.start_token, region.place.length_tokens)
                for region in regions
                if region.state == pool_service_pb2.REGION_STATE_LIVE
            }
            believed = {h: (held.start, held.length) for h, held in engine.regions.items()}
            insist(live == believed, f"the books have {live}, the engine {believed}")
            held = sum(len(one.own) for one in engine.regions.values())
            waits = {
                pool_service_pb2.REGION_STATE_LIVE: False,
                pool_service_pb2.REGION_STATE_AWAITING_COMPLETION: True,
            }
            waiting = sum(
                region.place.length_tokens
                for region in regions
                if waits.get(region.state, region.awaits_seq > pool.completed_seq)
            )
            said = pool.awaiting_completion_tokens
            insist(waiting == said, f"{waiting} tokens wait in the list, {said} in the report")
            free = pool.summary.free_tokens
            insist(free + held + waiting == engine.capacity, "the books do not balance")

    def close(self) -> None:
        for stream in self.streams.values():
            stream.__exit__(None, None, None)
        for engine in self.engines.values():
            engine.client.close_pool()


def invalid(field: str) -> dict[str, Any]:
    """Return the pattern of the status that names a field."""
    return {"code": "INVALID_ARGUMENT", "reason": "INVALID", "field": {"$contains": field}}


def status_of(error: grpc.RpcError) -> dict[str, Any]:
    """Return what a status and its details tell."""
    told: dict[str, Any] = {"code": error.code().name, "reason": "", "metadata": {}, "field": ""}
    told["refusal"] = None
    status = rpc_status.from_call(error)
    for detail in status.details if status else ():
        info = error_details_pb2.ErrorInfo()
        bad = error_details_pb2.BadRequest()
        refusal = types_pb2.Refusal()
        if detail.Unpack(info):
            told |= {"reason": info.reason, "metadata": dict(info.metadata)}
        elif detail.Unpack(bad):
            told["field"] = bad.field_violations[0].field
        elif detail.Unpack(refusal):
            told["refusal"] = plain(refusal)
    return told


def main(target: str = "127.0.0.1:50051", part: str = "") -> int:
    """Play every scenario whose name contains `part`; return how many failed."""
    script = json.loads(FILE.read_text())
    failed = 0
    with Client(target) as client, grpc.insecure_channel(target) as channel:
        for scenario in script["scenarios"]:
            if part not in scenario["name"]:
                continue
            player = Player(client, channel, script)
            try:
                player.play(scenario["steps"])
                print(f"ok      {scenario['name']}")
            except Failure as failure:
                failed += 1
                print(f"FAILED  {scenario['name']}\n        {failure}")
            player.close()
    print(f"{failed} scenarios failed" if failed else "all scenarios hold")
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) > 0)
