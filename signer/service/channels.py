"""Channels by which humans are told: the file that names them, and one HTTP request for each notice.

The file holds addresses, keys and tokens that are secrets; no error and no repr contains any of them. Runs in the
process that sends notices, and in `signer notices test`.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import json
import os
import re
import socket
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple, get_args
from urllib.parse import urlsplit

import requests
from pydantic import Field

from signer.address import check_peer, check_url
from signer.errors import BadSettings, Refused, SignerError
from signer.files import read_bounded
from signer.http import CONNECT_WITHIN, Watch, new_session
from signer.protocol import notices
from signer.toml import Faults, Names, Place, Table, parse_toml
from signer.units import render_span, timestamp

MAX_FILE: Final = 64 * 1024  # bytes
DEADLINE: Final = 5.0  # seconds for one request, after the name was looked up
MAX_FACTS: Final = notices.MAX_MESSAGE - 1024  # bytes that the keeper is told of all channels; the rest is for a fault
MAX_ANSWER: Final = 4096  # bytes that are read of an answer; none of them is shown
MAX_SECRET: Final = 64  # bytes; MIN_SECRET and the form are those of Standard Webhooks
MIN_SECRET: Final = 24
SECRET_PREFIX: Final = "whsec_"  # noqa: S105 - what every such key begins with
OLD_AFTER: Final = 60  # seconds after which every notice says how old it is
MAX_NTFY: Final = 3_800  # bytes of a message; ntfy makes an attachment of one that has more than 4,096
SIGNATURE_VERSION: Final = "v1"
TOPICS: Final[tuple[notices.Topic, ...]] = get_args(notices.Topic)
_KINDS: Final[tuple[notices.ChannelKind, ...]] = get_args(notices.ChannelKind)
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}", re.ASCII)
_TOPIC: Final = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)  # as ntfy has it
_WORD: Final = re.compile(r"[!-~]{1,512}", re.ASCII)
_PRIORITIES: Final = {"low": 2, "normal": 3, "high": 4, "urgent": 5}  # of ntfy
# Which keys each kind needs, besides kind and url, and which it may have.
_KEYS: Final[Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "webhook": (("secret",), ()),
    "ntfy": (("topic",), ("token",)),
    "slack": ((), ()),
    "mattermost": ((), ()),
}
_COMMON: Final = ("kind", "url", "ca_file", "people", "about")


# --- the file ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Channel:
    """A channel of the file. `key` is that of a webhook's signature, `token` a bearer token for ntfy."""

    facts: notices.ChannelFacts
    url: str = field(repr=False)
    ca_file: Path | None = None
    key: bytes = field(default=b"", repr=False)
    topic: str = field(default="", repr=False)
    token: str = field(default="", repr=False)

    @property
    def name(self) -> str:
        return self.facts.name


class _ChannelTable(Table):
    kind: notices.ChannelKind | None = None
    url: str = ""
    secret: str = ""
    topic: str = ""
    token: str = ""
    ca_file: str = ""
    people: Names = Field(default_factory=list)
    about: Annotated[list[notices.Topic], Field(min_length=1)] = Field(default_factory=lambda: list(TOPICS))


class _FileTable(Table):
    channels: dict[str, Any] = Field(default_factory=dict)


def load_channels(path: Path) -> tuple[Channel, ...]:
    """The channels of a file that only this user may read; raises `BadSettings` or `BadFile`, with every problem."""
    return parse_channels(read_channels_file(path))


def read_channels_file(path: Path) -> bytes:
    """The content of SIGNER_NOTICES_FILE; raises `BadSettings` if others may read it, or this user may not."""
    try:
        return read_bounded(path, MAX_FILE, check=_check_private)
    except OSError as error:
        raise BadSettings(
            "notices_file_unreadable",
            f"SIGNER_NOTICES_FILE cannot be opened: {error.strerror}",
            "give the file to the user of SIGNER_NOTICES_USER, mode 0400",
        ) from None


def _check_private(facts: os.stat_result) -> None:
    if not stat.S_ISREG(facts.st_mode) or facts.st_mode & 0o077:
        raise BadSettings(
            "notices_file_not_private",
            f"SIGNER_NOTICES_FILE has mode {stat.S_IMODE(facts.st_mode):04o}, and it holds secrets",
            "give the file to the user of SIGNER_NOTICES_USER, mode 0400",
        )


def parse_channels(raw: bytes) -> tuple[Channel, ...]:
    """The channels of a file's content; raises `BadFile` with every problem, such as a `ca_file` that this user cannot
    read. No problem contains a value."""
    faults = Faults("notices_file_refused", "notices.toml", "see runbooks/operate/notices.md for its form")
    data = parse_toml(raw, MAX_FILE, faults)
    table = faults.table(_FileTable, (), data)
    found = [_parse_channel(name, value, faults) for name, value in table.channels.items()]
    if not table.channels:
        faults.add(("channels",), "is empty: add a channel, or unset SIGNER_NOTICES_FILE to send no notices")
    if len(found) > notices.MAX_CHANNELS:
        faults.add(("channels",), f"has {len(found)} channels; at most {notices.MAX_CHANNELS} may be")
    channels = tuple(channel for channel in found if channel is not None)
    size = len(notices.encode(notices.Hello(cursor=2**62, channels=tuple(channel.facts for channel in channels))))
    if size > MAX_FACTS:
        text = f"take {size:,} bytes with the names of people; at most {MAX_FACTS:,} may be: name fewer people"
        faults.add(("channels",), text)
    faults.check()
    return channels


def _parse_channel(name: str, value: object, faults: Faults) -> Channel | None:
    place: Place = ("channels", name)
    before = len(faults.found)
    table = faults.table(_ChannelTable, place, value)
    if _NAME.fullmatch(name) is None:
        faults.add(place, "is not a name: 1 to 32 of a-z, 0-9, _ and -, not beginning with _ or -")
    faults.require(place, value, "kind", "url")
    if table.kind is not None and isinstance(value, dict):
        needed, optional = _KEYS[table.kind]
        faults.require(place, value, *needed)
        for key in value.keys() - {*_COMMON, *needed, *optional} & _ChannelTable.model_fields.keys():
            faults.add((*place, key), f"is not a key of kind {table.kind}")
    for of, check in _CHECKS.items():
        if text := getattr(table, of):
            try:
                check(text)
            except ValueError as error:
                faults.add((*place, of), str(error))
    if len(faults.found) > before or table.kind is None:
        return None
    return Channel(
        facts=notices.ChannelFacts(name, table.kind, tuple(table.people), tuple(table.about)),
        url=table.url,
        ca_file=Path(table.ca_file) if table.ca_file else None,
        key=parse_secret(table.secret) if table.secret else b"",
        topic=table.topic,
        token=table.token,
    )


def parse_secret(text: str) -> bytes:
    """The key of a webhook, `whsec_` and base64; raises `ValueError`."""
    try:
        key = base64.b64decode(text.removeprefix(SECRET_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not text.startswith(SECRET_PREFIX) or not MIN_SECRET <= len(key) <= MAX_SECRET:
        raise ValueError(f"is not {SECRET_PREFIX} and the base64 of {MIN_SECRET} to {MAX_SECRET} random bytes")
    return key


def _check_address(text: str) -> None:
    try:
        url = urlsplit(text)
        has_user, _ = url.username is not None, url.port
        (url.hostname or "").encode("idna")  # as a look-up does
        check_url(text, "it")
    except BadSettings as error:
        raise ValueError("is plain http to another machine" if error.code == "token_in_clear" else "is not an https"
                         " address") from None  # fmt: skip
    except ValueError:
        raise ValueError("is not an https address") from None
    if has_user or url.fragment or not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError("is not an https address without user and fragment")
    check_number(url.hostname or "")


def _check_form(form: re.Pattern[str], otherwise: str, text: str) -> None:
    if form.fullmatch(text) is None:
        raise ValueError(otherwise)


def _check_path(text: str) -> None:
    if not Path(text).is_absolute():
        raise ValueError("is not an absolute path")
    if not os.access(text, os.R_OK, effective_ids=True):
        raise ValueError("cannot be read by this user")


_CHECKS: Final[Mapping[str, Callable[[str], object]]] = {
    "url": _check_address,
    "topic": partial(_check_form, _TOPIC, "is not a topic of ntfy: 1 to 64 of A-Z, a-z, 0-9, _ and -"),
    "token": partial(_check_form, _WORD, "is not one word of printable ASCII"),
    "ca_file": _check_path,
    "secret": parse_secret,
}


# --- where a request may go -------------------------------------------------------------------------------------------

# Where clouds answer questions about a machine, credentials included, besides the link-local networks.
_METADATA: Final = frozenset(
    ipaddress.ip_address(number)
    for number in ("100.100.100.200", "168.63.129.16", "192.0.0.192", "fd00:ec2::254", "fd20:ce::254")
)
_NAT64: Final = ipaddress.ip_network("64:ff9b::/96")
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def is_forbidden(number: str) -> bool:
    """True for an IP address that no notice is sent to: link-local, metadata services, multicast, unspecified."""
    address = ipaddress.ip_address(number.partition("%")[0])
    return any(
        one.is_link_local or one.is_multicast or one.is_unspecified or one in _METADATA
        or (one.is_reserved and not one.is_loopback and one not in _NAT64)
        for one in _meant(address)
    )  # fmt: skip


def _meant(address: _Address) -> Iterator[_Address]:
    """The address, and the IPv4 address that it stands for (mapped, 6to4, Teredo, NAT64)."""
    if isinstance(address, ipaddress.IPv4Address):
        yield address
        return
    if address.ipv4_mapped is not None:  # which the kernel uses instead
        yield address.ipv4_mapped
        return
    yield address
    if address.sixtofour is not None:
        yield address.sixtofour
    if address.teredo is not None:
        yield from address.teredo
    if address in _NAT64:
        yield ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)


def check_number(host: str) -> None:
    """Raises `ValueError` for a number that is forbidden; names are checked when they are resolved."""
    try:
        forbidden = is_forbidden(host)
    except ValueError:
        return
    if forbidden:
        raise ValueError("is a link-local, metadata or multicast address, which no notice is sent to")


def _open_socket(scheme: str, host: str, port: int, seconds: float) -> socket.socket:
    """Connects to an address of the host that was checked, and to no other; raises `OSError` or `Refused`."""
    try:
        places = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)
    except UnicodeError:  # an empty or too long part of the name
        raise socket.gaierror(socket.EAI_NONAME, "the name is malformed") from None
    allowed = [place for place in places if not is_forbidden(str(place[4][0]))]
    if not allowed:
        raise Refused("notice_address_refused", "its address is link-local, of a metadata service or multicast")
    failure: OSError | None = None
    for family, kind, protocol, _, address in allowed[:4]:
        check_peer(scheme, str(address[0]), "it")
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(seconds)
            sock.connect(address)
            return sock
        except OSError as error:
            sock.close()
            failure = error
    assert failure is not None, "there was an address"  # noqa: S101
    raise failure


# --- one request ------------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """What became of one attempt; `error` is empty if the channel took the notice. `is_final`: it never will."""

    error: str
    is_final: bool = False


class Sender:
    """Sends notices to one channel, from one thread, each over its own connection."""

    def __init__(self, channel: Channel, watch: Watch, console: str | None) -> None:
        self._channel = channel
        self._watch = watch
        self._console = console
        url = urlsplit(channel.url)
        scheme, host = url.scheme, url.hostname or ""
        port = url.port or (443 if scheme == "https" else 80)

        def connect(seconds: float) -> socket.socket:
            return _open_socket(scheme, host, port, min(seconds, CONNECT_WITHIN))

        self._session = new_session(channel.ca_file, MAX_ANSWER, connect, cuts_body=True)
        self._session.headers["Connection"] = "close"  # the name is looked up, and its address checked, each time

    def close(self) -> None:
        self._session.close()

    def send(self, notice: notices.Notice, now: int) -> Result:
        """One attempt; never raises. `now` is in seconds since 1970."""
        body, headers = render(self._channel, notice, self._console, now)
        try:
            with self._watch.within(DEADLINE):
                response = self._session.post(self._channel.url, data=body, headers=headers, allow_redirects=False)
        except SignerError as refusal:
            return Result(refusal.text)
        except (requests.exceptions.RequestException, OSError) as error:
            return Result(_reason(error))
        return _judge(response.status_code)


def _judge(status: int) -> Result:
    if 200 <= status < 300:
        return Result("")
    if 300 <= status < 400:
        return Result(f"it answers {status}, a redirect, and none is followed")
    # What is wrong with one message is not wrong with the next one.
    return Result(f"it answers {status}", is_final=status in (400, 413, 422))


def _reason(error: Exception) -> str:
    """Why a request failed, in words that contain no part of the address."""
    if isinstance(error, requests.exceptions.SSLError):
        return "its TLS certificate is not trusted"
    if isinstance(error, requests.exceptions.Timeout):
        return f"it did not answer within {DEADLINE:.0f} s"
    inner: BaseException | None = error
    for _ in range(8):
        if isinstance(inner, socket.gaierror):
            return "its name cannot be resolved"
        if isinstance(inner, ConnectionRefusedError):
            return "the connection was refused"
        if inner is None:
            break
        inner = inner.__cause__ or inner.__context__
    return "the connection failed"


# --- bodies -----------------------------------------------------------------------------------------------------------


def message_title(notice: notices.Notice, now: int) -> str:
    """The first line, with its age where that matters."""
    age = max(now - notice.at, 0)
    return f"{notice.title} {render_span(age)} ago" if notice.tells_age or age >= OLD_AFTER else notice.title


def link_of(notice: notices.Notice, console: str | None) -> str | None:
    """The console's page for a notice; None without SIGNER_CONSOLE_URL."""
    if console is None:
        return None
    page = f"/requests/{notice.request}" if notice.request is not None else _PAGES.get(notice.topic, "")
    return f"{console}/console{page}"


_PAGES: Final = {"incidents": "/incidents", "freezes": "/freezes", "tokens": "/people", "refusals": "/ledger"}


def render(channel: Channel, notice: notices.Notice, console: str | None, now: int) -> tuple[bytes, dict[str, str]]:
    """Body and headers of one attempt at `now`, in seconds since 1970."""
    title, link = message_title(notice, now), link_of(notice, console)
    lines, links = (title, *notice.details), [] if link is None else [link]
    match channel.facts.kind:
        case "webhook":
            body = _webhook_body(notice, title, link)
            return body, _signed(channel.key, notice.id, now, body)
        case "ntfy":
            shown: dict[str, object] = {
                "topic": channel.topic,
                "title": title,
                "message": _cut("\n".join(notice.details) or title, MAX_NTFY),
                "priority": _PRIORITIES[notice.urgency],
            }
            if link is not None:
                shown["click"] = link
            headers = {"Authorization": f"Bearer {channel.token}"} if channel.token else {}
            return _json(shown), {**_JSON_HEADERS, **headers}
        case "slack":
            text = "\n".join([*map(_escape_slack, lines), *links])
            return _json({"text": text, "mrkdwn": False}), _JSON_HEADERS
    return _json({"text": "\n".join([*map(_escape_markdown, lines), *links])}), _JSON_HEADERS


_JSON_HEADERS: Final = {"Content-Type": "application/json", "User-Agent": "signer"}


def _json(value: Mapping[str, object]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


def _webhook_body(notice: notices.Notice, title: str, link: str | None) -> bytes:
    shown: dict[str, object] = {
        "id": notice.id,
        "type": notice.kind,
        "timestamp": timestamp(notice.at),
        "topic": notice.topic,
        "urgency": notice.urgency,
        "text": "\n".join([title, *notice.details, *([link] if link else [])]),
        "title": notice.title,
        "details": list(notice.details),
        "request": notice.request,
        "people": list(notice.concerns),
    }
    return _json(shown if link is None else {**shown, "url": link})


def _signed(key: bytes, name: str, now: int, body: bytes) -> dict[str, str]:
    """The headers of Standard Webhooks 1.0: an HMAC over id, time of this attempt and body."""
    digest = hmac.digest(key, f"{name}.{now}.".encode() + body, sha256)
    return {
        **_JSON_HEADERS,
        "webhook-id": name,
        "webhook-timestamp": str(now),
        "webhook-signature": f"{SIGNATURE_VERSION},{base64.b64encode(digest).decode()}",
    }


def _escape_slack(text: str) -> str:
    """Without mentions, links and formatting: the three characters that Slack reads, escaped."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


_MARKDOWN: Final = re.compile(r"([\\`*_\[\]~|])")  # no line begins with a caller's text


def _escape_markdown(text: str) -> str:
    """Without formatting, links, images and mentions: what Mattermost reads inside a line, escaped."""
    return _MARKDOWN.sub(r"\\\1", text).replace("@", "@\N{WORD JOINER}")


def _cut(text: str, limit: int) -> str:
    """At most `limit` bytes of UTF-8."""
    return text.encode(errors="replace")[:limit].decode(errors="ignore")


def trial_notice(now: int) -> notices.Notice:
    """What `signer notices test` sends."""
    name, detail = f"test-{now}-{time.monotonic_ns() % 10**6}", "nothing has happened, and nothing is to be done"
    return notices.state_notice(name, now, "health", "test", "a test of signer's notices", (detail,))
