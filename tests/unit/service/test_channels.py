"""The file of channels, where a request may go, and what its body says."""

from __future__ import annotations

import base64
import hmac
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from signer.errors import BadFile, BadSettings
from signer.http import Watch
from signer.protocol.notices import MAX_MESSAGE, Hello, Notice, encode
from signer.service import channels
from signer.service.channels import (
    MAX_FILE,
    MAX_NTFY,
    Channel,
    Sender,
    is_forbidden,
    load_channels,
    parse_channels,
    parse_secret,
    render,
)
from tests.parts.receiver import KEY, SECRET

NOW = 1_800_000_000
HOOK = f'[channels.hook]\nkind = "webhook"\nurl = "https://hooks.example/s3cr3t"\nsecret = "{SECRET}"\n'
PHONE = '[channels.phone]\nkind = "ntfy"\nurl = "https://ntfy.example"\ntopic = "t0p1c"\ntoken = "tk_s3cr3t"\n'
NOTICE = Notice(
    id="n-7-abcdef01", seq=7, at=NOW - 12, topic="requests", kind="approval.given",
    title="prod for agent-7: approved by anna", details=("asked by agent-7, may approve: anna, ben",),
    request="r-aaaaaaaaaa", concerns=("agent-7", "anna", "ben"), tells_age=True,
)  # fmt: skip


def one(text: str) -> Channel:
    (channel,) = parse_channels(text.encode())
    return channel


def problems(text: str) -> str:
    with pytest.raises(BadFile) as refused:
        parse_channels(text.encode())
    assert "s3cr3t" not in str(refused.value.problems) + refused.value.text, "no problem contains a value"
    return "\n".join(refused.value.problems)


# --- the file --------------------------------------------------------------------------------------------------------


def test_each_kind_is_read_and_no_repr_has_a_secret() -> None:
    chat = '[channels.chat]\nkind = "slack"\nurl = "https://hooks.slack.example/s3cr3t"\npeople = ["anna"]\n'
    found = parse_channels((HOOK + PHONE + chat).encode())
    assert [(channel.name, channel.facts.kind) for channel in found] == [
        ("hook", "webhook"),
        ("phone", "ntfy"),
        ("chat", "slack"),
    ]
    assert found[0].key == KEY
    assert found[2].facts.people == ("anna",)
    assert "s3cr3t" not in repr(found)
    assert "t0p1c" not in repr(found)
    assert str(KEY) not in repr(found)


@pytest.mark.parametrize(
    "text, problem",
    [
        ("", "is empty: add a channel"),
        (HOOK.replace("https://hooks.example/", "http://hooks.example/"), "is plain http to another machine"),
        (HOOK.replace("hooks.example", "169.254.169.254"), "link-local, metadata or multicast"),
        (HOOK.replace("hooks.example", "[fe80::1]"), "link-local, metadata or multicast"),
        (HOOK.replace("hooks.example", "user:s3cr3t@hooks.example"), "without user and fragment"),
        (HOOK.replace("https:", "ftp:"), "is not an https address"),
        (HOOK.replace("hooks.example", "hooks..example"), "is not an https address"),
        (HOOK.replace("hooks.example", "h" * 64 + ".example"), "is not an https address"),
        (HOOK.replace(SECRET, "whsec_czNjcjN0"), "is not whsec_ and the base64 of 24 to 64 random bytes"),
        (HOOK.replace(f'secret = "{SECRET}"', ""), "is missing"),
        (HOOK + 'topic = "s3cr3t"\n', "is not a key of kind webhook"),
        (HOOK + "tokn = 1\n", "unknown key"),
        (HOOK + 'about = ["all"]\n', "must be 'requests', 'incidents'"),
        (HOOK + "people = []\n", "is empty"),
        (HOOK.replace("channels.hook", 'channels."Hook 1"'), "is not a name"),
        (HOOK.replace('"webhook"', '"mail"'), "must be 'webhook', 'ntfy', 'slack' or 'mattermost'"),
        (PHONE.replace("t0p1c", "a/b"), "is not a topic of ntfy"),
        (PHONE.replace("tk_s3cr3t", "s3cr3t\\r\\nX: y"), "is not one word"),
        (HOOK + 'ca_file = "tls/ca.pem"\n', "is not an absolute path"),
        ("\n".join(HOOK.replace("hook]", f"h{n}]") for n in range(17)), "has 17 channels; at most 16 may be"),
    ],
)
def test_a_bad_file_is_refused_with_the_reason(text: str, problem: str) -> None:
    assert problem in problems(text)


def test_channels_that_do_not_fit_in_one_message_are_refused() -> None:
    """The keeper could not read which channels there are, and would connect for ever."""
    quotes = '"' * (MAX_FILE - len(HOOK) - 20)  # each takes two bytes in a message
    many = HOOK + f"people = ['{quotes}']\n"
    assert "bytes with the names of people; at most" in problems(many)
    hello = Hello(cursor=None, channels=(one(HOOK + f"people = ['{quotes[:5_000]}']\n").facts,))
    assert len(encode(hello)) < MAX_MESSAGE


def test_a_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "notices.toml"
    file.write_text(HOOK)
    file.chmod(0o440)
    with pytest.raises(BadSettings, match="mode 0440, and it holds secrets") as refused:
        load_channels(file)
    assert refused.value.code == "notices_file_not_private"
    file.chmod(0o400)
    assert len(load_channels(file)) == 1
    with pytest.raises(BadSettings, match="No such file"):
        load_channels(tmp_path / "none")


def test_a_ca_file_that_this_user_cannot_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, authority = tmp_path / "notices.toml", tmp_path / "ca.pem"
    file.write_text(HOOK + f'ca_file = "{authority}"\n')
    file.chmod(0o400)
    for _ in range(2):  # without it, and with one of another user
        with pytest.raises(BadFile) as refused:
            load_channels(file)
        assert refused.value.problems == (f"line 5    {'channels.hook.ca_file':<36} cannot be read by this user",)
        authority.write_text("x")
        monkeypatch.setattr(channels.os, "access", lambda path, mode, **_: False)  # type: ignore[attr-defined]
    monkeypatch.undo()
    assert load_channels(file)[0].ca_file == authority


# --- where a request may go ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number, expected",
    [
        ("169.254.169.254", True), ("169.254.0.1", True), ("::ffff:169.254.169.254", True), ("fe80::1%eth0", True),
        ("64:ff9b::a9fe:a9fe", True), ("2002:a9fe:a9fe::1", True), ("fd00:ec2::254", True), ("100.100.100.200", True),
        ("0.0.0.0", True), ("::", True), ("224.0.0.1", True), ("ff02::1", True), ("255.255.255.255", True),
        ("127.0.0.1", False), ("::1", False), ("10.0.0.7", False), ("192.168.1.9", False), ("fd12::9", False),
        ("93.184.216.34", False), ("2606:2800:220:1::1", False), ("64:ff9b::5db8:d822", False),
    ],
)  # fmt: skip
def test_link_local_and_metadata_addresses_are_forbidden_in_every_spelling(number: str, expected: bool) -> None:
    assert is_forbidden(number) is expected


@pytest.fixture
def watch() -> Iterator[Watch]:
    made = Watch()
    yield made
    made.close()


def sender(url: str, watch: Watch, extra: str = "") -> Sender:
    text = f'[channels.hook]\nkind = "webhook"\nurl = "{url}"\nsecret = "{SECRET}"\n{extra}'
    return Sender(one(text), watch, None)


def resolve_to(monkeypatch: pytest.MonkeyPatch, *numbers: str) -> None:
    """Every name has these addresses."""
    monkeypatch.setattr(
        channels.socket,  # type: ignore[attr-defined]
        "getaddrinfo",
        lambda _host, port, *_: [
            (socket.AF_INET6 if ":" in number else socket.AF_INET, socket.SOCK_STREAM, 6, "", (number, port))
            for number in numbers
        ],
    )


def test_a_name_that_leads_to_a_metadata_address_is_not_connected_to(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve_to(monkeypatch, "169.254.169.254", "fe80::1")
    connected: list[object] = []
    monkeypatch.setattr(socket.socket, "connect", lambda _, place: connected.append(place))
    result = sender("https://rebound.example/s3cr3t", watch).send(NOTICE, NOW)
    assert "link-local, of a metadata service or multicast" in result.error
    assert connected == []


def test_plain_http_to_this_machine_is_not_sent_to_another_one(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to(monkeypatch, "192.0.2.1")
    connected: list[object] = []
    monkeypatch.setattr(socket.socket, "connect", lambda _, place: connected.append(place))
    assert "in the clear" in sender("http://localhost/s3cr3t", watch).send(NOTICE, NOW).error
    assert connected == []


def test_a_name_that_cannot_be_encoded_is_an_error_of_the_channel(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:

    def refuse(*_: object) -> None:
        "hooks..example".encode("idna")  # as getaddrinfo does, which unit tests must not call

    monkeypatch.setattr(channels.socket, "getaddrinfo", refuse)  # type: ignore[attr-defined]
    assert sender("https://hooks.example/s3cr3t", watch).send(NOTICE, NOW).error == "its name cannot be resolved"


# --- bodies ----------------------------------------------------------------------------------------------------------


def test_a_webhook_is_signed_as_standard_webhooks_says() -> None:
    """The vector of the specification's libraries: https://www.standardwebhooks.com."""
    key = parse_secret("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    name, at, body = "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}'
    headers = channels._signed(key, name, at, body)
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_a_webhook_has_plain_text_the_facts_and_the_consoles_page() -> None:
    body, headers = render(one(HOOK), NOTICE, "https://signer.example.org", NOW)
    shown = json.loads(body)
    assert shown["text"].splitlines() == [
        "prod for agent-7: approved by anna 12s ago",
        "asked by agent-7, may approve: anna, ben",
        "https://signer.example.org/console/requests/r-aaaaaaaaaa",
    ]
    assert shown["people"] == ["agent-7", "anna", "ben"]
    signed = b"n-7-abcdef01.%d." % NOW + body
    digest = base64.b64encode(hmac.new(KEY, signed, "sha256").digest()).decode()
    assert headers["webhook-signature"] == f"v1,{digest}"


def test_without_the_setting_no_message_has_an_address() -> None:
    for text in (HOOK, PHONE, HOOK.replace('"webhook"', '"slack"').replace(f'secret = "{SECRET}"', "")):
        body, _ = render(one(text), NOTICE, None, NOW)
        assert b"http" not in body


def test_ntfy_gets_title_message_priority_click_and_its_token() -> None:
    body, headers = render(one(PHONE), NOTICE, "https://signer.example.org", NOW)
    assert json.loads(body) == {
        "topic": "t0p1c",
        "title": "prod for agent-7: approved by anna 12s ago",
        "message": "asked by agent-7, may approve: anna, ben",
        "priority": 3,
        "click": "https://signer.example.org/console/requests/r-aaaaaaaaaa",
    }
    assert headers["Authorization"] == "Bearer tk_s3cr3t"
    assert "actions" not in json.loads(body), "a button would decide"


def test_a_message_for_ntfy_stays_a_message() -> None:
    long = Notice(**{**_fields(NOTICE), "details": ("é" * 300,) * 12})
    body, _ = render(one(PHONE), long, None, NOW)
    assert len(json.loads(body)["message"].encode()) <= MAX_NTFY


def _fields(notice: Notice) -> dict[str, Any]:
    return {name: getattr(notice, name) for name in notice.__struct_fields__}


def test_chats_get_no_mention_link_or_formatting_of_a_caller() -> None:
    evil = "<!channel> [click](x) *now* `x` @all & <https[:]//evil|here> ![i](y)"
    notice = Notice(**{**_fields(NOTICE), "details": (f"reason: {evil}",)})
    chat = '[channels.chat]\nkind = "{}"\nurl = "https://chat.example/hooks/1"\n'
    slack = json.loads(render(one(chat.format("slack")), notice, None, NOW)[0])
    assert "<" not in slack["text"]
    assert slack["mrkdwn"] is False
    mattermost = json.loads(render(one(chat.format("mattermost")), notice, None, NOW)[0])
    assert "\\[click\\](x) \\*now\\* \\`x\\` @\N{WORD JOINER}all" in mattermost["text"]


def test_every_notice_that_is_late_says_how_old_it_is() -> None:
    frozen = Notice(id="n-1-x", seq=1, at=NOW, topic="freezes", kind="freeze.set", title="all is frozen by anna")
    assert channels.message_title(frozen, NOW + 5) == "all is frozen by anna"
    assert channels.message_title(frozen, NOW + 600) == "all is frozen by anna 10m ago"
