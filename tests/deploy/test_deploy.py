"""The files of `deploy`: true of the service, and valid for what reads them."""

from __future__ import annotations

import configparser
import hashlib
import shutil
import subprocess
import urllib.request
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from certificates import LOCAL, Authority
from paths import ROOT
from servers import Server, metrics_address, open_pool

from odma_service.client import Client
from odma_service.errors import IdentityError
from odma_service.service.config import Settings, load

DEPLOY = ROOT / "deploy"
MANIFESTS = [
    manifest
    for file in sorted((DEPLOY / "kubernetes").glob("*.yaml"))
    for manifest in yaml.safe_load_all(file.read_text())
]
UNIT = DEPLOY / "systemd" / "odma.service"


def manifest(kind: str) -> dict:
    [found] = [each for each in MANIFESTS if each["kind"] == kind]
    return found


@pytest.mark.parametrize("manifest", MANIFESTS, ids=[each["kind"] for each in MANIFESTS])
def test_a_manifest_is_valid(manifest):
    newest = kubernetes_validate.latest_version()
    assert kubernetes_validate.validate(manifest, newest, strict=True)


def test_the_daemon_set_is_bounded_and_has_no_rights():
    pod = manifest("DaemonSet")["spec"]["template"]["spec"]
    [container] = pod["containers"]
    rights = container["securityContext"]
    assert rights["capabilities"] == {"drop": ["ALL"]}
    assert rights["readOnlyRootFilesystem"]
    assert rights["runAsNonRoot"]
    assert container["resources"]["limits"]["memory"]
    probes = {
        name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("liveness", "readiness")
    }
    assert probes == {"liveness": "/healthz", "readiness": "/readyz"}
    mounted = {each["name"] for each in container["volumeMounts"]}
    assert mounted == {each["name"] for each in pod["volumes"]}


@pytest.fixture
def settings(tmp_path) -> Path:
    """Return the settings of the ConfigMap with paths and ports of this test."""
    text = manifest("ConfigMap")["data"]["odma.toml"]
    file = tmp_path / "odma.toml"
    file.write_text(text.replace("/secrets", str(tmp_path)).replace("0.0.0.0:9464", "127.0.0.1:0"))
    return file


def test_a_pod_has_time_to_drain(settings):
    grace = manifest("DaemonSet")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > load({"config": settings}).drain_seconds + 5


def test_a_service_with_the_settings_of_the_manifests_serves_who_has_a_token(settings, tmp_path):
    authority = Authority(tmp_path, "ca")
    own = authority.sign("server", *LOCAL)
    own.cert.rename(tmp_path / "tls.crt")
    own.key.rename(tmp_path / "tls.key")
    digest = hashlib.sha256(b"a-token-of-engine-a").hexdigest()
    tokens = manifest("Secret")["stringData"]["tokens.toml"].replace("0" * 64, digest)
    file = tmp_path / "tokens.toml"
    file.touch(mode=0o600)
    file.write_text(tokens)
    server = Server(tmp_path, ("--config", str(settings), "--metrics-listen", "127.0.0.1:0"))
    server.start()
    try:
        trusted = authority.trusted()
        with Client(server.target, tls=trusted, token="a-token-of-engine-a") as engine:
            open_pool(engine, "main")
        with pytest.raises(IdentityError), Client(server.target, tls=trusted) as nobody:
            nobody.list_pools()
        for path in ("healthz", "readyz"):
            with urllib.request.urlopen(f"http://{metrics_address(server)}/{path}") as page:
                assert page.status == 200
    finally:
        server.kill()


def test_flags_of_the_manifest_and_of_the_unit_are_settings():
    [container] = manifest("DaemonSet")["spec"]["template"]["spec"]["containers"]
    words = (
        " ".join(container["args"]).replace("=", " ").split() + unit("Service", "ExecStart").split()
    )
    flags = {word.removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}
    assert {"config", "pool_dir"} <= flags <= set(Settings.model_fields)


def unit(section: str, key: str) -> str:
    parsed = configparser.ConfigParser(strict=False, interpolation=None)
    parsed.optionxform = str
    parsed.read_string(UNIT.read_text())
    return parsed[section][key]


def test_the_unit_waits_for_the_service_to_be_ready_and_keeps_its_books():
    assert unit("Service", "Type") == "notify"
    assert unit("Service", "RuntimeDirectoryPreserve") == "yes"


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not here")
def test_systemd_finds_no_fault_with_the_unit(tmp_path):
    text = (
        UNIT.read_text().replace("/opt/odma/bin/odma", "/bin/true").replace("=odma\n", "=daemon\n")
    )
    copy = tmp_path / "odma.service"
    copy.write_text(text)
    verified = subprocess.run(
        ["systemd-analyze", "verify", copy], capture_output=True, text=True, check=False
    )
    assert (verified.returncode, verified.stderr) == (0, "")
    told = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=25", copy],
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stdout
