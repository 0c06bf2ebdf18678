"""Who asks, as far as HTTP tells: the token, and an address that a caller cannot choose."""

from __future__ import annotations

import ipaddress
import json

import pytest

from signer.api.request import MAX_TOKEN, UNREADABLE, message_header, new_request_id, read_address, read_token
from signer.protocol import commands
from signer.protocol.commands import MAX_HEADER, split_message
from signer.settings import Proxies

PROXIES = Proxies((ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("::1/128")))


@pytest.mark.parametrize(
    "headers, token",
    [
        ({}, None),
        ({"HTTP_X_VAULT_TOKEN": "sgn_a"}, "sgn_a"),
        ({"HTTP_AUTHORIZATION": "Bearer sgn_b"}, "sgn_b"),
        ({"HTTP_AUTHORIZATION": "Bearer   sgn_b "}, "sgn_b"),
        ({"HTTP_X_VAULT_TOKEN": "sgn_a", "HTTP_AUTHORIZATION": "Bearer sgn_b"}, "sgn_a"),
        ({"HTTP_X_VAULT_TOKEN": "", "HTTP_AUTHORIZATION": "Bearer sgn_b"}, "sgn_b"),
        ({"HTTP_AUTHORIZATION": "bearer sgn_b"}, None),
        ({"HTTP_AUTHORIZATION": "Basic c2duX2I="}, None),
        ({"HTTP_AUTHORIZATION": "Bearer "}, None),
    ],
)
def test_the_token_is_vaults_header_or_else_the_bearer(headers: dict[str, str], token: str | None) -> None:
    assert read_token(headers) == token


@pytest.mark.parametrize("token", ["x" * (MAX_TOKEN + 1), "ü" * 50])
def test_a_text_that_can_be_no_token_still_fits_into_a_message(token: str) -> None:
    assert read_token({"HTTP_X_VAULT_TOKEN": token}) == UNREADABLE


@pytest.mark.parametrize(
    "peer, forwarded, address",
    [
        ("192.0.2.1", "", "192.0.2.1"),
        ("192.0.2.1", "198.51.100.9", "192.0.2.1"),  # not by way of a proxy: the header is the caller's own word
        ("10.0.0.1", "198.51.100.9", "198.51.100.9"),
        ("10.0.0.1", "203.0.113.5, 198.51.100.9", "198.51.100.9"),  # what stands before was sent by the caller
        ("10.0.0.1", "198.51.100.9, 10.0.0.2", "198.51.100.9"),
        ("10.0.0.1", "198.51.100.9, nonsense", None),
        ("10.0.0.1", "198.51.100.9, nonsense, 10.0.0.2", None),
        ("10.0.0.1", "198.51.100.9,", None),
        ("10.0.0.1", "", None),
        ("10.0.0.1", "10.0.0.2, 10.0.0.3", None),
        ("::1", "2001:db8::5", "2001:db8::5"),
        ("::ffff:10.0.0.1", "::ffff:198.51.100.9", "198.51.100.9"),
        ("10.0.0.1", "203.0.113.7:51022", "203.0.113.7"),  # as Azure's gateway writes it
        ("10.0.0.1", "[2001:db8::7]:51022", "2001:db8::7"),
        ("10.0.0.1", "[2001:db8::7]", "2001:db8::7"),
        ("10.0.0.1", "198.51.100.9, 10.0.0.2:80", "198.51.100.9"),
        ("10.0.0.1", "203.0.113.7:", None),
        ("10.0.0.1", "203.0.113.7:x", None),
        ("10.0.0.1", "203.0.113.7:510220", None),
        ("10.0.0.1", "2001:db8::7:51022:1:2:3:4", None),
        ("10.0.0.1", "[203.0.113.7:1", None),
        ("", "198.51.100.9", None),  # a unix socket, and nobody says whose
        ("10.0.0.1", "fe80::1%eth0", None),
    ],
)
def test_the_address_is_the_last_one_that_no_trusted_proxy_has(peer: str, forwarded: str, address: str | None) -> None:
    assert read_address({"REMOTE_ADDR": peer, "HTTP_X_FORWARDED_FOR": forwarded}, PROXIES) == address


@pytest.mark.parametrize(
    "entry, address",
    [("203.0.113.7:51022", "203.0.113.7"), ("[2001:db8::7]:51022", "2001:db8::7"), ("[2001:db8::7]", "2001:db8::7")],
)
def test_audit_f7_an_entry_with_a_port_is_an_address(entry: str, address: str) -> None:
    """As Azure's gateway writes them; from a proxy on a network and from one on a unix socket."""
    assert read_address({"REMOTE_ADDR": "10.0.0.1", "HTTP_X_FORWARDED_FOR": entry}, PROXIES) == address
    of_a_user = {"REMOTE_ADDR": "", "REMOTE_UID": 33, "HTTP_X_FORWARDED_FOR": entry}
    assert read_address(of_a_user, Proxies((), frozenset({33}))) == address


def test_a_text_too_long_for_an_address_is_none_and_is_not_remembered() -> None:
    commands._normalize_short.cache_clear()
    forwarded = "fe80::1%" + "x" * 4_096
    assert read_address({"REMOTE_ADDR": "10.0.0.1", "HTTP_X_FORWARDED_FOR": forwarded}, PROXIES) is None
    assert commands._normalize_short.cache_info().currsize == 1  # the proxy's own


@pytest.mark.parametrize(
    "user, forwarded, address",
    [
        (33, "198.51.100.9", "198.51.100.9"),
        (33, "203.0.113.5, 198.51.100.9, 10.0.0.2", "198.51.100.9"),
        (33, "", None),
        (1000, "198.51.100.9", None),
        (0, "198.51.100.9", None),
    ],
)
def test_audit_c2_on_a_unix_socket_only_a_named_user_is_a_proxy(user: int, forwarded: str, address: str | None) -> None:
    environ = {"REMOTE_ADDR": "", "REMOTE_UID": user, "HTTP_X_FORWARDED_FOR": forwarded}
    assert read_address(environ, Proxies(PROXIES.networks, frozenset({33}))) == address
    assert read_address(environ, PROXIES) is None


@pytest.mark.parametrize("peer, address", [("192.0.2.1", "192.0.2.1"), ("", None), ("::ffff:192.0.2.1", "192.0.2.1")])
def test_without_trusted_proxies_only_the_peer_counts(peer: str, address: str | None) -> None:
    assert read_address({"REMOTE_ADDR": peer, "HTTP_X_FORWARDED_FOR": "198.51.100.9"}, Proxies()) == address


def test_the_largest_header_fits_into_a_message_to_the_keeper() -> None:
    environ = {"HTTP_X_VAULT_TOKEN": "ÿ" * 8000, "HTTP_X_FORWARDED_FOR": "1" * 8000, "REMOTE_ADDR": "10.0.0.1"}
    line = json.dumps(message_header("sign", environ, PROXIES, new_request_id())).encode()
    assert len(line) < MAX_HEADER
    assert split_message(line + b"\nbody")[1] == b"body"


def test_request_ids_differ() -> None:
    assert len({new_request_id() for _ in range(100)}) == 100
