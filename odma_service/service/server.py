"""The server: builds every object, and hands it to those that need it."""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import wait
from contextlib import closing, contextmanager, suppress
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import grpc
import structlog
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server
from grpc_reflection.v1alpha import reflection

from odma_service._native import own_faults
from odma_service.errors import InvalidError, OdmaError
from odma_service.learning.predictor import default_model
from odma_service.rpc.v1 import (
    emulator_service_pb2,
    memory_service_pb2,
    pool_service_pb2,
    predictor_service_pb2,
)
from odma_service.rpc.v1.emulator_service_pb2_grpc import add_EmulatorServiceServicer_to_server
from odma_service.rpc.v1.memory_service_pb2_grpc import add_MemoryServiceServicer_to_server
from odma_service.rpc.v1.pool_service_pb2_grpc import add_PoolServiceServicer_to_server
from odma_service.rpc.v1.predictor_service_pb2_grpc import add_PredictorServiceServicer_to_server
from odma_service.service.config import UNIX, Settings
from odma_service.service.door.access import Access
from odma_service.service.door.calls import sweeping
from odma_service.service.door.guard import GUARD_OPTIONS, Guard, Pools
from odma_service.service.door.health import Health
from odma_service.service.door.private import insist_trusted
from odma_service.service.door.tls import certificates_of, credentials_of
from odma_service.service.door.watched import Watched
from odma_service.service.manager import tell_manager
from odma_service.service.pools.directory import DirectoryTakenError, PoolDirectory
from odma_service.service.pools.models import Models
from odma_service.service.pools.reaper import reaping
from odma_service.service.pools.registry import Registry, draining
from odma_service.service.rpc.emulator import EmulatorService
from odma_service.service.rpc.memory import MemoryService
from odma_service.service.rpc.pools import PoolService
from odma_service.service.rpc.predictor import PredictorService
from odma_service.service.watch.decisions import DecisionLog
from odma_service.service.watch.lines import Lines, standard_error
from odma_service.service.watch.metrics import (
    SILENT,
    FileCollector,
    RpcMetrics,
    metrics_of,
    serving_metrics,
)
from odma_service.service.watch.telemetry import Telemetry

if TYPE_CHECKING:
    from odma_service.service.watch.tracing import OtelSpans

SPARE_STREAMS = 16
"""Streams beyond one for each pool: some have no batch yet, some have a dead client."""

OPTIONS = (
    *GUARD_OPTIONS,
    ("grpc.so_reuseport", 0),  # a second server on the same port must fail
    # A stopped or vanished client does not answer pings: its calls end after 20 + 10 seconds.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # of clients
)
SPARE_PLACES = 1024
"""Places beyond four times max-calls (calls, readers, streams, watchers): those of strangers."""

STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}
NOTED_SIGNALS = {signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
"""They ask for nothing that is not done by itself: changed files are read when they change."""
LOOK_SECONDS = 0.2
"""Between two attempts to take the pool directory, and two looks for passed-on signals."""
PR_SET_DUMPABLE = 4  # linux/prctl.h
NOTICE_SECONDS = 0.2
"""Callers get UNAVAILABLE for at least so long; then answers have so long to arrive."""

SWITCH_SECONDS = 0.0005
"""A thread that computes lets others in so often: an Apply changes threads twice."""

STDOUT = 1
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

SERVED = (
    (memory_service_pb2, "MemoryService"),
    (pool_service_pb2, "PoolService"),
    (emulator_service_pb2, "EmulatorService"),
    (predictor_service_pb2, "PredictorService"),
)

log = structlog.get_logger()


def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then drain. Raises OdmaError if it cannot start."""
    sys.setswitchinterval(SWITCH_SECONDS)
    # Until waited for, in all threads but those that libraries made when they were imported.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS | NOTED_SIGNALS)
    for number in STOP_SIGNALS | NOTED_SIGNALS:
        signal.signal(number, _pass_on)
    with standard_error() as lines:
        _configure_log(settings)
        _forbid_core_dumps()
        own_faults()
        _run(settings, lines)
        log.info("stopped")


def _run(settings: Settings, lines: Lines) -> None:
    path = _own_directory(settings.pool_dir)
    try:
        directory = PoolDirectory.take(path)
    except DirectoryTakenError as taken:
        if not settings.wait_for_pool_dir:
            raise
        log.warning("the service waits for the pool directory", reason=str(taken))
        waited = _wait_for(path)
        if waited is None:
            return
        directory = waited
    models = Models(
        _model_directory(settings.predictor_model), non_commercial=settings.non_commercial_model
    )
    spans = _otel_spans(settings)
    telemetry = Telemetry(
        decisions=_decision_log(settings, models), spans=spans, log_lines=lines, models=models
    )
    registry = Registry(
        directory.path,
        most_bytes=settings.max_pool_bytes,
        last_epoch=directory.last_epoch,
        keep_epoch=directory.keep_epoch,
        max_pools=settings.max_pools,
        max_owner_pools=settings.max_owner_pools,
        boot_id=BOOT_ID.read_text().strip(),
        monotonic=time.monotonic,
        wall=time.time,
        model=models.now,
        telemetry=telemetry,
    )
    models.start()
    registry.attach_all()
    try:
        with reaping(registry):
            _serve(settings, registry, spans)
    finally:
        models.stop()
        registry.close(0)
        telemetry.close()
        directory.close()


def _serve(settings: Settings, registry: Registry, spans: OtelSpans | None) -> None:
    threads = Pools.of(settings.workers)
    identities = Access(settings.token_file) if settings.token_file else None
    certificates = certificates_of(settings, identities)
    files = {"tokens": identities and identities.file, "tls": certificates}
    watched = Watched({name: file for name, file in files.items() if file}, certificates)
    metrics = metrics_of(registry)
    metrics.register(FileCollector(watched))
    most_streams = ("grpc.max_concurrent_streams", max(settings.workers // 2, 16))
    rpc_metrics = RpcMetrics(metrics)
    refused = rpc_metrics.refused
    server = grpc.server(
        threads.calls,
        options=(*OPTIONS, most_streams),
        interceptors=[
            *([spans.observer()] if spans else []),
            rpc_metrics,
            Guard(
                identities,
                threads,
                settings.max_calls,
                lambda reason: refused.labels(reason).inc(),
            ),
        ],
        maximum_concurrent_rpcs=4 * settings.max_calls + SPARE_PLACES,
    )
    memory = MemoryService(registry, settings.max_pools + SPARE_STREAMS)
    pools = PoolService(registry)
    add_MemoryServiceServicer_to_server(memory, server)
    add_PoolServiceServicer_to_server(pools, server)
    add_PredictorServiceServicer_to_server(PredictorService(registry), server)
    add_EmulatorServiceServicer_to_server(EmulatorService(), server)
    health = Health(_names())
    add_HealthServicer_to_server(health, server)
    if settings.reflection:
        reflection.enable_server_reflection((*_names(), reflection.SERVICE_NAME), server)

    with (
        closing(threads),
        closing(pools.watchers),
        closing(memory.streams),
        _listening(server, settings.listen, credentials_of(certificates, settings)) as addresses,
        serving_metrics(settings.metrics_listen, metrics, health.serves) as metrics_address,
        watched.looking(),
        sweeping(
            threads.sweep,
            memory.streams.sweep,
            pools.watchers.sweep,
            cut=refused.labels(SILENT).inc,
        ),
    ):
        server.start()
        log.info(
            "serving",
            addresses=addresses,
            metrics=metrics_address,
            pool_dir=str(settings.pool_dir),
        )
        _print(f"odma ready on {', '.join(addresses)}")
        tell_manager("READY=1")
        _wait_for_stop()
        tell_manager("STOPPING=1")
        log.info("draining", seconds=settings.drain_seconds)
        health.drain()
        notice_seconds = min(NOTICE_SECONDS, settings.drain_seconds)
        deadline = time.monotonic() + settings.drain_seconds
        registry.close(settings.drain_seconds - notice_seconds)
        memory.streams.end_all(draining())
        registry.telemetry.events.end()
        time.sleep(notice_seconds)
        # From stop() on nothing is answered, not even a health check.
        under_way = threads.calls.under_way() | threads.reading.under_way()
        wait(under_way, max(deadline - time.monotonic(), 0))
        server.stop(notice_seconds).wait()


def _names() -> list[str]:
    return [module.DESCRIPTOR.services_by_name[name].full_name for module, name in SERVED]


def _wait_for_stop() -> None:
    """Return at the first stop signal. A second one ends the process at once.

    The wait ends now and then, so that _pass_on can run: Python calls it in this thread alone.
    """
    awaited = STOP_SIGNALS | NOTED_SIGNALS
    while True:
        heard = signal.sigtimedwait(awaited, LOOK_SECONDS)
        if heard is None:
            continue
        if heard.si_signo in STOP_SIGNALS:
            break
        log.info(
            "signal: changed tokens, certificates and models are read by themselves; the service "
            "goes on",
            signal=signal.Signals(heard.si_signo).name,
        )
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _pass_on(number: int, _frame: FrameType | None) -> None:
    """Leave a signal that another thread was given to the main thread, which waits for it."""
    signal.pthread_kill(threading.main_thread().ident or 0, number)


def _wait_for(path: Path) -> PoolDirectory | None:
    """Return the pool directory once no server has it, None at a stop signal."""
    while signal.sigtimedwait(STOP_SIGNALS, LOOK_SECONDS) is None:
        with suppress(DirectoryTakenError):
            return PoolDirectory.take(path)
    return None


def _print(line: str) -> None:
    """Print a line on stdout, if that can be written to."""
    try:
        os.write(STDOUT, f"{line}\n".encode())
    except OSError as error:
        log.warning("stdout cannot be written to", reason=error.strerror)


@contextmanager
def _listening(
    server: grpc.Server, addresses: Sequence[str], credentials: grpc.ServerCredentials | None
) -> Iterator[list[str]]:
    """Bind the server to addresses; yield them with the ports really taken."""
    sockets = [Path(address.removeprefix(UNIX)) for address in addresses if _is_unix(address)]
    for path in sockets:
        _remove_stale(path)
    old_mask = os.umask(0o177)
    try:
        bound = [_bind(server, address, credentials) for address in addresses]
    finally:
        os.umask(old_mask)
    try:
        yield bound
    finally:
        for path in sockets:
            path.unlink(missing_ok=True)


def _decision_log(settings: Settings, models: Models) -> DecisionLog | None:
    if settings.decision_log is None:
        if settings.decision_log_sketches:
            raise InvalidError("decision-log-sketches", "there is no decision-log to put them in")
        return None
    bytes_ = settings.decision_log_bytes
    if settings.decision_log_sketches:
        return DecisionLog(settings.decision_log, bytes_, sketcher=models.now)
    return DecisionLog(settings.decision_log, bytes_)


def _otel_spans(settings: Settings) -> OtelSpans | None:
    """Return the spans of traces, if they are wanted. Only then OpenTelemetry is imported."""
    if not settings.traces:
        return None
    spans: OtelSpans = import_module("odma_service.service.watch.tracing").otel_spans()
    return spans


def _bind(server: grpc.Server, address: str, credentials: grpc.ServerCredentials | None) -> str:
    if not _is_unix(address):
        _try_bind(address)
    try:
        if credentials is None or _is_unix(address):
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise OdmaError(f"cannot listen on {address}: {error}") from None
    return address if _is_unix(address) else f"{address.rpartition(':')[0]}:{port}"


def _try_bind(address: str) -> None:
    """Raise OdmaError with the system's reason if binding fails: gRPC does not give it."""
    host, _, port = address.rpartition(":")
    reason: OSError | None = None
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        for family, kind, protocol, _, place in found:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(place)
                except OSError as error:
                    reason = error
                else:
                    return
    except socket.gaierror as error:
        reason = error
    raise OdmaError(f"cannot listen on {address}: {reason.strerror if reason else 'no address'}")


def _is_unix(address: str) -> bool:
    return address.startswith(UNIX)


def _remove_stale(path: Path) -> None:
    """Remove the socket file of a server that is gone."""
    if not os.path.lexists(path):
        return
    if not stat.S_ISSOCK(path.lstat().st_mode):
        raise OdmaError(f"cannot listen on {path}: it is there already, and no socket")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise OdmaError(f"cannot listen on {path}: another server does")


def _model_directory(setting: str) -> Path | None:
    if setting == "none":
        return None
    if setting == "shipped":
        return default_model()
    directory = Path(setting).expanduser()
    for path in (directory, *directory.glob("*")):
        if path.exists():  # else the model says what it misses
            insist_trusted(path)
    return directory


def _forbid_core_dumps() -> None:
    """Keep this process's memory, in which prompts pass, out of core files and other processes."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0)


def _own_directory(path: Path) -> Path:
    """Return the directory of the pools, closed to other users; make it if it is missing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.stat()
    except OSError as error:
        raise OdmaError(f"cannot use the pool directory {path}: {error.strerror}") from None
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise OdmaError(
            f"the pool directory {path} must belong to this user and be writable for nobody else"
        )
    return path


def _configure_log(settings: Settings) -> None:
    """Write log lines to stderr, for people or for machines."""
    shared: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    form: list[structlog.typing.Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if settings.log_format == "json"
        # The usual traceback shows local variables: prompts.
        else [
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
            )
        ]
    )
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    structlog.configure(
        processors=[*shared, *form],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    # What gRPC and others log, too.
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, force=True)
