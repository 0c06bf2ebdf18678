"""What the keeper and the process that sends notices tell each other: notices one way, reports the other way.

One JSON object a message, on a SEQPACKET socket. Neither side trusts the other one's messages: the process that sends
notices talks to the Internet. Pure.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final, Literal

import msgspec

from signer.errors import BadFormat

MAX_MESSAGE: Final = 128 * 1024  # bytes: thousands whom a notice concerns; Linux sends 208 KiB at once by default
MAX_CHANNELS: Final = 16
KEPT_FOR: Final = 3_600  # seconds after which a notice is no longer sent
Topic = Literal["requests", "incidents", "freezes", "refusals", "health", "tokens"]
Urgency = Literal["low", "normal", "high", "urgent"]
State = Literal["sending", "sent", "failed", "dropped"]
ChannelKind = Literal["webhook", "ntfy", "slack", "mattermost"]


class Notice(msgspec.Struct, frozen=True, tag="notice", tag_field="message", forbid_unknown_fields=True):
    """What humans are told. `seq` is the ledger's event that it is made from, 0 for a state of the service.

    `concerns` names the asker and all who may approve; empty for everybody. `at` is in seconds since 1970. `details`
    are lines under the `title`; both are printable. The same event always has the same `id`.
    """

    id: str
    seq: int
    at: int
    topic: Topic
    kind: str
    title: str
    details: tuple[str, ...] = ()
    urgency: Urgency = "normal"
    request: str | None = None
    concerns: tuple[str, ...] = ()
    tells_age: bool = False


def state_notice(
    name: str,
    at: int,
    topic: Topic,
    kind: str,
    title: str,
    details: tuple[str, ...] = (),
    *,
    urgency: Urgency = "normal",
) -> Notice:
    """A notice of a state of the service, which no event of the ledger says."""
    return Notice(id=name, seq=0, at=at, topic=topic, kind=kind, title=title, details=details, urgency=urgency)


class Start(msgspec.Struct, frozen=True, tag="start", tag_field="message", forbid_unknown_fields=True):
    """The keeper's answer to a `Hello` without cursor: the newest event, which is not told any more."""

    seq: int


class ChannelFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the keeper knows of a channel: nothing secret. `people` are those who read it, `about` what they read."""

    name: str
    kind: ChannelKind
    people: tuple[str, ...] = ()
    about: tuple[Topic, ...] = ()

    def takes(self, topic: str, concerns: Collection[str]) -> bool:
        """Whether a notice goes to this channel; a channel without `people` gets what concerns anybody."""
        is_read = not concerns or not self.people or not set(self.people).isdisjoint(concerns)
        return topic in self.about and is_read


class Hello(msgspec.Struct, frozen=True, tag="hello", tag_field="message", forbid_unknown_fields=True):
    """The first message of the process that sends notices, repeated when its channels change.

    `cursor` is the newest event that all channels have; None if it has never been told one. `fault` says why there are
    no channels.
    """

    cursor: int | None
    channels: tuple[ChannelFacts, ...]
    fault: str = ""


class Report(msgspec.Struct, frozen=True, tag="report", tag_field="message", forbid_unknown_fields=True):
    """What became of a notice in one channel, where `queued` still wait; `error` says why it failed or was dropped."""

    channel: str
    state: State
    notice: str
    at: int
    queued: int
    request: str | None = None
    error: str = ""


class Told(msgspec.Struct, frozen=True, tag="told", tag_field="message", forbid_unknown_fields=True):
    """What became of a notice of a request in one channel so far; said again to a keeper that has just connected.

    `of` is the kind of the event that the notice is made from.
    """

    channel: str
    state: State
    notice: str
    at: int
    request: str
    of: str
    error: str = ""


ToSender = Notice | Start
ToKeeper = Hello | Report | Told
_encoder: Final = msgspec.json.Encoder()
_to_sender: Final = msgspec.json.Decoder(ToSender)
_to_keeper: Final = msgspec.json.Decoder(ToKeeper)


def encode(message: ToSender | ToKeeper) -> bytes:
    return _encoder.encode(message)


def read_for_sender(data: bytes) -> ToSender:
    """A message of the keeper's; raises `BadFormat`."""
    found: ToSender = _decode(_to_sender, data)
    return found


def read_for_keeper(data: bytes) -> ToKeeper:
    """A message of the process that sends notices; raises `BadFormat`."""
    found: ToKeeper = _decode(_to_keeper, data)
    if isinstance(found, Hello) and len(found.channels) > MAX_CHANNELS:
        raise BadFormat("bad_format", f"it has {len(found.channels)} channels; at most {MAX_CHANNELS} may be")
    return found


def _decode(decoder: msgspec.json.Decoder[Any], data: bytes) -> Any:
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadFormat("bad_format", f"it is not a message about notices: {error}") from None
