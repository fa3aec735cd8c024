"""Flags, environment, file and defaults, in this precedence; unknown names are errors."""

from __future__ import annotations

from pathlib import Path

import pytest
from running import odma
from typer.main import get_command

from odma_service.cli.serve import app
from odma_service.errors import InvalidError, OdmaError
from odma_service.service import config

OF_TYPER = {"--install-completion", "--show-completion", "--help"}


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    for variable in ("ODMA_WORKERS", "ODMA_LISTEN", "ODMA_CONFIG", "ODMA_POOL_DIR"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "odma.toml"
    path.write_text('workers = 3\nmax-pools = 4\nlisten = ["unix:/run/odma.sock"]\n')
    return path


def complaint(**flags):
    with pytest.raises(InvalidError) as caught:
        config.load(flags)
    return str(caught.value)


def test_without_anything_said_only_this_machine_is_served():
    assert config.load({}).listen == ("127.0.0.1:50051",)


def test_a_file_wins_over_defaults(file):
    settings = config.load({"config": file})
    assert (settings.workers, settings.max_pools) == (3, 4)
    assert settings.listen == ("unix:/run/odma.sock",)


def test_the_environment_names_the_file_too(file, monkeypatch):
    monkeypatch.setenv("ODMA_CONFIG", str(file))
    assert config.load({}).workers == 3


def test_the_environment_wins_over_a_file(file, monkeypatch):
    monkeypatch.setenv("ODMA_WORKERS", "5")
    settings = config.load({"config": file})
    assert (settings.workers, settings.max_pools) == (5, 4)


def test_a_flag_wins_over_the_environment(file, monkeypatch):
    monkeypatch.setenv("ODMA_WORKERS", "5")
    assert config.load({"config": file, "workers": 6}).workers == 6


def test_a_list_in_the_environment_is_divided_by_commas(monkeypatch):
    monkeypatch.setenv("ODMA_LISTEN", "127.0.0.1:1, [::1]:2,unix:/run/odma.sock")
    assert config.load({}).listen == ("127.0.0.1:1", "[::1]:2", "unix:/run/odma.sock")


@pytest.mark.parametrize(
    ("variables", "directory"),
    [
        ({"XDG_RUNTIME_DIR": "/run/user/7", "XDG_STATE_HOME": "/state"}, "/run/user/7/odma"),
        ({"XDG_STATE_HOME": "/state", "HOME": "/home/x"}, "/state/odma"),
        ({"HOME": "/home/x"}, "/home/x/.local/state/odma"),
    ],
)
def test_pools_lie_in_a_directory_of_the_user(variables, directory, monkeypatch):
    for variable in ("XDG_RUNTIME_DIR", "XDG_STATE_HOME", "HOME"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert config.load({}).pool_dir == Path(directory)


def test_an_unknown_variable_is_an_error_that_names_its_neighbours(monkeypatch):
    monkeypatch.setenv("ODMA_WORKER", "5")
    assert complaint() == "ODMA_WORKER: unknown environment variable; did you mean ODMA_WORKERS?"


def test_an_unknown_variable_without_neighbours_is_told_what_there_is(monkeypatch):
    monkeypatch.setenv("ODMA_ZZZ", "5")
    assert "known are ODMA_ALLOW_INSECURE, ODMA_CONFIG" in complaint()


@pytest.mark.parametrize("variable", ["ODMA_DATA_DIR", "ODMA_REQUIRE_CLIENTS"])
def test_variables_of_the_projects_other_tools_are_left_alone(variable, monkeypatch):
    monkeypatch.setenv(variable, "x")
    config.load({})


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ODMA_SERVICE_HOST", "10.0.0.1"),
        ("ODMA_SERVICE_PORT", "50051"),
        ("ODMA_SERVICE_PORT_GRPC", "50051"),
        ("ODMA_PORT", "tcp://10.0.0.1:50051"),
        ("ODMA_PORT_50051_TCP", "tcp://10.0.0.1:50051"),
        ("ODMA_PORT_50051_TCP_ADDR", "10.0.0.1"),
        ("ODMA_METRICS_SERVICE_HOST", "10.0.0.2"),
        ("ODMA_METRICS_PORT", "tcp://10.0.0.2:9464"),
    ],
)
def test_service_links_of_kubernetes_are_left_alone(variable, value, monkeypatch):
    monkeypatch.setenv(variable, value)
    assert config.load({}) == config.Settings()


def test_a_port_that_somebody_meant_is_an_error(monkeypatch):
    monkeypatch.setenv("ODMA_PORT", "50051")
    with pytest.raises(InvalidError, match="unknown environment variable"):
        config.load({})


def test_a_file_that_everybody_may_write_to_is_refused(file):
    file.chmod(0o666)
    with pytest.raises(OdmaError, match="everybody may write"):
        config.load({"config": file})


def test_an_unknown_key_is_an_error_that_names_its_neighbours(file):
    file.write_text("max_pools = 5\n")
    assert complaint(config=file) == f"{file}: max_pools: unknown key; did you mean max-pools?"


def test_a_file_cannot_name_another_file(file):
    file.write_text('config = "other.toml"\n')
    assert "unknown key" in complaint(config=file)


@pytest.mark.parametrize("text", ["workers =", "\x00", "[workers]\nx = 1\n", "workers = [1]"])
def test_a_file_that_makes_no_sense_is_named(text, file):
    file.write_text(text)
    assert str(file) in complaint(config=file) or "'workers' of the TOML file" in complaint(
        config=file
    )


def test_a_file_that_is_not_there_is_named(tmp_path):
    assert complaint(config=tmp_path / "no.toml").endswith("no.toml: No such file or directory")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("workers", 0),
        ("workers", 257),
        ("workers", "many"),
        ("max_pools", 0),
        ("max_pools", -1),
        ("max_pools", 10**9),
        ("drain_seconds", -1),
        ("drain_seconds", float("nan")),
        ("drain_seconds", float("inf")),
        ("log_format", "xml"),
        ("log_level", "loud"),
        ("reflection", "perhaps"),
        ("listen", []),
        ("listen", ["50051"]),
        ("listen", [":50051"]),
        ("listen", ["localhost:"]),
        ("listen", ["localhost:65536"]),
        ("listen", ["localhost:-1"]),
        ("listen", ["::1:50051"]),
        ("listen", ["[::1:50051"]),
        ("listen", ["unix:relative"]),
        ("listen", ["unix:/" + "x" * 107]),
        ("metrics_listen", "9464"),
        ("metrics_listen", "unix:/run/odma.metrics"),
        ("decision_log_bytes", 1),
    ],
)
def test_a_bad_value_names_its_flag(field, value):
    assert complaint(**{field: value}).startswith(f"--{field.replace('_', '-')}: ")


def test_a_bad_value_names_its_variable(monkeypatch):
    monkeypatch.setenv("ODMA_WORKERS", "0")
    assert complaint().startswith("ODMA_WORKERS: ")


def test_a_bad_value_names_its_key(file):
    file.write_text("workers = 0\n")
    assert complaint(config=file).startswith("key 'workers' of the TOML file: ")


def test_every_setting_has_a_flag():
    flags = {option.opts[0] for option in get_command(app).params}
    assert flags - OF_TYPER == {
        f"--{field.replace('_', '-')}" for field in config.Settings.model_fields
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--workers", "0"], "--workers: "),
        (["serve", "--worker", "1"], "No such option: --worker"),
        (["serve", "--listen", "nobody"], "--listen: "),
        (["serve", "--config", "/no/such/file"], "config: cannot read /no/such/file"),
        (["serve", "--pool-dir", "/proc/odma"], "cannot use the pool directory"),
        (["status", "--target", "127.0.0.1:1"], "UNAVAILABLE"),
        (["nonsense"], "No such command"),
    ],
)
def test_a_failure_is_one_line_and_exit_code_2(arguments, message):
    run = odma(*arguments)
    assert run.returncode == 2
    assert run.stdout == ""
    [line] = run.stderr.splitlines()
    called = "odma" if arguments == ["nonsense"] else f"odma {arguments[0]}"
    assert line.startswith(f"{called}: ")
    assert message in line
