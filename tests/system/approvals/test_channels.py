"""One request to a channel, against a receiver on loopback that answers badly: what the sender makes of it."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from signer.http import Watch
from signer.protocol.notices import Notice
from signer.service import channels
from signer.service.channels import Sender, parse_channels
from tests.parts.receiver import SECRET, Receiver
from tests.parts.selfsigned import write_certificate

NOW = 1_800_000_000
NOTICE = Notice(id="n-7-abcdef01", seq=7, at=NOW, topic="requests", kind="approval.given", title="approved by anna")


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


@pytest.fixture(scope="module")
def watch() -> Iterator[Watch]:
    made = Watch()
    yield made
    made.close()


def sender(url: str, watch: Watch, extra: str = "") -> Sender:
    text = f'[channels.hook]\nkind = "webhook"\nurl = "{url}"\nsecret = "{SECRET}"\n{extra}'
    (channel,) = parse_channels(text.encode())
    return Sender(channel, watch, None)


@pytest.mark.parametrize(
    "status, error, is_final",
    [
        (200, "", False),
        (204, "", False),
        (500, "it answers 500", False),
        (429, "it answers 429", False),
        (404, "it answers 404", False),
        (413, "it answers 413", True),
    ],
)
def test_an_answer_says_whether_to_try_again(
    receiver: Receiver, watch: Watch, status: int, error: str, is_final: bool
) -> None:
    receiver.status = status
    result = sender(f"{receiver.url}/hook", watch).send(NOTICE, NOW)
    assert (result.error, result.is_final) == (error, is_final)


def test_a_redirect_is_not_followed(receiver: Receiver, watch: Watch) -> None:
    receiver.status, receiver.headers = 302, {"Location": f"{receiver.url}/elsewhere"}
    assert "a redirect, and none is followed" in sender(f"{receiver.url}/hook", watch).send(NOTICE, NOW).error
    assert [got.path for got in receiver.got] == ["/hook"]


def test_a_long_answer_is_not_read_to_its_end_and_the_notice_counts_as_taken(receiver: Receiver, watch: Watch) -> None:
    receiver.body = b"x" * 10_000_000
    assert sender(f"{receiver.url}/hook", watch).send(NOTICE, NOW).error == ""


def test_a_channel_that_hangs_is_given_up_at_the_deadline(
    receiver: Receiver, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channels, "DEADLINE", 0.1)
    wait = threading.Event()
    receiver.before = wait.wait
    try:
        assert sender(f"{receiver.url}/hook", watch).send(NOTICE, NOW).error.startswith("it did not answer within")
    finally:
        wait.set()


def test_tls_is_verified_with_the_name_and_the_ca_file_alone(watch: Watch, tmp_path: Path) -> None:
    certificate, key = write_certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    receiver = Receiver()
    receiver._server.socket = context.wrap_socket(receiver._server.socket, server_side=True)
    port = receiver.url.rpartition(":")[2]
    try:
        own = f'ca_file = "{certificate}"\n'
        assert sender(f"https://localhost:{port}/hook", watch, own).send(NOTICE, NOW).error == ""
        refused = "its TLS certificate is not trusted"
        assert sender(f"https://localhost:{port}/hook", watch).send(NOTICE, NOW).error == refused
        assert sender(f"https://127.0.0.1:{port}/hook", watch, own).send(NOTICE, NOW).error == refused
        assert len(receiver.got) == 1
    finally:
        receiver.close()


def test_no_error_has_a_part_of_the_address(watch: Watch) -> None:
    result = sender("http://127.0.0.1:1/s3cr3t?k=s3cr3t", watch).send(NOTICE, NOW)
    assert result.error
    assert "s3cr3t" not in result.error
