from __future__ import annotations

from pathlib import Path

import pytest

from flowkv_common.bus.access import Access, Login
from flowkv_common.config import (
    KINDS,
    GatewaySettings,
    NodeSettings,
    SchedulerSettings,
    ServiceSettings,
    load_settings,
    settings_of,
)
from flowkv_common.errors import CannotStart


def test_flags_win_over_environment_over_defaults() -> None:
    environ = {"FLOWKV_MODEL_PATH": "/m", "FLOWKV_BLOCK_SIZE": "32", "FLOWKV_TOKEN_BUDGET": "128"}
    settings = load_settings(NodeSettings, ["--block-size", "8"], environ)
    assert (settings.model_path, settings.block_size, settings.token_budget) == ("/m", 8, 128)
    assert settings.max_num_seqs == NodeSettings(model_path="").max_num_seqs


def test_a_typo_in_the_environment_is_refused_with_a_hint() -> None:
    with pytest.raises(SystemExit, match="FLOWKV_BLOCKSIZE; did you mean FLOWKV_BLOCK_SIZE"):
        load_settings(SchedulerSettings, [], {"FLOWKV_BLOCKSIZE": "8"})


def test_variables_of_other_services_are_let_pass() -> None:
    assert load_settings(SchedulerSettings, [], {"FLOWKV_BLOCK_SIZE": "8", "OTHER": "x"}).http_port == 0


def test_lending_is_on_unless_switched_off() -> None:
    assert load_settings(SchedulerSettings, [], {}).lending is True
    assert load_settings(SchedulerSettings, [], {"FLOWKV_LENDING": "false"}).lending is False
    assert (
        load_settings(SchedulerSettings, ["--lending", "true"], {"FLOWKV_LENDING": "false"}).lending is True
    )


def test_what_holds_a_password_can_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "url").write_text("nats://u:p@host:4222\n")
    environ = {"FLOWKV_NATS_URL_FILE": str(tmp_path / "url")}
    read = Access(load_settings(SchedulerSettings, [], environ)).read_servers()
    assert (read.urls, read.logins) == (("nats://host:4222",), (Login("u", "p"),))
    flagged = load_settings(SchedulerSettings, ["--nats-url", "nats://other"], environ)
    assert Access(flagged).read_servers().urls == ("nats://other:4222",)
    none = load_settings(SchedulerSettings, [], {"FLOWKV_NATS_URL_FILE": str(tmp_path / "none")})
    with pytest.raises(CannotStart, match="No such file"):
        Access(none)
    with pytest.raises(SystemExit, match="unknown variable FLOWKV_HOST_FILE"):
        load_settings(SchedulerSettings, [], {"FLOWKV_HOST_FILE": "x"})


def test_an_unknown_flag_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_settings(SchedulerSettings, ["--block-size", "8"], {})
    assert "\nscheduler: error: unrecognized arguments: --block-size 8" in capsys.readouterr().err


@pytest.mark.parametrize("node_id", ["node.1", "a b", "*", ">", "n\u00e4he", "a/b"])
def test_a_node_id_that_no_subject_can_hold_is_refused(node_id: str) -> None:
    flags = ["--model-path", "/m", "--node-id"]
    with pytest.raises(SystemExit, match="FLOWKV_NODE_ID is .*only letters, digits, - and _"):
        load_settings(NodeSettings, [*flags, node_id], {})
    assert load_settings(NodeSettings, [*flags, "Prefill_0-b"], {}).node_id == "Prefill_0-b"


@pytest.mark.parametrize("name", ["decode..internal", 64 * "a" + ".internal"])
@pytest.mark.parametrize("flag", ["host", "advertise-host"])
def test_a_name_that_no_host_can_have_is_refused(flag: str, name: str) -> None:
    flags = ["--model-path", "/m", f"--{flag}"]
    with pytest.raises(SystemExit, match=f"FLOWKV_{flag.upper().replace('-', '_')} is .*no name of a host"):
        load_settings(NodeSettings, [*flags, name], {})
    for good in ("decode.internal", "decode.internal.", "n\u00e4he", "10.0.0.1", "fd00::1", "::"):
        load_settings(NodeSettings, [*flags, good], {})


@pytest.mark.parametrize(
    ("data_port", "ports"), [("0", range(1)), ("9201", range(9201, 9202)), ("9201-9299", range(9201, 9300))]
)
def test_a_data_port_may_be_a_range(data_port: str, ports: range) -> None:
    settings = load_settings(NodeSettings, ["--model-path", "/m", "--data-port", data_port], {})
    assert settings.data_ports == ports


@pytest.mark.parametrize("data_port", ["", "-1", "9201-", "9299-9201", "0-9", "1-70000", "many", "1,2"])
def test_a_data_port_that_is_neither_port_nor_range_is_refused(data_port: str) -> None:
    with pytest.raises(SystemExit, match="FLOWKV_DATA_PORT is"):
        load_settings(NodeSettings, ["--model-path", "/m", f"--data-port={data_port}"], {})


@pytest.mark.parametrize(
    "flags",
    [
        ["--data-port", "9201-9299", "--advertise-port", "9301"],
        ["--data-tls-cert", "node.pem"],
        ["--data-tls-cert", "node.pem", "--data-tls-key", "node.key"],
        ["--advertise-host", "10.0.0.1,decode..internal"],
    ],
)
def test_settings_of_the_data_port_that_do_not_go_together_are_refused(flags: list[str]) -> None:
    with pytest.raises(SystemExit, match="FLOWKV_(ADVERTISE|DATA)_"):
        load_settings(NodeSettings, ["--model-path", "/m", *flags], {})


@pytest.mark.parametrize(
    ("said", "names"), [("nixl, shm ,tcp,", ["nixl", "shm", "tcp"]), ("", ["shm", "tcp"])]
)
def test_connectors_are_a_list_as_all_others(said: str, names: list[str]) -> None:
    flags = ["--model-path", "m", "--connectors", said]
    assert load_settings(NodeSettings, flags, {}).connector_names == names


def test_a_token_budget_of_two_blocks_is_refused_by_its_name() -> None:
    flags = ["--model-path", "/m", "--block-size", "32"]
    with pytest.raises(SystemExit, match="FLOWKV_TOKEN_BUDGET is 64, it must be more than two blocks"):
        load_settings(NodeSettings, [*flags, "--token-budget", "64"], {})
    assert load_settings(NodeSettings, [*flags, "--token-budget", "65"], {}).token_budget == 65


def test_a_value_of_the_wrong_type_and_a_missing_one_are_refused() -> None:
    with pytest.raises(SystemExit, match="FLOWKV_PORT .or --port.: Expected"):
        load_settings(GatewaySettings, ["--model-path", "/m", "--port", "many"], {})
    with pytest.raises(SystemExit, match="FLOWKV_MODEL_PATH .or --model-path. is not set"):
        load_settings(GatewaySettings, [], {})


def test_a_generation_config_is_the_models_or_none() -> None:
    argv = ["--model-path", "m"]
    assert load_settings(GatewaySettings, argv, {}).generation_config == "auto"
    assert (
        load_settings(GatewaySettings, argv, {"FLOWKV_GENERATION_CONFIG": "none"}).generation_config == "none"
    )
    with pytest.raises(SystemExit, match="FLOWKV_GENERATION_CONFIG .*'vllm': choose one of auto, none"):
        load_settings(GatewaySettings, argv, {"FLOWKV_GENERATION_CONFIG": "vllm"})


@pytest.mark.parametrize("value", ["-1", "nan"])
@pytest.mark.parametrize("kind", [GatewaySettings, SchedulerSettings, NodeSettings])
def test_no_time_is_negative(kind: type[ServiceSettings], value: str) -> None:
    """A stream would be pinged without a pause, an idle connection closed before it has asked."""
    times = [name for name in kind.__struct_fields__ if name.endswith("_s")]
    assert times
    environ = {"FLOWKV_MODEL_PATH": "/m"}
    for name in times:
        with pytest.raises(SystemExit, match=f"FLOWKV_{name.upper()} is {value}.*, it must be 0 or more"):
            load_settings(kind, [], {**environ, f"FLOWKV_{name.upper()}": value})
        assert getattr(load_settings(kind, [], {**environ, f"FLOWKV_{name.upper()}": "0"}), name) == 0


def test_a_choice_is_refused_with_what_can_be_chosen() -> None:
    with pytest.raises(
        SystemExit, match="FLOWKV_KV_DTYPE .*unknown value 'int8': choose one of auto, float32,"
    ):
        load_settings(NodeSettings, ["--model-path", "m", "--kv-dtype", "int8"], {})


@pytest.mark.parametrize("kind", KINDS)
def test_help_tells_of_each_setting(kind: type[ServiceSettings], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        load_settings(kind, ["--help"], {})
    assert ended.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    for setting in settings_of(kind):
        assert f"{setting.flag} " in told
        assert setting.text in told
        assert setting.variable in told
