"""Traces: what a real collector is sent, and that nobody suffers when it is not there."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from concurrent import futures

import grpc
import pytest
from servers import PLANES, open_pool, wait_for

from odma_service.client import Client
from odma_service.client.aio import AsyncClient
from odma_service.rpc.v1 import memory_service_pb2 as pb
from odma_service.rpc.v1 import pool_service_pb2 as pool_pb
from odma_service.rpc.v1.pool_service_pb2_grpc import PoolServiceStub
from odma_service.values import Allocate, Batch, End, Free, Moves, PolicyChange
from odma_service.wire import batch_to

collector_pb = pytest.importorskip(
    "opentelemetry.proto.collector.trace.v1.trace_service_pb2", reason="the extra otel is missing"
)
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as collector_grpc  # noqa: E402
from opentelemetry.proto.trace.v1 import trace_pb2  # noqa: E402
from opentelemetry.sdk.trace import TracerProvider  # noqa: E402

SERVER, ERROR = trace_pb2.Span.SPAN_KIND_SERVER, trace_pb2.Status.STATUS_CODE_ERROR
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
MEMORY = "odma.v1.MemoryService"
KEY = b"of one granule.."


class Collector(collector_grpc.TraceServiceServicer):
    """Keeps what it is sent. While `stuck` is not set it answers nobody."""

    def __init__(self) -> None:
        self.spans: list[trace_pb2.Span] = []
        self.resources: list[dict] = []
        self.stuck = threading.Event()
        self.stuck.set()
        self.asked = threading.Event()
        self._server = grpc.server(futures.ThreadPoolExecutor(4))
        collector_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def Export(self, request, context):
        self.asked.set()
        self.stuck.wait()
        for group in request.resource_spans:
            self.resources.append(attributes(group.resource))
            self.spans += [span for scope in group.scope_spans for span in scope.spans]
        return collector_pb.ExportTraceServiceResponse()

    def stop(self) -> None:
        self.stuck.set()
        self._server.stop(None).wait()

    def named(self, name: str) -> list[trace_pb2.Span]:
        return [span for span in list(self.spans) if span.name == name]

    def of_pool(self, rpc: str, pool: str, most: int = 1) -> list[trace_pb2.Span]:
        """Wait for the spans of a pool's calls of one rpc."""

        def found() -> list[trace_pb2.Span]:
            spans = self.named(f"{MEMORY}/{rpc}")
            return [span for span in spans if attributes(span).get("odma.pool") == pool]

        wait_for(lambda: len(found()) >= most, f"spans of {rpc}")
        return found()


def attributes(part) -> dict:
    """Return the attributes of a span, an event or a resource as Python values."""

    def plain(value):
        kind = value.WhichOneof("value")
        if kind == "array_value":
            return [plain(item) for item in value.array_value.values]
        return getattr(value, kind)

    return {pair.key: plain(pair.value) for pair in part.attributes}


@pytest.fixture
def collector():
    running = Collector()
    yield running
    running.stop()


def environment(port: int, **more: str) -> dict[str, str]:
    return {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
        "OTEL_BSP_SCHEDULE_DELAY": "50",
        **more,
    }


@pytest.fixture
def traced(servers, collector):
    """Return a server that sends traces to the collector."""
    return servers("--traces", environment=environment(collector.port))


# --- what is sent ---


def test_a_call_is_a_span_with_the_outcome_of_its_operations(traced, collector, name):
    with Client(traced.target) as client:
        pool = open_pool(client, name, capacity_tokens=1024, granule_tokens=64)
        place = pool.allocate(Allocate("first", 100, keys=KEY))
        pool.free(Free(place.handle, End.FINISHED, keep_tokens=100))
        pool.apply(
            ops=[Allocate("a", 100, keys=KEY), Allocate("b", 2000), Allocate("c", 100)],
            pass_refused=True,
        )
    [span] = collector.of_pool("Apply", name)
    assert span.kind == SERVER
    assert span.status.code != ERROR
    assert not span.parent_span_id
    found = attributes(span)
    assert found["rpc.system.name"] == "grpc"
    assert found["rpc.method"] == f"{MEMORY}/Apply"
    assert found["rpc.response.status_code"] == "OK"
    assert found["odma.epoch"] == pool.ref.epoch
    assert found["odma.operations.allocate"] == 3
    assert found["odma.refusals"] == ["allocate INVALID 1"]
    assert found["odma.reused_tokens"] == 64
    assert found["odma.copies"] == found["odma.copied_tokens"] == 0
    assert 0 < span.end_time_unix_nano - span.start_time_unix_nano < 60e9
    resource = collector.resources[0]
    assert resource["service.name"] == "odma"
    assert resource["service.version"]


def test_a_call_continues_the_callers_trace(traced, collector, name):
    metadata = (("traceparent", f"00-{TRACE}-{CALLER}-01"),)
    with Client(traced.target) as client:
        pool = open_pool(client, name)
        request = pb.ApplyRequest(pool=pool.numbered(), seq=1)
        client.memory.Apply(request, timeout=10, metadata=metadata)
    [span] = collector.of_pool("Apply", name)
    assert span.trace_id.hex() == TRACE
    assert span.parent_span_id.hex() == CALLER


def test_our_clients_say_which_span_they_call_in(traced, collector, name):
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("engine")

    async def steps() -> None:
        async with AsyncClient(traced.target) as client:
            pool = await client.open_pool(
                name, planes=PLANES, capacity_tokens=1024, moves=Moves.ANY
            )
            await pool.apply()

    with tracer.start_as_current_span("step") as span:
        asyncio.run(steps())
        with Client(traced.target) as client:
            open_pool(client, name, take_over=True).apply()
    caller = span.get_span_context()
    for sent in collector.of_pool("Apply", name, 2):
        assert int(sent.trace_id.hex(), 16) == caller.trace_id
        assert int(sent.parent_span_id.hex(), 16) == caller.span_id


def test_a_caller_that_is_not_sampled_is_left_alone(traced, collector, name):
    metadata = (("traceparent", f"00-{TRACE}-{CALLER}-00"),)
    with Client(traced.target) as client:
        pool = open_pool(client, name)
        client.memory.Apply(
            pb.ApplyRequest(pool=pool.numbered(), seq=1), timeout=10, metadata=metadata
        )
        client.memory.Apply(
            pb.ApplyRequest(pool=pool.numbered(), seq=2, completed_seq=1), timeout=10
        )
    [span] = collector.of_pool("Apply", name)
    assert span.trace_id.hex() != TRACE


def test_a_prediction_is_a_part_of_its_call(traced, collector, name):
    with Client(traced.target) as client:
        pool = open_pool(client, name, policy=PolicyChange(name="odma"))
        pool.apply(ops=[Allocate("a", 100, text="the secret of the vault")])
    [span] = collector.of_pool("Apply", name)
    [part] = [one for one in collector.named("predict") if one.trace_id == span.trace_id]
    assert part.parent_span_id == span.span_id
    assert span.start_time_unix_nano <= part.start_time_unix_nano
    assert part.end_time_unix_nano <= span.end_time_unix_nano
    assert not any(b"vault" in one.SerializeToString() for one in collector.spans)


def test_a_change_of_policy_is_an_event_of_the_call(traced, collector, name):
    with Client(traced.target) as client:
        pool = open_pool(client, name)
        pool.set_policy(PolicyChange(safety_share=0.2))
    [span] = collector.of_pool("SetPolicy", name)
    assert [event.name for event in span.events] == ["POLICY_SET"]
    assert attributes(span.events[0])["odma.pool"] == name


def test_only_faults_of_the_service_are_errors(traced, collector, name):
    with Client(traced.target) as client, grpc.insecure_channel(traced.target) as channel:
        pool = open_pool(client, name)
        with pytest.raises(grpc.RpcError):
            client.memory.Apply(pb.ApplyRequest(pool=pool.numbered(), seq=7), timeout=10)
        nothing = channel.unary_unary("/odma.v1.MemoryService/Nothing")
        with pytest.raises(grpc.RpcError):
            nothing(b"", timeout=10)
    [gap] = collector.of_pool("Apply", name)
    assert attributes(gap)["rpc.response.status_code"] == "FAILED_PRECONDITION"
    assert gap.status.code != ERROR
    wait_for(lambda: collector.named("grpc"), "the span of an unknown rpc")
    [unknown] = collector.named("grpc")
    assert attributes(unknown)["rpc.method"] == "_OTHER"
    assert attributes(unknown)["error.type"] == "UNIMPLEMENTED"
    assert unknown.status.code == ERROR


def test_each_batch_of_a_stream_is_a_trace_linked_to_the_stream(traced, collector, name):
    metadata = (("traceparent", f"00-{TRACE}-{CALLER}-01"),)
    with Client(traced.target) as client:
        pool = open_pool(client, name)
        batches = [
            batch_to(pool.numbered(), Batch(seq, 0, [], [Allocate(f"r{seq}", 64)]))
            for seq in (1, 2, 9)
        ]
        requests = (pb.StreamRequest(apply=batch) for batch in batches)
        with pytest.raises(grpc.RpcError, match="FAILED_PRECONDITION"):
            list(client.memory.Stream(requests, timeout=10, metadata=metadata))
    spans = collector.of_pool("Stream", name, 3)
    wait_for(lambda: len(collector.named(f"{MEMORY}/Stream")) == 4, "the span of the stream")
    [stream] = [one for one in collector.named(f"{MEMORY}/Stream") if one not in spans]
    assert stream.parent_span_id.hex() == CALLER
    assert len({span.trace_id for span in (*spans, stream)}) == 4
    for span in spans:
        assert not span.parent_span_id
        assert [link.span_id for link in span.links] == [stream.span_id]
    codes = [attributes(span)["rpc.response.status_code"] for span in spans]
    assert codes == ["OK", "OK", "FAILED_PRECONDITION"]


def test_a_watch_is_sent_when_it_ends_and_probes_never(traced, collector, name):
    with Client(traced.target) as client, grpc.insecure_channel(traced.target) as channel:
        assert client.is_serving()
        events = PoolServiceStub(channel).Watch(pool_pb.WatchRequest(name=name), timeout=30)
        next(events)  # it listens
        pool = open_pool(client, name)
        pool.apply()
        assert any(answer.event.pool.name == name for answer in events)
        collector.of_pool("Apply", name)
        assert not collector.named("odma.v1.PoolService/Watch")
        events.cancel()
    wait_for(lambda: collector.named("odma.v1.PoolService/Watch"), "the span of Watch")
    assert not [span for span in collector.spans if "health" in span.name.lower()]


def test_the_wait_for_a_pool_is_a_part(tmp_path):
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from odma_service.service.watch.tracing import OtelSpans

    kept, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(kept))
    spans, lock = OtelSpans(provider), threading.Lock()
    spans.take(lock)
    assert lock.locked()
    assert not kept.get_finished_spans()
    entered = threading.Event()

    def enter() -> None:
        spans.take(lock)
        entered.set()

    waiter = threading.Thread(target=enter)
    waiter.start()
    assert not entered.wait(0.05)
    lock.release()
    waiter.join()
    assert entered.is_set()
    assert [span.name for span in kept.get_finished_spans()] == ["wait for pool"]


# --- when there is no collector, or a bad one ---


def test_the_last_spans_are_sent_when_the_server_drains(servers, collector, name):
    server = servers(
        "--traces", environment=environment(collector.port, OTEL_BSP_SCHEDULE_DELAY="60000")
    )
    with Client(server.target) as client:
        open_pool(client, name).apply(ops=[Allocate("a", 64)])
    assert server.terminate() == 0
    assert collector.of_pool("Apply", name)


def test_a_collector_that_hangs_holds_up_nobody(servers, collector, name):
    collector.stuck.clear()
    server = servers("--traces", "--drain-seconds", "0.1", environment=environment(collector.port))
    with Client(server.target) as client:
        pool = open_pool(client, name)
        pool.apply()
        assert collector.asked.wait(30)
        for _ in range(3000):  # more than the SDK keeps
            pool.apply()
        assert pool.seq == 3001
    assert server.terminate() == 0


def test_a_collector_that_is_not_there_is_a_line_in_the_log(servers, name):
    server = servers(
        "--traces",
        "--log-format",
        "json",
        environment=environment(1, OTEL_EXPORTER_OTLP_TIMEOUT="1"),
    )
    with Client(server.target) as client:
        pool = open_pool(client, name)
        answer = pool.apply(ops=[Allocate("a", 64)])
        pool.apply(ops=[Free(answer.results[0].handle, End.FINISHED, 10)])
        wait_for(lambda: '"traces"' in server.log.read_text(), "a line about the collector")
    assert server.terminate() == 0
    for line in server.log.read_text().splitlines():
        assert json.loads(line)["event"]


@pytest.mark.parametrize(
    "variable", ["OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"]
)
def test_another_protocol_is_refused(tmp_path, variable):
    command = [sys.executable, "-m", "odma_service", "serve", "--traces", "--listen", "127.0.0.1:0"]
    done = subprocess.run(
        [*command, "--pool-dir", str(tmp_path / "pools")],
        env={variable: "http/protobuf", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert variable in done.stderr


def test_without_the_extra_it_says_what_to_install(tmp_path):
    code = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "from odma_service.__main__ import main\n"
        f"sys.argv = ['odma', 'serve', '--traces', '--pool-dir', {str(tmp_path / 'pools')!r}]\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "odma-service[otel]" in done.stderr


def test_off_nothing_of_it_is_imported():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import odma_service.service.server"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "odma_service.service.watch.spans" in done.stderr
    assert "opentelemetry" not in done.stderr
