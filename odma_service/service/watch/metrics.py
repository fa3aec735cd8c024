"""Metrics for Prometheus: read from the pools at each scrape, and served over HTTP.

A scrape is a reader: no call of an owner waits for it. The number of series is bounded: max-pools
bounds the pools, a pool has up to 64 classes, a policy up to 16 buckets and 16 tenants. No other
label has a value that a client may choose.

docs/reference/observability.md lists the metrics; a test compares it with a real scrape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

import grpc
import structlog
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    make_wsgi_app,
    start_http_server,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from odma_service._native import ArenaReport, Completion, TenantUse
from odma_service.errors import OdmaError, PoolNotFoundError, UnavailableError
from odma_service.pool import ClassHistory, PoolSpec
from odma_service.pool.policy import PolicyRecord
from odma_service.service.door.handlers import CallShape
from odma_service.service.door.health import ALIVE
from odma_service.service.door.watched import Watched
from odma_service.service.pools.models import FAILURES
from odma_service.service.pools.registry import Registry
from odma_service.service.watch.observed import CallObserver, CallWatch
from odma_service.service.watch.telemetry import OP_NAMES, RefusalCounts
from odma_service.values import QUANTILE_LEVELS, Allocate, Extend, Free, Reason, Trim

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

BUCKETS_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 1.0, 10.0)
SILENT = "SILENT"
REFUSALS = ("BUSY", "CALLER_LIMIT", "IDENTITY", "MESSAGE_SIZE", "ROLE", "STREAM_LIMIT", SILENT)
"""Reasons that have a series from the start."""
SLOWEST_CLIENT_SECONDS = 10.0
METRICS_PATHS = ("/metrics", "/")
HEALTH_PATHS = {"/healthz": ALIVE, "/readyz": ""}
"""The names of the health service behind them."""
SHOWN_LEVELS = (0.5, 0.9, 0.99)

log = structlog.get_logger()


class Reading(NamedTuple):
    """The numbers that a scrape copies out of one pool."""

    spec: PoolSpec
    policy: PolicyRecord
    report: ArenaReport
    idle_seconds: float
    bucket_regions: list[int]
    completions: list[Completion]
    classes: list[ClassHistory]
    tenants: list[TenantUse]
    refusals: RefusalCounts


Value = Callable[[Reading], float]
Labelled = Callable[[Reading], Iterable[tuple[tuple[str, ...], float]]]

GAUGES: tuple[tuple[str, str, Value], ...] = (
    ("capacity_tokens", "Capacity.", lambda r: r.spec.capacity_tokens),
    (
        "bytes_per_token",
        "Bytes of a token, all planes of one rank.",
        lambda r: r.spec.geometry.bytes_per_token,
    ),
    ("written_tokens", "Written, as the engine last said.", lambda r: r.report.used_tokens),
    ("reserved_tokens", "Reserved by live regions.", lambda r: r.report.reserved_tokens),
    (
        "awaiting_completion_tokens",
        "Given back, but an engine with several streams may still use them.",
        lambda r: r.report.awaiting_completion_tokens,
    ),
    ("free_tokens", "Neither reserved nor awaiting completion.", lambda r: r.report.free_tokens),
    ("largest_free_run_tokens", "Longest free run.", lambda r: r.report.largest_run_tokens),
    ("free_runs", "Free runs.", lambda r: r.report.free_runs),
    ("safety_tokens", "What admission must leave free.", lambda r: r.report.safety_tokens),
    (
        "safety_share_ratio",
        "Share of the capacity that the policy keeps back.",
        lambda r: r.policy.safety_share,
    ),
    (
        "kept_tokens",
        "Free, but kept for requests that begin alike.",
        lambda r: r.report.reuse.kept_tokens,
    ),
    ("kept_runs", "Runs that are kept.", lambda r: r.report.reuse.kept_runs),
    ("regions", "Live regions.", lambda r: r.report.live),
    ("regions_limit", "Most regions that may live.", lambda r: r.spec.max_regions),
    ("open", "1 while an epoch runs.", lambda r: r.report.epoch > 0),
    (
        "stale",
        "1 while the owner of a running epoch is silent for longer than its time to live.",
        lambda r: r.report.epoch > 0 and r.idle_seconds > r.spec.ttl_seconds,
    ),
    ("idle_seconds", "Since the owner's last call.", lambda r: r.idle_seconds),
    ("policy_version", "Changes of the policy, from 1.", lambda r: r.policy.version),
)

COUNTERS: tuple[tuple[str, str, Value], ...] = (
    ("batches", "Batches answered.", lambda r: r.report.counters.batches),
    ("allocates", "Regions allocated.", lambda r: r.report.counters.allocates),
    ("extends", "Extends done.", lambda r: r.report.counters.extends),
    ("trims", "Trims done.", lambda r: r.report.counters.trims),
    ("frees", "Regions freed.", lambda r: r.report.counters.frees),
    ("preemptions", "Regions freed as preempted.", lambda r: r.report.counters.preempted),
    ("copies", "Copies that engines were told to make.", lambda r: r.report.counters.copies),
    ("copied_tokens", "Tokens in those copies.", lambda r: r.report.counters.copied_tokens),
    (
        "prompt_tokens",
        "Tokens that requests had when they were let in.",
        lambda r: r.report.reuse.prompt_tokens,
    ),
    (
        "given_up_tokens",
        "Kept tokens that were given up for room.",
        lambda r: r.report.reuse.given_up_tokens,
    ),
    ("relocations", "Extends that moved to another hole.", lambda r: r.report.counters.relocations),
    ("compactions", "Operations that moved others.", lambda r: r.report.counters.compactions),
    (
        "preemption_advice",
        "Refusals that named whom to preempt, since the service started.",
        lambda r: r.refusals.advised,
    ),
)

LABELLED_GAUGES: tuple[tuple[str, str, tuple[str, ...], Labelled], ...] = (
    ("policy_info", "Always 1.", ("policy",), lambda r: [((r.policy.name,), 1)]),
    (
        "bucket_limit_tokens",
        "Limit of each bucket; 1 is the smallest.",
        ("bucket",),
        lambda r: _numbered(r.policy.limits_tokens),
    ),
    (
        "bucket_regions",
        "Live regions in each bucket.",
        ("bucket",),
        lambda r: _numbered(r.bucket_regions),
    ),
    (
        "prediction_coverage_ratio",
        "Share of the last 256 completions that were within the predicted quantile.",
        ("level",),
        lambda r: coverage(r.completions),
    ),
    (
        "class_output_tokens",
        "Quantiles of the answers seen, where 32 or more are known.",
        ("request_class", "level"),
        lambda r: _class_quantiles(r.classes),
    ),
    (
        "tenant_held_tokens",
        "Reserved by the regions of a tenant that the policy names.",
        ("tenant",),
        lambda r: _by_tenant(r, lambda use: use.held_tokens),
    ),
    (
        "tenant_guaranteed_tokens",
        "What it is sure of.",
        ("tenant",),
        lambda r: _by_tenant(r, lambda use: use.guaranteed_tokens),
    ),
    (
        "tenant_maximum_tokens",
        "Up to what its requests are admitted.",
        ("tenant",),
        lambda r: _by_tenant(r, lambda use: use.maximum_tokens),
    ),
    (
        "tenant_borrowed_tokens",
        "What it holds beyond its guarantee.",
        ("tenant",),
        lambda r: _by_tenant(r, lambda use: use.borrowed_tokens),
    ),
    (
        "tenant_claimed_tokens",
        "What it waits for though its guarantee covers it; 0: no claim stands.",
        ("tenant",),
        lambda r: _by_tenant(r, lambda use: use.claimed_tokens),
    ),
)

LABELLED_COUNTERS: tuple[tuple[str, str, tuple[str, ...], Labelled], ...] = (
    (
        "refusals",
        "Operations refused, since the service started.",
        ("operation", "reason"),
        lambda r: (
            ((op, reason.name), r.refusals.by_reason[op, reason]) for op, reason in REFUSABLE
        ),
    ),
    (
        "safety_hits",
        "Operations that went into the safety pool.",
        ("cause",),
        lambda r: [
            (("growth",), r.report.counters.safety_hits_growth),
            (("unsure",), r.report.counters.safety_hits_unsure),
        ],
    ),
    (
        "reused_tokens",
        "Of the tokens that requests had when they were let in, those that need no prefill.",
        ("how",),
        lambda r: [
            (("adopted",), r.report.reuse.adopted_tokens),
            (("gathered",), r.report.reuse.gathered_tokens),
            (("shared",), r.report.reuse.shared_tokens),
        ],
    ),
    (
        "completions",
        "Requests completed.",
        ("end",),
        lambda r: [
            (("finished",), r.report.counters.finished),
            (("hit_limit",), r.report.counters.hit_limit),
        ],
    ),
    (
        "class_completions",
        "Requests completed.",
        ("request_class",),
        lambda r: [((c.request_class,), c.histogram.completions) for c in r.classes],
    ),
)

BY_HANDLE = (Reason.NOT_FOUND, Reason.INVALID)
REFUSABLE: list[tuple[str, Reason]] = [
    (OP_NAMES[op], reason)
    for op, reasons in ((Allocate, Reason), (Extend, Reason), (Trim, BY_HANDLE), (Free, BY_HANDLE))
    for reason in reasons
]
"""Every possible refusal has a series from the start: so its first increase shows."""


def _numbered(values: Iterable[float]) -> Iterator[tuple[tuple[str, ...], float]]:
    return (((str(i),), value) for i, value in enumerate(values, 1))


def _by_tenant(
    reading: Reading, value: Callable[[TenantUse], float]
) -> Iterator[tuple[tuple[str, ...], float]]:
    return (((use.name,), value(use)) for use in reading.tenants)


def _class_quantiles(
    classes: Iterable[ClassHistory],
) -> Iterator[tuple[tuple[str, ...], float]]:
    for known in classes:
        quantiles = dict(zip(QUANTILE_LEVELS, known.output_quantiles or (), strict=False))
        for level in set(SHOWN_LEVELS) & set(quantiles):
            yield (known.request_class, str(level)), quantiles[level]


def coverage(completions: Iterable[Completion]) -> Iterator[tuple[tuple[str, ...], float]]:
    """Yield for each level the share of predicted completions that were at most its quantile.

    A completion that stopped at its limit within the quantile is left out: its full length is not
    known. Beyond the quantile it is a miss like any other.
    """
    for i, level in enumerate(QUANTILE_LEVELS):
        told = [
            done.output_tokens <= done.quantiles[i]
            for done in completions
            if done.quantiles and not (done.censored and done.output_tokens <= done.quantiles[i])
        ]
        if told:
            yield (str(level),), sum(told) / len(told)


class PoolCollector(Collector):
    """All pools of a registry, read when asked."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._telemetry = registry.telemetry

    def collect(self) -> Iterator[Metric]:
        """Yield every family; the families of pools are empty while the service drains."""
        readings = list(self._readings())
        for metric in (GaugeMetricFamily, CounterMetricFamily):
            gauges = metric is GaugeMetricFamily
            for name, text, value in GAUGES if gauges else COUNTERS:
                family = metric(f"odma_pool_{name}", text, labels=["pool"])
                for reading in readings:
                    family.add_metric([reading.spec.name], value(reading))
                yield family
            for name, text, labels, values in LABELLED_GAUGES if gauges else LABELLED_COUNTERS:
                family = metric(f"odma_pool_{name}", text, labels=["pool", *labels])
                for reading in readings:
                    for label_values, number in values(reading):
                        family.add_metric([reading.spec.name, *label_values], number)
                yield family
        yield from self._of_the_service()

    def _readings(self) -> Iterator[Reading]:
        try:
            names = self._registry.names()
        except UnavailableError:
            return
        for name in names:
            with suppress(PoolNotFoundError, UnavailableError):  # gone since
                yield self._read(name)

    def _read(self, name: str) -> Reading:
        with self._registry.viewed(name) as view:
            pool, policy = view.pool, view.pool.policy()
            return Reading(
                pool.spec,
                policy,
                pool.report(),
                view.idle_seconds,
                pool.bucket_regions(policy.limits_tokens),
                pool.completions(),
                pool.classes(),
                pool.tenants(),
                self._telemetry.refusals(name),
            )

    def _of_the_service(self) -> Iterator[Metric]:
        events = CounterMetricFamily("odma_events", "Events of pools.", labels=["kind"])
        for kind, count in self._telemetry.events.counts().items():
            events.add_metric([kind.name.lower()], count)
        yield events
        lines, models = self._telemetry.log_lines, self._telemetry.models
        yield CounterMetricFamily(
            "odma_log_lines_lost",
            "Lines that the log did not take.",
            value=lines.lost if lines else 0,
        )
        failures = dict(models.failures()) if models else {}
        failed = CounterMetricFamily(
            "odma_model_failures",
            "Times that the model was of no use; histograms took its place.",
            labels=["kind"],
        )
        for failure in FAILURES:
            failed.add_metric([failure], failures.get(failure, 0))
        yield failed
        decisions = self._telemetry.decisions
        if decisions is not None:
            for name, text, count in (
                ("written", "Records in the decision log.", decisions.written),
                ("dropped", "Calls left out, for the log was behind.", decisions.dropped),
                ("failed", "Records that the file did not take.", decisions.failed),
            ):
                yield CounterMetricFamily(f"odma_decisions_{name}", text, value=count)


class RpcMetrics(CallObserver):
    """Counts calls and times answers.

    In a stream of requests each answer is timed from the request before it. A stream of answers
    to one request is not timed.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__()
        self.seconds = Histogram(
            "odma_rpc_duration_seconds",
            "Time that handlers took to answer.",
            ["rpc"],
            buckets=BUCKETS_SECONDS,
            registry=registry,
        )
        self.calls = Counter(
            "odma_rpc_calls", "Calls that ended.", ["rpc", "code"], registry=registry
        )
        self.refused = Counter(
            "odma_refused_calls",
            "Calls refused before they were begun, or cut for their message did not come.",
            ["reason"],
            registry=registry,
        )
        for reason in REFUSALS:
            self.refused.labels(reason)
        self.running = Gauge(
            "odma_rpc_running", "Calls that run, streams included.", ["rpc"], registry=registry
        )
        self._series: dict[str, _Series] = {}

    def watch(self, rpc: str, shape: CallShape, context: grpc.ServicerContext) -> CallWatch:
        series = self._series.get(rpc)
        if series is None:
            seconds, running = self.seconds.labels(rpc), self.running.labels(rpc)
            series = self._series[rpc] = _Series(seconds, running, {})
        return _StopWatch(self.calls, series, rpc, shape)


class _Series(NamedTuple):
    """What is counted of one rpc. Labels are looked up once: that takes as long as counting."""

    seconds: Histogram
    running: Gauge
    calls: dict[grpc.StatusCode, Counter]


class _StopWatch:
    """Counts and times one call."""

    def __init__(self, calls: Counter, series: _Series, rpc: str, shape: CallShape) -> None:
        self._calls = calls
        self._series = series
        self._rpc = rpc
        self._shape = shape
        series.running.inc()
        self._begun = perf_counter()

    def asked(self, request: object) -> None:
        self._begun = perf_counter()

    def answered(self) -> None:
        if self._shape is CallShape.BOTH_STREAMS or self._shape is CallShape.BOTH_BY_CALLBACK:
            self._series.seconds.observe(perf_counter() - self._begun)

    def ended(self, code: grpc.StatusCode) -> None:
        _, running, calls = self._series
        if self._shape is CallShape.UNARY:
            self._series.seconds.observe(perf_counter() - self._begun)
        running.dec()
        counter = calls.get(code)
        if counter is None:
            counter = calls[code] = self._calls.labels(self._rpc, code.name)
        counter.inc()


class FileCollector(Collector):
    """The files that are read again when they change, as last looked at."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched

    def collect(self) -> Iterator[Metric]:
        failing = GaugeMetricFamily(
            "odma_files_refused",
            "1 while changed files cannot be used and the old ones stay.",
            labels=["files"],
        )
        for name, file in self._watched.files.items():
            failing.add_metric([name], file.failing)
        yield failing
        if self._watched.certificates is not None:
            yield GaugeMetricFamily(
                "odma_tls_certificate_not_after_seconds",
                "When the first certificate of the chain ends, since 1970.",
                value=self._watched.certificates.get().not_after_unix_seconds,
            )


@contextmanager
def serving_metrics(
    address: str, registry: CollectorRegistry, serves: Callable[[str], bool] = lambda _: True
) -> Iterator[str]:
    """Serve a registry over HTTP at host:port; yield the address with the port really taken.

    /healthz and /readyz say 200 or 503, as `serves` does of ALIVE and of all services. Without
    an address nothing listens. Raises OdmaError if the address cannot be bound.
    """
    if not address:
        yield ""
        return
    host, _, port = address.rpartition(":")
    try:
        server, _ = start_http_server(int(port), host.strip("[]"), registry)
    except OSError as error:
        raise OdmaError(f"cannot serve metrics on {address}: {error.strerror}") from None
    server.set_app(_with_health(make_wsgi_app(registry), serves))
    server.RequestHandlerClass.timeout = SLOWEST_CLIENT_SECONDS  # type: ignore[attr-defined]
    server.handle_error = _broke_off  # type: ignore[method-assign]  # it would print a traceback
    try:
        yield f"{host}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _with_health(metrics: WSGIApplication, serves: Callable[[str], bool]) -> WSGIApplication:
    """Return what answers a GET of the metrics, of the health, and of nothing else."""

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path in METRICS_PATHS:
            return metrics(environ, start_response)
        status, text = "404 Not Found", f"known are {', '.join((*METRICS_PATHS, *HEALTH_PATHS))}"
        if path in HEALTH_PATHS:
            well = serves(HEALTH_PATHS[path])
            status = "200 OK" if well else "503 Service Unavailable"
            text = "serving" if well else "not serving"
        start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [f"{text}\n".encode()]

    return answer


def _broke_off(request: object, client_address: object) -> None:
    log.debug("a scrape broke off", client=str(client_address))


def metrics_of(pools: Registry) -> CollectorRegistry:
    """Return all metrics of a service but those of its calls: see RpcMetrics."""
    disable_created_metrics()  # type: ignore[no-untyped-call]  # a series for each series, of no use to Prometheus 2
    registry = CollectorRegistry()
    registry.register(PoolCollector(pools))
    ProcessCollector(registry=registry)
    Gauge("odma_build_info", "Always 1.", ["version"], registry=registry).labels(
        version("odma-service")
    ).set(1)
    return registry
