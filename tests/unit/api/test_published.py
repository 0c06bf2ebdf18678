"""What hosts fetch: exactly the published bytes, 304 where they did not change, and who fetched is passed on."""

from __future__ import annotations

import asyncio
import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from signer.api.published import FILES, MAX_UNREPORTED, FetchReports, PublishedFiles
from signer.api.vault.responses import HttpResponse
from signer.errors import Unavailable
from signer.protocol.commands import MAX_FETCHES, MAX_HEADER, read_fetches
from signer.ssh.krl import MAX_LIST, RevocationList, encode_krl

pytestmark = pytest.mark.unix_socket  # the event loop has a pair


def ask(files: PublishedFiles, name: str, etag: str = "") -> HttpResponse:
    environ = {"REQUEST_METHOD": "GET", "RAW_PATH": f"/api/{name}"}
    assert files.name_of(environ) == name
    return files.response(name, {**environ, "HTTP_IF_NONE_MATCH": etag} if etag else environ)


@pytest.fixture
def files(tmp_path: Path) -> PublishedFiles:
    for name in FILES:
        (tmp_path / name).write_text(f"content of {name}")
    (tmp_path / "krl").write_bytes(encode_krl(RevocationList(12, 0)))
    return PublishedFiles(tmp_path)


def test_each_file_is_served_as_it_is(files: PublishedFiles, tmp_path: Path) -> None:
    for name, (content_type, _) in FILES.items():
        status, headers, body = ask(files, name)
        assert (status, body) == (200, (tmp_path / name).read_bytes())
        assert dict(headers)["Content-Type"] == content_type
        assert dict(headers)["ETag"] == f'"{sha256(body).hexdigest()}"'
        assert dict(headers).get("Signer-List-Version") == ("12" if name == "krl" else None)


def test_a_list_that_the_host_has_is_not_sent(files: PublishedFiles) -> None:
    etag = dict(ask(files, "krl").headers)["ETag"]
    for sent in (etag, f"W/{etag}", f'"other", {etag}'):
        status, headers, body = ask(files, "krl", sent)
        assert (status, body, dict(headers)["Signer-List-Version"]) == (304, b"", "12")
    for sent in ("*", '"other"', etag.strip('"'), etag.upper(), "x" * 2000 + etag):
        assert ask(files, "krl", sent).status == 200


def test_a_file_that_is_replaced_is_read_again(files: PublishedFiles, tmp_path: Path) -> None:
    ask(files, "krl")
    (tmp_path / "new").write_bytes(encode_krl(RevocationList(13, 0)))
    (tmp_path / "new").rename(tmp_path / "krl")
    assert dict(ask(files, "krl").headers)["Signer-List-Version"] == "13"


@pytest.mark.parametrize("content", [None, b"", b"SSHKRL", b"x" * 100])
def test_without_a_list_hosts_are_told_to_come_again(
    files: PublishedFiles, tmp_path: Path, content: bytes | None
) -> None:
    (tmp_path / "krl").unlink()
    if content is not None:
        (tmp_path / "krl").write_bytes(content)
    status, headers, body = ask(files, "krl")
    assert (status, json.loads(body)["code"]) == (503, "list_not_published")
    assert "Retry-After" in dict(headers)


def test_links_and_pipes_are_not_followed(files: PublishedFiles, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "krl.sig").unlink()
    (tmp_path / "krl.sig").symlink_to(tmp_path / "secret")
    assert ask(files, "krl.sig").status == 503


@pytest.mark.parametrize(
    "path",
    ["/krl", "/api/krl/", "/api//krl", "/api/krl.new", "/api/.krl.new", "/api/../krl", "/api/", "krl", "/api/KRL"],
)
def test_other_paths_and_methods_are_not_files(files: PublishedFiles, path: str) -> None:
    assert files.name_of({"REQUEST_METHOD": "GET", "RAW_PATH": path}) is None
    assert files.name_of({"REQUEST_METHOD": "POST", "RAW_PATH": "/api/krl"}) is None


# --- who has fetched --------------------------------------------------------------------------------------------------


class FakeKeeper:
    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.is_gone = False

    async def ask_async(self, header: dict[str, Any], body: bytes = b"") -> None:
        self.sent.append(header)
        if self.is_gone:
            raise Unavailable("keeper_gone", "gone", "wait")


def played(*fetches: tuple[str, str, str], gone: bool = False, rounds: int = 1) -> list[list[tuple[str, str, int]]]:
    """What the keeper is told in so many seconds; each fetch is a file, a host and an address."""
    keeper = FakeKeeper()
    keeper.is_gone = gone

    async def play() -> None:
        reports = FetchReports(keeper)  # type: ignore[arg-type]
        for name, host, peer in fetches:
            response = HttpResponse(200, [("Signer-List-Version", "12")], b"")
            reports.note(name, response, {"HTTP_SIGNER_HOST": host}, peer)
        for _ in range(rounds):
            reports.chores()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            reports._due = 0.0

    asyncio.run(play())
    for header in keeper.sent:
        assert len(json.dumps(header)) < MAX_HEADER
    return [read_fetches(header) for header in keeper.sent]


def test_hosts_that_fetch_the_list_are_reported_once_a_second() -> None:
    fetches = (("krl", "edge1", "192.0.2.1"), ("krl", "edge2", "192.0.2.2"), ("krl", "edge1", "192.0.2.3"))
    assert played(*fetches, rounds=3) == [[("edge1", "192.0.2.3", 12), ("edge2", "192.0.2.2", 12)]]


def test_only_names_are_reported_and_only_with_the_list() -> None:
    names = ["", "a b", "edge\n", "-x", "x" * 65, "ü", '"', "a/b", "edge1.", "{}"]
    assert played(*(("krl", name, "192.0.2.1") for name in names), ("krl.sig", "edge1", "192.0.2.1")) == []


def test_many_hosts_are_reported_in_messages_that_fit() -> None:
    hosts = [("krl", "h" * 59 + f"{number:05}", "2001:db8:1111:2222::/64") for number in range(5_000)]
    told = played(*hosts, rounds=20)
    assert sum(map(len, told)) == MAX_UNREPORTED
    assert max(map(len, told)) == MAX_FETCHES


def test_a_keeper_that_is_away_ends_nothing() -> None:
    assert len(played(("krl", "edge1", "192.0.2.1"), gone=True)) == 1


def test_a_file_of_any_size_is_read_only_up_to_a_limit(files: PublishedFiles, tmp_path: Path) -> None:
    (tmp_path / "krl.sig").write_bytes(b"x" * (MAX_LIST + 100))
    assert len(ask(files, "krl.sig").body) <= MAX_LIST + 1
