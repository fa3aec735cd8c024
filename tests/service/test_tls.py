"""TLS: who may connect, what may listen where, and which files a server refuses."""

from __future__ import annotations

import urllib.request
from pathlib import Path

import pytest
from certificates import DAY, LOCAL, Authority, write_key
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from prometheus_client.parser import text_string_to_metric_families
from running import odma
from servers import Server, metrics_address, open_pool, wait_for

from odma_service.client import Client, Tls
from odma_service.errors import OdmaError, UnavailableError
from odma_service.service.config import load
from odma_service.service.door.tls import certificates_of


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture(scope="module")
def authority(directory):
    return Authority(directory)


@pytest.fixture(scope="module")
def own(authority):
    """Return the server's pair."""
    return authority.sign("server", *LOCAL)


@pytest.fixture(scope="module")
def engine(authority):
    """Return a client's pair."""
    return authority.sign("engine")


def tls_flags(own, *more):
    return ("--tls-cert", str(own.cert), "--tls-key", str(own.key), *map(str, more))


@pytest.fixture(scope="module")
def secure(own, tmp_path_factory):
    """Return a server with TLS."""
    yield from running(tmp_path_factory, *tls_flags(own), "--metrics-listen", "127.0.0.1:0")


@pytest.fixture(scope="module")
def mutual(authority, own, tmp_path_factory):
    """Return a server that asks clients for a certificate."""
    yield from running(tmp_path_factory, *tls_flags(own, "--tls-client-ca", authority.cert))


def running(tmp_path_factory, *flags):
    server = Server(tmp_path_factory.mktemp("server"), ("--reflection", *flags)).start()
    yield server
    server.kill()


def connected(server, tls):
    return Client(server.target, tls=tls, retry_seconds=0)


def names(server, tls):
    with connected(server, tls) as client:
        return [pool.pool.name for pool in client.list_pools().pools]


# --- who may connect ---


def test_a_client_that_trusts_the_authority_is_served(secure, authority):
    with connected(secure, authority.trusted()) as client:
        open_pool(client, "main")
    assert names(secure, authority.trusted()) == ["main"]


def test_a_client_that_trusts_another_authority_does_not_connect(secure, tmp_path):
    with pytest.raises(UnavailableError):
        names(secure, Authority(tmp_path, "other").trusted())


def test_a_plain_client_is_not_served(secure):
    with pytest.raises(UnavailableError):
        names(secure, None)


def test_a_server_whose_certificate_is_over_is_not_trusted(servers, authority):
    server = servers(*tls_flags(authority.sign("over", *LOCAL, lasts=-DAY)))
    with pytest.raises(UnavailableError):
        names(server, authority.trusted())


def test_with_a_client_authority_only_its_clients_are_served(mutual, authority, tmp_path):
    assert names(mutual, authority.trusted(authority.sign("client"))) == []
    other = Authority(tmp_path, "other")
    refused = {
        "no certificate": None,
        "another authority's": other.sign("client"),
        "one that is over": authority.sign("late", lasts=-DAY),
    }
    for pair in refused.values():
        with pytest.raises(UnavailableError):
            names(mutual, authority.trusted(pair))


def test_a_unix_socket_stays_plain(servers, own, tmp_path):
    listen = f"unix:{tmp_path}/odma.sock"
    server = servers(*tls_flags(own), listen=listen)
    assert names(server, None) == []


def test_a_new_certificate_is_used_without_a_restart(servers, authority, own, tmp_path):
    later = Authority(tmp_path, "later")
    pair = authority.sign("renewed", *LOCAL)
    server = servers(*tls_flags(pair))
    assert names(server, authority.trusted()) == []
    new = later.sign("new", *LOCAL)
    new.key.replace(pair.key)
    new.cert.replace(pair.cert)
    assert names(server, later.trusted()) == []
    with pytest.raises(UnavailableError):
        names(server, authority.trusted())


def test_a_bad_new_certificate_leaves_the_old_one_in_use(servers, authority, tmp_path):
    pair = authority.sign("spoilt", *LOCAL)
    server = servers(*tls_flags(pair))
    pair.cert.write_text("nonsense")
    assert names(server, authority.trusted()) == []
    wait_for(lambda: "the old ones stay" in server.log.read_text(), "the complaint")


# --- the command line ---


def test_the_commands_speak_tls_with_flags_and_variables(mutual, authority, engine):
    files = {"ca": authority.cert, "cert": engine.cert, "key": engine.key}
    flags = [part for name, file in files.items() for part in (f"--{name}", str(file))]
    variables = {f"ODMA_CLIENT_{name.upper()}": str(file) for name, file in files.items()}
    assert health(mutual, flags, {}) == 0
    assert health(mutual, [], variables) == 0


def health(server, flags, variables):
    return odma("health", "--target", server.target, *flags, environment=variables).returncode


# --- what is refused at start ---


def complaint(*flags, listen=("127.0.0.1:0",)):
    """Return why a server does not start with these flags."""
    fields = [flag.removeprefix("--").replace("-", "_") for flag in flags[::2]]
    settings = load({"listen": listen, **dict(zip(fields, flags[1::2], strict=True))})
    with pytest.raises(OdmaError) as caught:
        certificates_of(settings, None)
    return str(caught.value)


def spoilt(case, directory, own, engine, tmp_path):
    """Return the flags of a server with one bad file."""
    bad = tmp_path / "bad.pem"
    bad.touch(mode=0o600)
    match case:
        case "no such file":
            return "--tls-cert", own.cert, "--tls-key", directory / "nobody.key"
        case "half a set":
            return "--tls-cert", own.cert
        case "other half":
            return "--tls-key", own.key
        case "only a client authority":
            return "--tls-client-ca", own.cert
        case "the key of another":
            return "--tls-cert", own.cert, "--tls-key", engine.key
        case "a key of nonsense":
            bad.write_text("nonsense")
            return "--tls-cert", own.cert, "--tls-key", bad
        case "an encrypted key":
            write_key(bad, ec.generate_private_key(ec.SECP256R1()), b"password")
            return "--tls-cert", own.cert, "--tls-key", bad
        case "a certificate of nonsense":
            return "--tls-cert", bad, "--tls-key", own.key
        case "a client authority of nonsense":
            return (*tls_flags(own), "--tls-client-ca", bad)
        case "a key for everybody":
            bad.write_bytes(own.key.read_bytes())
            bad.chmod(0o644)
            return "--tls-cert", own.cert, "--tls-key", bad
        case "a directory":
            return "--tls-cert", own.cert, "--tls-key", tmp_path


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no such file", "nobody.key: No such file or directory"),
        ("half a set", "tls-key: tls-cert and tls-key go together"),
        ("other half", "tls-cert: tls-cert and tls-key go together"),
        ("only a client authority", "tls-client-ca: needs tls-cert and tls-key too"),
        ("the key of another", "engine.key is not the key of "),
        ("a key of nonsense", "bad.pem holds no private key in PEM form"),
        ("an encrypted key", "the TLS key is encrypted"),
        ("a certificate of nonsense", "bad.pem holds no certificate in PEM form"),
        ("a client authority of nonsense", "bad.pem holds no certificate in PEM form"),
        ("a key for everybody", "is open to other users (mode 0644)"),
        ("a directory", "Is a directory"),
    ],
)
def test_a_bad_file_is_refused_at_start(case, message, directory, own, engine, tmp_path):
    assert message in complaint(*spoilt(case, directory, own, engine, tmp_path))


# --- what may listen where ---

EVERYWHERE = ["0.0.0.0:0", "[::]:0", "0:0"]


@pytest.mark.parametrize("listen", EVERYWHERE)
def test_nothing_plain_listens_beyond_the_loopback_unless_told_so(listen):
    line = complaint(listen=["127.0.0.1:0", listen])
    assert f"{listen} is reachable from other machines, and its connections are plain" in line
    assert "allow-insecure" in line


def test_tls_alone_is_not_enough_beyond_the_loopback(own):
    line = complaint(*tls_flags(own), listen=["0.0.0.0:0"])
    assert "callers need no token or certificate" in line


@pytest.mark.parametrize("listen", EVERYWHERE)
def test_metrics_stay_on_the_loopback_unless_told_so(listen, authority, own):
    mutual = tls_flags(own, "--tls-client-ca", authority.cert)  # which says nothing of metrics
    line = complaint(*mutual, "--metrics-listen", listen)
    assert f"{listen} is reachable from other machines, and whoever can connect reads the" in line


def test_a_server_that_would_listen_too_widely_does_not_start(tmp_path):
    run = odma("serve", "--listen", "0.0.0.0:0", "--pool-dir", tmp_path / "pools")
    assert (run.returncode, run.stdout) == (2, "")
    assert "is reachable from other machines" in run.stderr


def test_tls_with_client_certificates_listens_everywhere(servers, authority, own, engine):
    flags = tls_flags(own, "--tls-client-ca", authority.cert)
    server = servers(*flags, listen="0.0.0.0:0")
    server.listen = server.listen.replace("0.0.0.0", "127.0.0.1")
    assert names(server, authority.trusted(engine)) == []
    assert "listening beyond the loopback" not in server.log.read_text()


def test_told_so_a_plain_server_listens_everywhere_and_says_so(servers):
    server = servers("--allow-insecure", listen="0.0.0.0:0")
    server.listen = server.listen.replace("0.0.0.0", "127.0.0.1")
    assert names(server, None) == []
    assert "listening beyond the loopback" in server.log.read_text()


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F"}  # of IPv4, and the same as IPv6


def sockets_of(pid: int) -> list[str]:
    """Return the local addresses, in hexadecimal, of the TCP listeners of a process."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(link.readlink())
        except OSError:
            continue  # closed since
        if target.startswith("socket:["):
            inodes.add(target[len("socket:[") : -1])
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.append(fields[1].rpartition(":")[0])
    return found


def test_every_listener_of_a_server_is_on_the_loopback(secure):
    listening = sockets_of(secure.process.pid)
    assert len(listening) == 2  # calls and metrics
    assert set(listening) <= LOOPBACK


# --- the client ---


def test_a_client_names_a_file_it_cannot_read():
    with pytest.raises(OdmaError, match=r"cannot read /no/such/file: No such file"):
        Client("127.0.0.1:1", tls=Tls(ca=Path("/no/such/file")))


def test_a_server_that_is_not_there_is_unavailable(authority):
    with (
        Client("127.0.0.1:1", tls=authority.trusted(), retry_seconds=0) as client,
        pytest.raises(UnavailableError),
    ):
        client.list_pools()


# --- trouble that is coming ---


def test_the_end_of_a_certificate_is_a_metric_and_told_in_the_log(servers, authority, tmp_path):
    over = authority.sign("over", *LOCAL, lasts=-DAY)
    server = servers(*tls_flags(over), "--metrics-listen", "127.0.0.1:0", "--log-format", "json")
    wait_for(lambda: "the TLS certificate is over" in server.log.read_text(), "a line")
    [told] = [m for m in metrics_of(server) if m.name == "odma_tls_certificate_not_after_seconds"]
    ends = x509.load_pem_x509_certificate(over.cert.read_bytes()).not_valid_after_utc.timestamp()
    assert told.samples[0].value == ends


def test_the_end_of_a_far_or_an_old_certificate_is_read(authority, own):
    for days in (-20_000, 20_000, 1):
        name = f"ends-{days}"
        pair = authority.sign(name, *LOCAL, lasts=days * DAY, since=-25_000 * DAY)
        certificate = x509.load_pem_x509_certificate(pair.cert.read_bytes())
        settings = load({"tls_cert": pair.cert, "tls_key": pair.key})
        ends = certificates_of(settings, None).get().not_after_unix_seconds
        assert ends == certificate.not_valid_after_utc.timestamp()


def test_a_broken_file_is_told_while_nobody_calls_and_is_over_when_it_is_mended(servers, own):
    server = servers(*tls_flags(own), "--metrics-listen", "127.0.0.1:0", "--log-format", "json")

    def refused():
        [told] = [m for m in metrics_of(server) if m.name == "odma_files_refused"]
        return {sample.labels["files"]: sample.value for sample in told.samples}

    good = own.cert.read_bytes()
    assert refused() == {"tls": 0}
    try:
        own.cert.write_text("nonsense")
        wait_for(lambda: refused() == {"tls": 1}, "a refusal")
        assert "changed files refused" in server.log.read_text()
    finally:
        own.cert.write_bytes(good)
    wait_for(lambda: refused() == {"tls": 0}, "the end of the refusal")


def metrics_of(server):
    with urllib.request.urlopen(f"http://{metrics_address(server)}/metrics", timeout=10) as page:
        return list(text_string_to_metric_families(page.read().decode()))
