"""Settings: every bad value is refused with its name, all problems at once, and a typing error is noticed."""

from __future__ import annotations

from pathlib import Path

import pytest

from signer.errors import BadSettings
from signer.settings import MAX_THREADS, MAX_WORKERS, SETTINGS, load_settings

TLS = {"SIGNER_TLS_CERT_FILE": "/etc/signer/tls.crt", "SIGNER_TLS_KEY_FILE": "/etc/signer/tls.key"}


def problems(**environ: str) -> tuple[str, ...]:
    with pytest.raises(BadSettings) as caught:
        load_settings(environ)
    assert caught.value.code == "settings_refused"
    return caught.value.problems


def test_nothing_said_is_the_documented_defaults() -> None:
    settings = load_settings({})
    assert [str(listen) for listen in settings.listen] == ["127.0.0.1:8222"]
    assert settings.policy_file == Path("/etc/signer/policy.toml")
    assert settings.ca_key_owner == "root:root"
    assert settings.mounts == ("ssh",)
    assert settings.socket == Path("/run/signer/keeper.sock")
    assert settings.warnings == ()


def test_an_empty_value_is_the_default() -> None:
    assert load_settings({name: "" for name, _, _ in SETTINGS}) == load_settings({})


@pytest.mark.parametrize(
    "name, value",
    [
        ("SIGNER_MODE", "vaultt"),
        ("SIGNER_POLICY_FILE", "policy.toml"),
        ("SIGNER_CA_KEY_FILE", "./ca"),
        ("SIGNER_CA_KEY_SOURCE", "Agent"),
        ("SIGNER_CA_KEY_SOURCE", "hsm"),
        ("SIGNER_CA_AGENT_SOCKET", "agent.sock"),
        ("SIGNER_CA_AGENT_SOCKET", "/" + "x" * 107),
        ("SIGNER_CA_KEY_OWNER", "root"),
        ("SIGNER_CA_KEY_OWNER", "root:root:root"),
        ("SIGNER_CA_KEY_OWNER", "ro ot:root"),
        ("SIGNER_DATA_DIR", "data"),
        ("SIGNER_RUN_DIR", "~/run"),
        ("SIGNER_LISTEN", "8222"),
        ("SIGNER_LISTEN", "127.0.0.1"),
        ("SIGNER_LISTEN", "127.0.0.1:0"),
        ("SIGNER_LISTEN", "127.0.0.1:65536"),
        ("SIGNER_LISTEN", "::1:8222"),
        ("SIGNER_LISTEN", "unix:run/api.sock"),
        ("SIGNER_LISTEN", "http://127.0.0.1:8222"),
        ("SIGNER_MOUNTS", "ssh,"),
        ("SIGNER_MOUNTS", "sys/x"),
        ("SIGNER_MOUNTS", "auth"),
        ("SIGNER_MOUNTS", "a b"),
        ("SIGNER_WORKERS", "0"),
        ("SIGNER_WORKERS", "-1"),
        ("SIGNER_WORKERS", "two"),
        ("SIGNER_WORKERS", str(MAX_WORKERS + 1)),
        ("SIGNER_THREADS", "1.5"),
        ("SIGNER_THREADS", "²"),
        ("SIGNER_THREADS", str(MAX_THREADS + 1)),
        ("SIGNER_CONSOLE_URL", "signer.example.org"),
        ("SIGNER_CONSOLE_URL", "ftp://signer.example.org"),
        ("SIGNER_CONSOLE_URL", "https://user@signer.example.org"),
        ("SIGNER_CONSOLE_URL", "https://signer.example.org/?next=x"),
        ("SIGNER_CONSOLE_URL", "https://signer.example.org/a b"),
        ("SIGNER_CONSOLE_URL", "https://[::1"),
        ("SIGNER_NOTICES_FILE", "notices.toml"),
        ("SIGNER_NOTICES_DIR", "notices"),
        ("SIGNER_NOTICES_DIR", "/" + "x" * 100),
        ("SIGNER_TRUSTED_PROXIES", "10.0.0.0/33"),
        ("SIGNER_TRUSTED_PROXIES", "10.0.0.1/8"),
        ("SIGNER_TRUSTED_PROXIES", "proxy.example"),
    ],
)
def test_a_bad_value_is_refused_by_name(name: str, value: str) -> None:
    (problem,) = problems(**{name: value})
    assert problem.startswith(f"{name}: ")


@pytest.mark.parametrize("given", ["SIGNER_TLS_CERT_FILE", "SIGNER_TLS_KEY_FILE"])
def test_half_of_tls_is_refused_and_the_other_half_named(given: str) -> None:
    (missing,) = set(TLS) - {given}
    assert problems(**{given: TLS[given]}) == (f"{missing}: is missing beside {given}",)


def test_a_relative_tls_path_is_refused_whichever_it_is() -> None:
    found = problems(SIGNER_TLS_CERT_FILE="tls.crt", SIGNER_TLS_KEY_FILE="tls.key")
    assert [problem.partition(":")[0] for problem in found] == ["SIGNER_TLS_CERT_FILE", "SIGNER_TLS_KEY_FILE"]


def test_all_problems_are_told_at_once() -> None:
    wrong = {"SIGNER_MODE": "x", "SIGNER_DATA_DIR": "x", "SIGNER_LISTEN": "x", "SIGNER_THREADS": "x"}
    assert [problem.partition(":")[0] for problem in problems(**wrong)] == list(wrong)
    with pytest.raises(BadSettings, match="the settings have 4 problems"):
        load_settings(wrong)


@pytest.mark.parametrize("mode", ["vault", "shadow"])
def test_where_vault_signs_its_settings_are_needed_and_both_are_told_at_once(mode: str) -> None:
    assert problems(SIGNER_MODE=mode, SIGNER_WORKERS="0") == (
        "SIGNER_WORKERS: '0' is not a whole number from 1 to 32",
        f"SIGNER_VAULT_ADDR: is missing, and mode {mode} needs it",
        f"SIGNER_VAULT_TOKEN_FILE: is missing, and mode {mode} needs it",
    )


def test_each_mode_knows_what_it_needs() -> None:
    vault = {"SIGNER_VAULT_ADDR": "http://127.0.0.1:8200", "SIGNER_VAULT_TOKEN_FILE": "/token"}
    found = {mode: load_settings({"SIGNER_MODE": mode, **vault}) for mode in ("local", "vault", "shadow")}
    assert {mode: (told.has_ca_key, told.asks_vault) for mode, told in found.items()} == {
        "local": (True, False),
        "vault": (False, True),
        "shadow": (True, True),
    }


@pytest.mark.parametrize("listen", ["0.0.0.0:8222", "[::]:8222", "192.0.2.7:8222", "signer.example:8222"])
def test_listening_beyond_loopback_needs_tls_or_proxies(listen: str) -> None:
    (problem,) = problems(SIGNER_LISTEN=listen)
    assert problem == (
        f"SIGNER_LISTEN: {listen} is beyond loopback, which would send tokens in the clear;"
        " set SIGNER_TLS_CERT_FILE and SIGNER_TLS_KEY_FILE, or SIGNER_TRUSTED_PROXIES"
    )
    for more in (TLS, {"SIGNER_TRUSTED_PROXIES": "10.0.0.0/8"}):
        assert [str(one) for one in load_settings({"SIGNER_LISTEN": listen, **more}).listen] == [listen]
    (problem,) = problems(SIGNER_LISTEN=f"127.0.0.1:1,{listen}")
    assert problem.startswith(f"SIGNER_LISTEN: {listen} is beyond loopback")


@pytest.mark.parametrize("proxies", ["0.0.0.0/0", "::/0", "10.0.0.0/8,0.0.0.0/0", "0.0.0.0/1,128.0.0.0/1", "8000::/1"])
def test_audit_c3_everybody_is_no_proxy(proxies: str) -> None:
    (problem,) = problems(SIGNER_LISTEN="0.0.0.0:8222", SIGNER_TRUSTED_PROXIES=proxies)
    assert problem.startswith("SIGNER_LISTEN: 0.0.0.0:8222 is beyond loopback")


def test_several_addresses_are_listened_on_and_none_twice() -> None:
    text = "127.0.0.1:8222, [::1]:8222 ,unix:/run/a"
    assert [str(one) for one in load_settings({"SIGNER_LISTEN": text}).listen] == [
        "127.0.0.1:8222", "[::1]:8222", "unix:/run/a",
    ]  # fmt: skip
    (problem,) = problems(SIGNER_LISTEN="127.0.0.1:1,127.0.0.1:1")
    assert problem == "SIGNER_LISTEN: an address is listed twice"
    (problem,) = problems(SIGNER_LISTEN="127.0.0.1:1,")
    assert problem.startswith("SIGNER_LISTEN: '' is not host:port")


@pytest.mark.parametrize("listen", ["127.0.0.1:1", "127.8.8.8:65535", "[::1]:8222", "localhost:8222", "unix:/run/a"])
def test_listening_where_nobody_elsewhere_reaches_needs_nothing(listen: str) -> None:
    assert [str(one) for one in load_settings({"SIGNER_LISTEN": listen}).listen] == [listen]


def test_an_unknown_setting_is_warned_about_with_the_nearest_name() -> None:
    warnings = load_settings({"SIGNER_POLICYFILE": "/x", "SIGNER_XYZ": "1", "SIGNERX": "1", "PATH": "/bin"}).warnings
    assert warnings == (
        "SIGNER_POLICYFILE is not a setting, did you mean SIGNER_POLICY_FILE",
        "SIGNER_XYZ is not a setting",
    )


def test_lists_lose_their_blanks_and_slashes() -> None:
    settings = load_settings({"SIGNER_MOUNTS": "ssh , /ssh-client/", "SIGNER_TRUSTED_PROXIES": "10.0.0.0/8, ::1"})
    assert settings.mounts == ("ssh", "ssh-client")
    assert [str(network) for network in settings.trusted_proxies] == ["10.0.0.0/8", "::1/128"]


def test_a_long_value_is_not_repeated_whole() -> None:
    for name in ("SIGNER_MODE", "SIGNER_LISTEN", "SIGNER_POLICY_FILE", "SIGNER_WORKERS"):
        (problem,) = problems(**{name: "x" * 5000})
        assert len(problem) < 250


@pytest.mark.parametrize(
    "mode, source, local, file",
    [
        ("local", "", True, True),
        ("local", "file", True, True),
        ("local", "agent", True, False),
        ("shadow", "file", True, True),
        ("shadow", "agent", True, False),
        ("vault", "file", False, False),
        ("vault", "agent", False, False),
    ],
)
def test_the_key_file_is_read_where_a_local_key_is_needed_and_no_agent_has_it(
    mode: str, source: str, local: bool, file: bool
) -> None:
    vault = {"SIGNER_VAULT_ADDR": "http://127.0.0.1:9", "SIGNER_VAULT_TOKEN_FILE": "/token"}
    settings = load_settings({"SIGNER_MODE": mode, "SIGNER_CA_KEY_SOURCE": source, **vault})
    assert (settings.has_ca_key, settings.reads_key_file) == (local, file)


def test_the_socket_of_an_agent_may_be_as_long_as_the_kernel_allows() -> None:
    path = "/" + "x" * 106
    assert str(load_settings({"SIGNER_CA_AGENT_SOCKET": path}).ca_agent_socket) == path


def test_proxies_on_a_unix_socket_are_users_by_name_or_number() -> None:
    assert load_settings({"SIGNER_TRUSTED_PROXY_USERS": "root, 33"}).proxies.users == {0, 33}
    (problem,) = problems(SIGNER_TRUSTED_PROXY_USERS="nosuchuser")
    assert problem == "SIGNER_TRUSTED_PROXY_USERS: there is no user 'nosuchuser' on this host"


@pytest.mark.parametrize("text", ["https://s.example/x", "https://s.example/x/", "https://s.example/x/console"])
def test_the_consoles_address_is_one_whatever_its_end(text: str) -> None:
    assert load_settings({"SIGNER_CONSOLE_URL": text}).console_url == "https://s.example/x"


def test_the_user_that_sends_notices_counts_only_with_channels() -> None:
    named = {"SIGNER_KEEPER_USER": "a", "SIGNER_API_USER": "b", "SIGNER_NOTICES_USER": "c"}
    assert load_settings(named).users == {"SIGNER_KEEPER_USER": "a", "SIGNER_API_USER": "b"}
    assert load_settings({**named, "SIGNER_NOTICES_FILE": "/etc/n.toml"}).users == named
    assert load_settings({}).notices_socket == Path("/var/lib/signer-notices/notices.sock")
