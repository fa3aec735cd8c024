"""Tokens, roles and whose pools they see; what a call is refused before it is begun."""

from __future__ import annotations

import hashlib
import threading
from contextlib import ExitStack

import grpc
import pytest
from certificates import LOCAL, Authority
from descriptors import RPCS, call, error_info, pool_names_of
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from paths import DOCS, JAVASCRIPT
from running import fail_to_serve, need_node, odma, run
from servers import Server, open_pool, wait_for

from odma_service.client import Client
from odma_service.errors import (
    BusyError,
    IdentityError,
    NothingLearntError,
    OdmaError,
    PoolForeignError,
    PoolLimitError,
    PoolNotFoundError,
    PoolOwnedError,
    RoleError,
    UnfencedError,
    VersionError,
)
from odma_service.rpc.v1 import memory_service_pb2 as pb
from odma_service.rpc.v1 import pool_service_pb2 as pool_pb
from odma_service.rpc.v1 import types_pb2 as types
from odma_service.rpc.v1.pool_service_pb2_grpc import PoolServiceStub
from odma_service.service.door.access import ROLES, Access, Role
from odma_service.values import Allocate, End, Free, Freed, PolicyChange

Code = grpc.StatusCode

TOKENS = {
    "alice": ("alice", "engine"),
    "bob": ("bob", "engine"),
    "ops": ("ops", "operator"),
    "alice-looks": ("alice", "read-only"),
}
"""The name and role behind each caller of these tests."""


def token_of(caller: str) -> str:
    return f"secret-of-{caller}-0123456789"


def entry(name: str, role: str, **proof: str) -> str:
    lines = {"name": name, "role": role, **{key.replace("_", "-"): v for key, v in proof.items()}}
    return "[[identity]]\n" + "".join(f'{key} = "{value}"\n' for key, value in lines.items())


def write(path, *entries: str):
    """Put identities into a token file at once, as an operator should."""
    new = path.with_suffix(".new")
    new.touch(mode=0o600)
    new.write_text("\n".join(entries))
    return new.replace(path)


def usual_entries() -> list[str]:
    entries = []
    for caller, (name, role) in TOKENS.items():
        digest = hashlib.sha256(token_of(caller).encode()).hexdigest()
        proof = {"token": token_of(caller)} if caller == "bob" else {"token_sha256": digest}
        entries.append(entry(name, role, **proof))
    return entries


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """Return a server with a token file."""
    directory = tmp_path_factory.mktemp("guarded")
    tokens = write(directory / "tokens.toml", *usual_entries())
    flags = ("--token-file", str(tokens), "--max-owner-pools", "256", "--max-pools", "1024")
    server = Server(directory, flags).start()
    yield server
    server.kill()


@pytest.fixture
def callers(guarded):
    """Return a client for each caller, and one of nobody."""
    with ExitStack() as stack:
        yield {
            caller: stack.enter_context(
                Client(guarded.target, retry_seconds=0, token=caller and token_of(caller))
            )
            for caller in (*TOKENS, None)
        }


# --- the table ---


def test_every_rpc_says_who_may_call_it():
    assert set(ROLES) == set(RPCS)
    assert all(ROLES.values())


def test_operators_cannot_touch_the_places_of_a_pool():
    touched = {"Apply", "Stream", "Allocate", "Extend", "Free", "Reconcile", "OpenPool"}
    for method in touched:
        assert ROLES[f"/odma.v1.MemoryService/{method}"] == {Role.ENGINE}


def test_the_page_on_security_names_every_rpc():
    page = (DOCS / "guides" / "security.md").read_text()
    assert [rpc for rpc in ROLES if rpc.rpartition("/")[2] not in page] == []


# --- tokens and roles ---


@pytest.mark.parametrize("rpc", RPCS)
@pytest.mark.parametrize(
    "authorization",
    [None, "Bearer secret-of-nobody-0123456789", "Basic xyz", "Bearer", f"Bearer {'x' * 600}"],
    ids=["none", "unknown", "of another kind", "empty", "long"],
)
def test_a_call_without_a_known_token_is_unauthenticated(guarded, rpc, authorization):
    error = call(guarded.target, rpc, authorization=authorization)
    assert error.code() == Code.UNAUTHENTICATED, error
    assert error_info(error).reason == "IDENTITY"


@pytest.mark.parametrize("rpc", RPCS)
@pytest.mark.parametrize("caller", TOKENS)
def test_a_role_calls_what_it_may_and_nothing_else(guarded, rpc, caller):
    error = call(guarded.target, rpc, authorization=f"Bearer {token_of(caller)}")
    role = TOKENS[caller][1]
    refused = error is not None and error_info(error).reason == "ROLE"
    assert refused == (role not in ROLES[rpc])
    if refused:
        assert error.code() == Code.PERMISSION_DENIED
        assert error_info(error).metadata["role"] == role
    elif error is not None:
        assert error.code() != Code.UNAUTHENTICATED


def test_health_asks_nobody_who_he_is(guarded):
    with grpc.insecure_channel(guarded.target) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()


def test_the_commands_send_the_token_of_the_environment(guarded):
    for token, code in ((token_of("ops"), 0), ("x" * 16, 2)):
        run = odma("status", "--target", guarded.target, environment={"ODMA_TOKEN": token})
        assert run.returncode == code, run.stderr
        assert token not in run.stderr + run.stdout


# --- whose pools ---


def test_a_pool_is_seen_by_its_owner_and_by_operators_alone(callers, name):
    open_pool(callers["alice"], name)
    for caller in ("alice", "ops", "alice-looks"):
        assert callers[caller].get_pool(name).summary.pool.name == name
        assert name in names(callers[caller])
    assert name not in names(callers["bob"])
    with pytest.raises(PoolNotFoundError):
        callers["bob"].get_pool(name)


NAMES_OPEN = {"OpenPool", "Watch", "ForgetPool"}
"""Rpcs that answer about names that no pool has: a new one, one to come, one that is gone."""


def names(client):
    return [summary.pool.name for summary in client.list_pools().pools]


@pytest.mark.parametrize(
    "rpc",
    [
        rpc
        for rpc, method in RPCS.items()
        if pool_names_of(method.input_type) and method.name not in NAMES_OPEN
    ],
)
def test_another_engine_is_told_that_there_is_no_such_pool(guarded, callers, name, rpc):
    pool = open_pool(callers["alice"], name)
    error = call(
        guarded.target, rpc, authorization=f"Bearer {token_of('bob')}", pool=pool.numbered()
    )
    assert error_info(error).reason in {"POOL_NOT_FOUND", "UNIMPLEMENTED"}


def test_another_engine_forgets_nothing_and_is_told_nothing(callers, name):
    pool = open_pool(callers["alice"], name)
    callers["bob"].forget_pool(pool.ref)
    pool.close_pool()
    callers["bob"].forget_pool(pool.ref)
    with pytest.raises(RoleError):
        callers["alice-looks"].forget_pool(pool.ref)
    assert callers["alice"].get_pool(name).summary.state == pool_pb.POOL_STATE_CLOSED
    callers["alice"].forget_pool(pool.ref)
    with pytest.raises(PoolNotFoundError):
        callers["alice"].get_pool(name)


@pytest.mark.parametrize("closed", [False, True])
def test_another_engine_cannot_open_a_pool_even_when_it_is_closed(callers, name, closed):
    pool = open_pool(callers["alice"], name)
    if closed:
        pool.close_pool()
    with pytest.raises(PoolForeignError):
        open_pool(callers["bob"], name, take_over=True)
    assert open_pool(callers["alice"], name, take_over=True).ref.epoch > pool.ref.epoch


def test_the_owner_is_known_after_a_restart(guarded, callers, name):
    pool = open_pool(callers["alice"], name, open_id="mine")
    guarded.restart()
    with (
        Client(guarded.target, token=token_of("alice")) as alice,
        Client(guarded.target, token=token_of("bob")) as bob,
    ):
        assert open_pool(alice, name, open_id="mine").ref.epoch == pool.ref.epoch
        with pytest.raises(PoolNotFoundError):
            bob.get_pool(name)


def test_an_operator_steers_and_closes_the_pools_of_others(callers, name):
    pool = open_pool(callers["alice"], name)
    ops, ref = callers["ops"], types.PoolRef(name=name, epoch=pool.ref.epoch)
    change = pb.SetPolicyRequest(pool=ref, policy=types.PolicyChange(growth=2))
    with pytest.raises(UnfencedError):
        ops.call(ops.memory.SetPolicy, change)
    version = pool.response.policy_version
    assert ops.set_policy(ref, PolicyChange(growth=2), expected_version=version).growth == 2
    with pytest.raises(VersionError):
        ops.set_policy(ref, PolicyChange(growth=3), expected_version=version)
    with pytest.raises(NothingLearntError):
        ops.recalibrate(ref, dry_run=True, expected_version=version + 1)
    ops.close_pool(ref)
    assert callers["alice"].get_pool(name).summary.state == pool_pb.POOL_STATE_CLOSED
    ops.forget_pool(ref)
    assert name not in names(callers["alice"])


def test_an_engine_works_with_its_token(callers, name):
    pool = open_pool(callers["alice"], name)
    place = pool.apply(ops=[Allocate("r", 10)]).results[0]
    assert pool.free(Free(place.handle, End.FINISHED, 1)) == Freed()


def test_pools_from_before_there_were_tokens_belong_to_whoever_opens_them_first(servers, tmp_path):
    server = servers()
    with Client(server.target) as anybody:
        open_pool(anybody, "old", open_id="old")
    server.kill()
    server.flags = ("--token-file", str(write(tmp_path / "tokens.toml", *usual_entries())))
    server.listen = "127.0.0.1:0"
    server.start()
    with (
        Client(server.target, token=token_of("alice")) as alice,
        Client(server.target, token=token_of("bob")) as bob,
        Client(server.target, token=token_of("ops")) as ops,
    ):
        assert (names(alice), names(ops)) == ([], ["old"])
        with pytest.raises(PoolOwnedError):
            open_pool(alice, "old", open_id="old")
        pool = open_pool(alice, "old", open_id="old", take_over=True)
        with pytest.raises(PoolForeignError):
            open_pool(bob, "old", take_over=True)
    server.kill()
    server.flags = ()
    server.listen = "127.0.0.1:0"
    server.start()
    with Client(server.target) as anybody:
        assert open_pool(anybody, "old", open_id="old").ref.epoch == pool.ref.epoch


def test_an_owner_has_a_limit_of_pools_of_its_own(servers, tmp_path):
    tokens = write(tmp_path / "tokens.toml", *usual_entries())
    server = servers("--token-file", str(tokens), "--max-owner-pools", "2")
    with (
        Client(server.target, token=token_of("alice")) as alice,
        Client(server.target, token=token_of("bob")) as bob,
    ):
        open_pool(bob, "of-bob").close_pool()
        first, _ = open_pool(alice, "a"), open_pool(alice, "b")
        with pytest.raises(PoolLimitError, match="max-owner-pools"):
            open_pool(alice, "c")
        first.close_pool()
        open_pool(alice, "c")
        assert (names(alice), names(bob)) == (["b", "c"], ["of-bob"])


# --- the token file while the server runs ---


def test_tokens_come_and_go_without_a_restart(servers, tmp_path, name):
    tokens = write(tmp_path / "tokens.toml", *usual_entries())
    server = servers("--token-file", str(tokens))
    new = "a-second-secret-of-alice"
    with (
        Client(server.target, token=token_of("alice"), retry_seconds=0) as old_token,
        Client(server.target, token=new, retry_seconds=0) as new_token,
    ):
        open_pool(old_token, name)
        with pytest.raises(IdentityError):
            new_token.get_pool(name)
        write(tokens, *usual_entries(), entry("alice", "engine", token=new))
        assert new_token.get_pool(name)
        assert old_token.get_pool(name)
        write(tokens, entry("alice", "engine", token=new))
        assert new_token.get_pool(name)
        with pytest.raises(IdentityError):
            old_token.get_pool(name)
        write(tokens, "nonsense")
        assert new_token.get_pool(name)
    log = server.log.read_text()
    assert "the old ones stay" in log
    assert new not in log


# --- certificates as identities ---


def test_a_certificate_is_an_identity_too(servers, tmp_path, name):
    authority = Authority(tmp_path)
    own = authority.sign("server", *LOCAL)
    tokens = write(
        tmp_path / "tokens.toml",
        entry("alice", "engine", certificate="alice.example"),
        entry("looker", "read-only", certificate="looker.example"),
        *usual_entries()[1:],
    )
    flags = {"tls-cert": own.cert, "tls-key": own.key, "tls-client-ca": authority.cert}
    flags["token-file"] = tokens
    server = servers(*(part for key, value in flags.items() for part in (f"--{key}", str(value))))

    def client(common_name, token=None):
        tls = authority.trusted(authority.sign(common_name))
        return Client(server.target, tls=tls, token=token, retry_seconds=0)

    with client("alice.example") as alice, client("stranger") as stranger:
        open_pool(alice, name)
        with pytest.raises(IdentityError):
            names(stranger)
    with client("looker.example") as looker, client("stranger", token_of("ops")) as ops:
        assert (names(looker), names(ops)) == ([], [name])
        with pytest.raises(RoleError):
            open_pool(looker, "x")
    error = call(server.target, next(iter(RPCS)), tls=authority.trusted(authority.sign("nobody")))
    assert error.code() == Code.UNAUTHENTICATED


def test_certificates_as_identities_need_a_client_authority(tmp_path):
    tokens = write(tmp_path / "tokens.toml", entry("alice", "engine", certificate="alice"))
    address = ("--listen", "127.0.0.1:0", "--pool-dir", tmp_path / "pools")
    assert "tls-client-ca: needed" in fail_to_serve("--token-file", tokens, *address)


JAVASCRIPT_CLIENT = """
import { readFileSync } from 'node:fs';
const { Client } = await import(process.argv[1]);
const [target, ca, cert, key, token] = process.argv.slice(2);
const tls = { ca: readFileSync(ca), cert: readFileSync(cert), key: readFileSync(key) };
for (const given of [token, token + 'x']) {
  const client = new Client(target, { tls, token: given, retrySeconds: 0 });
  try {
    const stream = client.stream();
    console.log((await client.call('ListPools', {})).pools.length);
    await client.call('Apply', { pool: { name: 'nobody', epoch: 1 }, seq: 1 }, stream);
  } catch (error) {
    console.log(error.code, error.reason);
  }
  client.close();
}
"""


def test_the_javascript_client_shows_a_certificate_and_sends_a_token(servers, tmp_path):
    node = need_node()
    authority = Authority(tmp_path)
    own, mine = authority.sign("server", *LOCAL), authority.sign("mine")
    tokens = write(tmp_path / "tokens.toml", *usual_entries())
    flags = {"tls-cert": own.cert, "tls-key": own.key, "tls-client-ca": authority.cert}
    flags["token-file"] = tokens
    server = servers(*(part for key, value in flags.items() for part in (f"--{key}", str(value))))
    files = map(str, (authority.cert, mine.cert, mine.key))
    script = ("--input-type=module", "--eval", JAVASCRIPT_CLIENT, str(JAVASCRIPT / "client.js"))
    told = run(node, *script, server.target, *files, token_of("alice"))
    assert told.split("\n") == ["0", "NOT_FOUND POOL_NOT_FOUND", "UNAUTHENTICATED IDENTITY", ""]


# --- token files that are refused ---

SECRET = "a-token-that-nobody-may-see"
ALICE = entry("alice", "engine", token=SECRET)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "1 to 4,096 identities, not 0"),
        (SECRET, "is no TOML file"),
        (f'token = "{SECRET}"', "only [[identity]] tables are known"),
        (f'identity = "{SECRET}"', "only [[identity]] tables are known"),
        (ALICE + 'rol = "x"', "identity 1: unknown key 'rol'"),
        (entry("alice", "king", token=SECRET), "identity 1: role: one of engine, operator, read-"),
        (entry("a b", "engine", token=SECRET), "identity 1: name: 1 to 64 characters"),
        (entry("alice", "engine"), "identity 1: one of token-sha256, token, certificate"),
        (ALICE + 'certificate = "x"', "identity 1: one of token-sha256, token, certificate"),
        (entry("alice", "engine", token="short"), "identity 1: token: 16 to 512"),
        (entry("alice", "engine", token="with a space in it"), "identity 1: token: 16 to 512"),
        (entry("alice", "engine", token_sha256="AB" * 32), "identity 1: token-sha256: 64"),
        (ALICE + entry("bob", "engine", token=SECRET), "identity 2: its token"),
        (entry("alice", "engine", certificate=""), "identity 1: its token"),
        ('[[identity]]\nname = "a"\nrole = "engine"\ntoken = 5', "every value is a text"),
    ],
)
def test_a_bad_token_file_is_named_and_never_quoted(text, message, tmp_path):
    with pytest.raises(OdmaError) as caught:
        Access_of(tmp_path, text)
    assert message in str(caught.value)
    assert SECRET not in str(caught.value)


def Access_of(tmp_path, text):
    return Access(write(tmp_path / "tokens.toml", text))


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o660, 0o666])
def test_a_token_file_that_others_may_read_is_refused(mode, tmp_path):
    tokens = write(tmp_path / "tokens.toml", ALICE)
    tokens.chmod(mode)
    with pytest.raises(OdmaError, match=f"is open to other users \\(mode {mode:04o}\\)"):
        Access(tokens)


# --- how much at once, and what is no call ---


def test_calls_beyond_the_limit_are_refused_with_a_delay(servers):
    server = servers("--max-calls", "4", "--workers", "2")
    never = threading.Event()

    def silent():
        never.wait()
        yield b""

    with grpc.insecure_channel(server.target) as channel:
        call_of = channel.stream_unary("/odma.v1.PoolService/ListPools")
        try:
            held = [call_of.future(silent()) for _ in range(4)]
            stub = PoolServiceStub(channel)

            def refused():
                try:
                    stub.ListPools(pool_pb.ListPoolsRequest(), timeout=0.2)
                except grpc.RpcError as error:
                    return error if error.code() == Code.RESOURCE_EXHAUSTED else None

            wait_for(refused, "the limit")
            error = refused()
            assert error_info(error).reason == "BUSY"
            retry = error_details_pb2.RetryInfo()
            assert any(detail.Unpack(retry) for detail in rpc_status.from_call(error).details)
            with Client(server.target, retry_seconds=0) as client:
                assert client.is_serving()
                with pytest.raises(BusyError):
                    client.list_pools()
        finally:
            for future in held:
                future.cancel()
            never.set()
        with Client(server.target) as client:
            wait_for(lambda: served(client), "the calls' end")


def served(client):
    try:
        return client.list_pools() is not None
    except BusyError:
        return False


@pytest.mark.parametrize(
    "rpc",
    [
        "/odma.v1.MemoryService/Nothing",
        "/nobody.Service/Call",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    ],
)
def test_an_rpc_that_is_not_served_says_so_with_details(server, rpc):
    with grpc.insecure_channel(server.target) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(rpc)(b"")
        assert caught.value.code() == Code.UNIMPLEMENTED
        assert error_info(caught.value).reason == "UNIMPLEMENTED"
        with pytest.raises(grpc.RpcError) as caught:
            next(channel.stream_stream(rpc)(iter([b""])))
        assert error_info(caught.value).reason == "UNIMPLEMENTED"


def test_headers_have_a_bound(server):
    error = call(server.target, next(iter(RPCS)), authorization="x" * 40_000)
    assert error.code() in {Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE}
