"""What Prometheus is told: every figure where it should be, and nobody waits for a scrape."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import urllib.error
import urllib.request
from array import array
from ipaddress import ip_address
from pathlib import Path

import grpc
import pytest
from paths import DOCS, ROOT
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from running import fail_to_serve
from servers import Server, metrics_address, open_pool, wait_for

from odma_service.client import Client, chained_keys
from odma_service.errors import InvalidError, RefusedError
from odma_service.service import config
from odma_service.service.door.health import Health
from odma_service.service.watch import metrics
from odma_service.values import Allocate, End, Extend, Free, PolicyChange, TenantShare, Used

PAGE = DOCS / "reference" / "observability.md"
QUANTILES = 7
OF_FILES = {"odma_files_refused", "odma_tls_certificate_not_after_seconds"}
"""Without tokens and TLS there are none of these: see test_tls."""


@pytest.fixture(scope="module")
def scraped(tmp_path_factory):
    """Return a server that is scraped, and that writes a decision log."""
    directory = tmp_path_factory.mktemp("scraped")
    flags = ("--metrics-listen", "127.0.0.1:0", "--log-format", "json")
    flags += ("--decision-log", str(directory / "decisions.jsonl"))
    running = Server(directory, flags).start()
    yield running
    running.kill()


@pytest.fixture(scope="module")
def service(scraped):
    with Client(scraped.target) as client:
        yield client


def scrape(server) -> list:
    """Return the samples of a scrape."""
    with urllib.request.urlopen(f"http://{metrics_address(server)}/metrics", timeout=10) as page:
        families = text_string_to_metric_families(page.read().decode())
        return [sample for family in families for sample in family.samples]


def value(samples: list, name: str, **labels: str) -> float:
    """Return the value of the one sample that has the name and the labels."""
    [found] = [s.value for s in samples if s.name == name and labels.items() <= s.labels.items()]
    return found


def listening(pid: int) -> set[tuple[str, int]]:
    """Return the IPv4 and IPv6 addresses that a process listens on, as the kernel has them."""
    links = {str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink()}
    found = set()
    for table in ("tcp", "tcp6"):  # addresses are words of the machine's order
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            columns = line.split()
            address, _, port = columns[1].rpartition(":")
            if columns[3] == "0A" and f"socket:[{columns[9]}]" in links:
                words = array("I", bytes.fromhex(address))
                words.byteswap()
                ip = ip_address(words.tobytes())
                found.add((str(getattr(ip, "ipv4_mapped", None) or ip), int(port, 16)))
    return found


# --- figures ---


def test_a_scrape_tells_what_the_books_say(scraped, service, name):
    pool = open_pool(service, name)
    answer = pool.apply(ops=[Allocate(f"r{i}", 100 * (i + 1)) for i in range(3)])
    handles = [place.handle for place in answer.results]
    pool.apply(used=[Used(handles[0], 70)], ops=[Free(handles[1], End.FINISHED, 10)])
    books, samples = service.get_pool(name), scrape(scraped)
    for metric, expected in (
        ("capacity_tokens", books.summary.capacity_tokens),
        ("reserved_tokens", books.reserved_tokens),
        ("written_tokens", books.used_tokens),
        ("free_tokens", books.summary.free_tokens),
        ("largest_free_run_tokens", books.largest_run_tokens),
        ("free_runs", books.free_runs),
        ("safety_tokens", books.safety_tokens),
        ("safety_share_ratio", books.policy.safety_share),
        ("regions", 2),
        ("regions_limit", books.max_regions),
        ("open", 1),
        ("stale", 0),
        ("policy_version", books.policy.version),
        ("batches_total", 2),
        ("allocates_total", 3),
        ("frees_total", 1),
        ("copies_total", books.counters.copies),
        ("copied_tokens_total", books.counters.copied_tokens),
    ):
        assert value(samples, f"odma_pool_{metric}", pool=name) == pytest.approx(expected), metric
    assert value(samples, "odma_pool_policy_info", pool=name, policy="elastic") == 1
    assert value(samples, "odma_pool_completions_total", pool=name, end="finished") == 1


def test_a_scrape_tells_what_is_kept_and_reused(scraped, service, name):
    policy = PolicyChange(step_tokens=16, safety_share=0)
    pool = open_pool(service, name, granule_tokens=64, capacity_tokens=512, policy=policy)
    keys = chained_keys(range(192), 64, b"")
    first = pool.allocate(Allocate("first", 200, keys=keys))
    pool.free(Free(first.handle, End.FINISHED, 1, keep_tokens=200))
    kept = scrape(scraped)
    again = pool.apply(ops=[Allocate("again", 200, keys=keys)]).results[0].handle
    used = [Used(again, 200, shareable_tokens=200)]
    pool.apply(used, [Allocate("more", 130, keys=keys[:32])])  # of 160
    pool.free(Free(again, End.FINISHED, 1, keep_tokens=128))
    pool.apply(ops=[Allocate("rest", 336)])
    samples = scrape(scraped)
    for metric, expected in (
        ("kept_runs", 0),
        ("kept_tokens", 0),
        ("prompt_tokens_total", 200 + 200 + 130 + 336),
        ("given_up_tokens_total", 128),
    ):
        assert value(samples, f"odma_pool_{metric}", pool=name) == expected, metric
    for how, expected in (("adopted", 192), ("gathered", 128), ("shared", 0)):
        assert value(samples, "odma_pool_reused_tokens_total", pool=name, how=how) == expected, how
    assert value(kept, "odma_pool_kept_runs", pool=name) == 1
    assert value(kept, "odma_pool_kept_tokens", pool=name) == 192
    reuse = service.get_pool(name).reuse
    assert (reuse.reused_tokens, reuse.given_up_tokens) == (320, 128)


def test_a_refusal_is_counted_once_by_operation_and_reason_though_it_is_told_again(
    scraped, service, name
):
    change = PolicyChange(name="elastic", safety_share=0, step_tokens=64)
    pool = open_pool(service, name, policy=change)
    first, _ = (pool.allocate(Allocate(f"r{i}", 2048 - 64)) for i in range(2))
    pool.apply(ops=[Extend(first.handle, first.length_tokens + 16), Allocate("r3", 16)])
    pool.seq -= 1
    again = pool.apply(ops=[Extend(first.handle, first.length_tokens + 16), Allocate("r3", 16)])
    assert again.replayed
    with pytest.raises(RefusedError):
        pool.allocate(Allocate("r4", 16))
    samples = scrape(scraped)

    def refusals(operation: str, reason: str) -> float:
        labels = {"operation": operation, "reason": reason}
        return value(samples, "odma_pool_refusals_total", pool=name, **labels)

    assert refusals("extend", "NO_SPACE") == 1
    assert refusals("allocate", "SKIPPED") == 1
    assert refusals("allocate", "NO_SPACE") == 1
    assert value(samples, "odma_pool_preemption_advice_total", pool=name) == 1


def test_buckets_have_numbers_for_names_and_as_many_regions_as_live_in_them(scraped, service, name):
    change = PolicyChange(name="odma", limits_tokens=[128, 512, 2048])
    pool = open_pool(service, name, policy=change)
    for i, most in enumerate((100, 120, 400, 2000)):
        pool.allocate(Allocate(f"r{i}", 16, max_total_tokens=most))
    samples = scrape(scraped)
    for bucket, limit, regions in (("1", 128, 2), ("2", 512, 1), ("3", 2048, 1)):
        labels = {"pool": name, "bucket": bucket}
        assert value(samples, "odma_pool_bucket_limit_tokens", **labels) == limit
        assert value(samples, "odma_pool_bucket_regions", **labels) == regions


def test_coverage_is_the_share_of_completions_within_what_was_predicted(scraped, service, name):
    change = PolicyChange(name="odma", limits_tokens=[4096])
    pool = open_pool(service, name, policy=change, max_regions=8)
    for i in range(10):
        place = pool.allocate(
            Allocate(f"r{i}", 16, max_total_tokens=400, predicted_output_tokens=100)
        )
        pool.free(Free(place.handle, End.FINISHED, 200 if i == 0 else 50))
    samples = scrape(scraped)
    levels = [s for s in samples if s.name == "odma_pool_prediction_coverage_ratio"]
    mine = {s.labels["level"]: s.value for s in levels if s.labels["pool"] == name}
    assert len(mine) == QUANTILES
    assert mine["0.5"] == pytest.approx(0.9)


def test_there_are_never_more_classes_than_the_books_tell_apart(scraped, service, name):
    pool = open_pool(service, name)
    for i in range(80):
        place = pool.allocate(Allocate(f"r{i}", 16, request_class=f'class "{i}"\n'))
        pool.free(Free(place.handle, End.FINISHED, 5))
    samples = scrape(scraped)
    classes = {
        s.labels["request_class"]: s.value
        for s in samples
        if s.name == "odma_pool_class_completions_total" and s.labels["pool"] == name
    }
    assert len(classes) <= 65
    assert sum(classes.values()) == 80
    assert 'class "1"\n' in classes


def test_calls_are_counted_by_rpc_and_code_and_timed(scraped, service, name):
    def calls(samples: list, rpc: str, code: str) -> float:
        labels = {"rpc": f"odma.v1.{rpc}", "code": code}
        return sum(
            s.value
            for s in samples
            if s.name == "odma_rpc_calls_total" and labels.items() <= s.labels.items()
        )

    before = scrape(scraped)
    pool = open_pool(service, name)
    pool.apply()
    with pytest.raises(InvalidError):
        open_pool(service, "." + name)
    after = scrape(scraped)
    for rpc, code in (
        ("MemoryService.OpenPool", "OK"),
        ("MemoryService.OpenPool", "INVALID_ARGUMENT"),
        ("MemoryService.Apply", "OK"),
    ):
        assert calls(after, rpc, code) == calls(before, rpc, code) + 1
    timed = "odma_rpc_duration_seconds_count"
    assert value(after, timed, rpc="odma.v1.MemoryService.OpenPool") >= 2
    assert value(after, "odma_rpc_running", rpc="odma.v1.MemoryService.Apply") == 0


def test_rpcs_that_nobody_serves_share_one_name(scraped):
    with grpc.insecure_channel(scraped.target) as channel:
        for path in ("/odma.v1.MemoryService/Nonsense", "/made.up/" + "x" * 100):
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(path)(b"")
            assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
    samples = scrape(scraped)
    labels = {"rpc": "(unknown)", "code": "UNIMPLEMENTED"}
    assert value(samples, "odma_rpc_calls_total", **labels) >= 2
    assert all("made.up" not in s.labels.get("rpc", "") for s in samples)


def test_a_pool_that_is_forgotten_leaves_no_series(servers):
    flags = ("--metrics-listen", "127.0.0.1:0", "--log-format", "json", "--max-pools", "1")
    server = servers(*flags)
    with Client(server.target) as service:
        open_pool(service, "old").close_pool()
        assert any(s.labels.get("pool") == "old" for s in scrape(server))
        open_pool(service, "new")
        assert {s.labels["pool"] for s in scrape(server) if "pool" in s.labels} == {"new"}


# --- where it listens ---


def test_metrics_listen_only_where_they_are_told_to():
    assert config.Settings.model_fields["metrics_listen"].default == ""


def test_nothing_listens_that_was_not_asked_for(scraped, servers):
    at = int(metrics_address(scraped).rpartition(":")[2])
    rpc = int(scraped.target.rpartition(":")[2])
    assert listening(scraped.process.pid) == {("127.0.0.1", at), ("127.0.0.1", rpc)}
    quiet = servers()
    assert len(listening(quiet.process.pid)) == 1


def test_metrics_may_listen_on_ipv6(servers):
    server = servers("--metrics-listen", "[::1]:0", "--log-format", "json")
    assert metrics_address(server).startswith("[::1]:")
    assert value(scrape(server), "odma_build_info") == 1


def test_a_metrics_port_that_is_taken_ends_the_server_in_one_line(scraped, tmp_path):
    address = ("--listen", "127.0.0.1:0", "--pool-dir", tmp_path / "p")
    told = fail_to_serve(*address, "--metrics-listen", metrics_address(scraped))
    assert "cannot serve metrics on" in told.splitlines()[-1]
    assert "Address already in use" in told.splitlines()[-1]


def test_a_client_that_says_nothing_holds_up_no_scrape(scraped):
    host, _, port = metrics_address(scraped).rpartition(":")
    with socket.create_connection((host, int(port))):
        assert value(scrape(scraped), "odma_build_info") == 1


def test_a_client_that_says_nothing_is_let_go_and_leaves_no_traceback(monkeypatch, capsys):
    monkeypatch.setattr(metrics, "SLOWEST_CLIENT_SECONDS", 0.1)
    with metrics.serving_metrics("127.0.0.1:0", CollectorRegistry()) as address:
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=30) as client:
            assert client.recv(1) == b""
    assert capsys.readouterr().err == ""


# --- the page and a real Prometheus ---


def documented() -> set[str]:
    return set(re.findall(r"^\| `(odma_\w+)`", PAGE.read_text(), re.MULTILINE))


def test_the_page_lists_what_there_is_and_nothing_else(scraped, service, name):
    tenants = [TenantShare("t")]
    change = PolicyChange(name="odma", limits_tokens=[4096], tenants=tenants)
    pool = open_pool(service, name, policy=change)
    for i in range(40):
        place = pool.allocate(Allocate(f"r{i}", 16, predicted_output_tokens=10))
        pool.free(Free(place.handle, End.FINISHED, 5))
    told = {
        re.sub(r"_(bucket|sum|count)$", "", s.name) if "duration_seconds" in s.name else s.name
        for s in scrape(scraped)
        if s.name.startswith("odma_")
    }
    assert documented() == told | OF_FILES


def needed(tool: str) -> str:
    """Return the path of a program; skip without it, or fail where it is demanded."""
    unpacked = ROOT / "build" / "prometheus" / "usr" / "bin"
    path = shutil.which(tool, path=f"{unpacked}{os.pathsep}{os.environ['PATH']}")
    if path is None:
        missing = f"{tool} is not here: make deps, or the Debian package prometheus"
        if "ODMA_REQUIRE_CLIENTS" in os.environ:
            pytest.fail(missing)
        pytest.skip(missing)
    return path


def test_a_real_prometheus_scrapes_it_by_the_shipped_configuration(
    scraped, service, name, tmp_path
):
    open_pool(service, name)
    shipped = (ROOT / "deploy" / "prometheus.yml").read_text()
    assert "odma:9464" in shipped
    settings = tmp_path / "prometheus.yml"
    settings.write_text(
        shipped.replace("odma:9464", metrics_address(scraped)).replace(": 15s", ": 1s")
    )
    shutil.copy(ROOT / "deploy" / "alerts.yml", tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [needed("prometheus"), f"--config.file={settings}"]
    command += [
        f"--storage.tsdb.path={tmp_path / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        query = f'http://127.0.0.1:{port}/api/v1/query?query=odma_pool_open{{pool="{name}"}}'

        def scraped_once() -> bool:
            assert process.poll() is None, (tmp_path / "log").read_text()
            try:
                with urllib.request.urlopen(query.replace("{", "%7B").replace("}", "%7D")) as page:
                    return bool(json.load(page)["data"]["result"])
            except OSError:
                return False

        wait_for(scraped_once, "a scrape")
    finally:
        process.kill()
        process.wait()


ALERTS = """
rule_files: [alerts.yml]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - series: 'odma_events_total{kind="set_aside", instance="a"}'
        values: '_x20 1x5'
      - series: 'odma_rpc_calls_total{rpc="odma.v1.MemoryService.Stream", code="INTERNAL"}'
        values: '_x20 1x5'
      - series: 'odma_rpc_duration_seconds_bucket{rpc="odma.v1.MemoryService.Stream", le="0.05"}'
        values: '0x5 0+100x30'
      - series: 'odma_rpc_duration_seconds_bucket{rpc="odma.v1.MemoryService.Stream", le="+Inf"}'
        values: '0x5 0+100x30'
    alert_rule_test:
      - {eval_time: 22m, alertname: OdmaBooksSetAside, exp_alerts: [
          {exp_labels: {severity: critical, kind: set_aside, instance: a}}]}
      - {eval_time: 22m, alertname: OdmaFailsInside, exp_alerts: [
          {exp_labels: {severity: critical, rpc: odma.v1.MemoryService.Stream, code: INTERNAL}}]}
      - {eval_time: 30m, alertname: OdmaSlow, exp_alerts: [
          {exp_labels: {severity: warning, rpc: odma.v1.MemoryService.Stream}}]}
      - {eval_time: 10m, alertname: OdmaBooksSetAside, exp_alerts: []}
"""


def test_alerts_fire_at_the_first_event_and_for_streams(tmp_path):
    promtool = needed("promtool")
    rules = (ROOT / "deploy" / "alerts.yml").read_text()
    # promtool compares annotations too, and these are for people.
    plain = re.sub(r"\n        annotations:\n(?:          .*\n?)+", "\n", rules)
    (tmp_path / "alerts.yml").write_text(plain)
    (tmp_path / "test.yml").write_text(ALERTS)
    done = subprocess.run(
        [promtool, "test", "rules", str(tmp_path / "test.yml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_severity_and_a_runbook_that_is_there():
    sections = set(re.findall(r"^#### (\w+)$", PAGE.read_text(), re.MULTILINE))
    rules = (ROOT / "deploy" / "alerts.yml").read_text().split("      - alert: ")[1:]
    for rule in rules:
        name = rule.splitlines()[0]
        assert re.search(r"labels: {severity: (critical|warning)}", rule), name
        assert f"runbook: docs/reference/observability.md#{name.lower()}\n" in rule
        assert name in sections
    assert len(sections) == len(rules)


def test_promtool_finds_no_fault_with_names_queries_and_configuration(scraped, tmp_path):
    promtool = needed("promtool")
    with urllib.request.urlopen(f"http://{metrics_address(scraped)}/metrics", timeout=10) as page:
        checked = subprocess.run(
            [promtool, "check", "metrics"], input=page.read(), capture_output=True, check=False
        )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")
    configuration = ROOT / "deploy" / "prometheus.yml"
    subprocess.run([promtool, "check", "config", str(configuration)], check=True)
    rules = {"rules": [{"record": f"r{i}", "expr": query} for i, query in enumerate(queries()[2:])]}
    asked = json.dumps({"groups": [{"name": "queries", **rules}]})  # JSON is YAML
    plain = asked.replace("$__rate_interval", "5m").replace("$pool", ".*")
    (tmp_path / "queries.yml").write_text(plain)
    subprocess.run([promtool, "check", "rules", str(tmp_path / "queries.yml")], check=True)


def queries() -> list[str]:
    """Return every query of the dashboard and of the alerts."""
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "odma.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked += re.findall(
        r"expr: (?:>-\n)?((?:.*)(?:\n {10}.*)*)", (ROOT / "deploy" / "alerts.yml").read_text()
    )
    return [variable["query"] for variable in dashboard["templating"]["list"]] + asked


def test_the_dashboard_and_the_alerts_ask_for_metrics_and_labels_that_there_are(
    scraped, service, name
):
    change = PolicyChange(name="odma", limits_tokens=[4096])
    pool = open_pool(service, name, policy=change)
    place = pool.allocate(Allocate("r", 16, predicted_output_tokens=10))
    pool.free(Free(place.handle, End.FINISHED, 5))
    samples = scrape(scraped)
    told = {sample.name for sample in samples} | OF_FILES
    labels = {"le", "instance", "job", "files", *(label for s in samples for label in s.labels)}
    found = queries()
    assert len(found) > 20
    for query in found:
        assert set(re.findall(r"\b(?:odma|process)_\w+", query)) <= told, query
        used = set(re.findall(r"(\w+)(?:=~|!=|=)\"", query))
        for group in re.findall(r"by \(([^)]*)\)", query):
            used |= set(group.split(", "))
        assert used <= labels, query


# --- health over HTTP, and what systemd is told ---


def asked_over_http(server, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{metrics_address(server)}{path}", timeout=10) as page:
            return page.status, page.read().decode()
    except urllib.error.HTTPError as refused:
        return refused.code, refused.read().decode()


def test_a_service_is_live_and_ready_over_http_until_it_drains(servers, name):
    server = servers("--metrics-listen", "127.0.0.1:0", "--log-format", "json")
    for path in ("/healthz", "/readyz"):
        assert asked_over_http(server, path) == (200, "serving\n")
    assert asked_over_http(server, "/metrics")[0] == 200
    assert asked_over_http(server, "/healthzz")[0] == 404


def test_while_it_drains_it_is_live_and_not_ready():
    health = Health([])
    with metrics.serving_metrics("127.0.0.1:0", CollectorRegistry(), health.serves) as address:
        health.drain()
        with urllib.request.urlopen(f"http://{address}/healthz") as page:
            assert page.status == 200
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(f"http://{address}/readyz")


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told_when_the_service_is_ready_and_when_it_stops(servers, tmp_path, abstract):
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + path if abstract else path)
        manager.settimeout(30)
        address = "@" + path if abstract else path
        server = servers(environment={"NOTIFY_SOCKET": address})
        assert manager.recv(64) == b"READY=1"
        assert server.terminate() == 0
        assert manager.recv(64) == b"STOPPING=1"
