"""Paths, verbs, headers and reads below /v1/: OpenBao and we answer alike."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parts import parity
from tests.parts.parity import Case, Pair, seen

MERGE = {"Content-Type": "application/merge-patch+json"}
VERBS = ("GET", "LIST", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "FOO")
TRUE, FALSE = ("true", "True", "TRUE", "t", "T", "1"), ("false", "0", "f", "F", "False", "FALSE", "")
NO_BOOLEANS = ("foo", "2", "tRue", "yes", "%20true", "-1")


def _named(*cases: Case) -> list[Any]:
    return [pytest.param(case, id=f"{number} {case.name}") for number, case in enumerate(cases)]


def get(path: str, method: str = "GET", **more: Any) -> Case:
    return Case(f"{method} {path}{' ' + str(more) if more else ''}", path, method, **more)


def post(path: str, body: bytes = b"{}", method: str = "POST", **more: Any) -> Case:
    return Case(f"{method} {path} {body[:30]!r}{' ' + str(more) if more else ''}", path, method, body, **more)


# (verb, path) that writes something in OpenBao and is refused here; test_parity_differences.py has those.
WRITES = {
    (verb, path)
    for path in ("@/config/ca", "@/roles/new", "@/config/issuers", "@/issuer/default")
    for verb in ("POST", "PUT", "DELETE")
} - {("DELETE", "@/config/issuers")}
EVERYWHERE = tuple(
    get(path, verb, **extra)
    for path in (
        "@/sign/llmops", "@/sign/", "@/sign", "@/sign/-x", "@/roles", "@/roles/", "@/roles/new", "@/roles/new/",
        "@/public_key", "@/public_key/", "@/public_key/x", "@/config/ca", "@/config/issuers", "@/config", "@/issuers",
        "@/issuers/", "@/issuer/default", "@/issuer/default/public_key", "@/issuer/-/public_key", "@/nope", "@", "@/",
        "nomount/x", "nomount", "nomount/", "", "sys/nope", "auth/nope/x", "auth/token/nope", "sys/health",
        "sys/seal-status", "sys/leader", "@x/roles", "ssh/roles", "team/roles",
    )
    for verb in VERBS
    # Only root may HEAD in OpenBao, whatever a policy says.
    for extra in ({"token": "root"} if verb == "HEAD" else {}, {"token": "none"}, {"token": "bad"})
    # Health and seal status tell version and cluster: test_health_has_the_fields_that_monitors_read has those.
    if not (verb in ("GET", "HEAD") and path in ("sys/health", "sys/seal-status"))
    if (verb, path) not in WRITES and not (verb == "LIST" and path.startswith("@/issuers"))
)  # fmt: skip

LISTS = (
    *(get(f"@/roles?list={word}") for word in (*TRUE, *FALSE, *NO_BOOLEANS)), get("@/roles?list"),
    get("@/roles/?list=true"), get("@/roles?list=true&list=false"), get("@/roles?list=false&list=true"),
    get("@/roles?LIST=true"), get("@/roles/x?list=true"), get("@/roles/x?list=false", token="none"),
    get("@/roles?list=foo", token="none"), get("@/roles?list=true&after=many"), get("@/roles?list=true&after=zzz"),
    get("@/roles?list=true&limit=2"), get("@/roles?list=true&limit=0"), get("@/roles?list=true&limit=-1"),
    get("@/roles?list=true&limit=x"), get("@/roles?list=true&limit=1.5"), get("@/roles?list=true&limit="),
    get("@/roles?list=true&after=five&limit=1"), get("@/roles?after=five&limit=2", "LIST"),
    get("@/roles?list=false", "LIST"), get("@/roles?list=foo", "LIST"), get("@/sign/llmops?list=true"),
    get("nomount?list=true"), get("nomount?list=foo"), get("@/public_key?list=true"), get("@/public_key?list=false"),
    get("@/public_key?list=foo"), get("@/config/ca?list=0"), post("@/roles?list=true"), post("@/sign/nope?list=foo"),
)  # fmt: skip

READS = (
    get("@/roles/nope"), get("@/roles/-x"), get("@/roles/x-"), get("@/roles/a..b"), get("@/roles/..b"),
    get("@/roles/a%20b"), get("@/roles/%C3%A9"), get("@/roles/%ff"), get("@/roles/a/b"), get("@/roles/a%2fb"),
    get("@/roles/others"), get("@/roles/llmops/"), get("@/config/ca"), get("@/config/ca/"), get("@/public_key"),
    get("@/public_key", token="none"), get("@/public_key", token="bad"), get("@/issuer/default"),
    get("@/issuer/default/public_key", token="none"), get("@/issuer/nope"), get("@/issuer/nope/public_key"),
    get("@/issuer/default/"), get("@/issuer/default/x"), get("@/issuers", "LIST"), get("@/issuers/?list=true"),
    get("@/roles/nope?foo=1"), get("@/config/ca?foo=1&bar=2&list="), get("@/issuer/default?list=false"),
    get("@/config/issuers?a=%C3%A9"), get("@/public_key?foo=1"), get("@/roles?zoo=1&list=true"),
    get("@/config/ca?help="), get("@/config/issuers"), get("sys/leader"), get("sys/leader", token="none"),
    get("sys/init", token="none"),
)  # fmt: skip

SPELLINGS = (
    get("/@/roles?list=true"), get("@//roles?list=true"), get("@/./roles?list=true"),
    get("@/x/../roles?list=true&a=%20"), post("@//sign/llmops"), post("@/sign/.."), post("@/sign/../sign/llmops"),
    post("@/sign/%2e%2e"), get("@/roles/%2e%2e"), get("@/%2e%2e/x", token="none"), post("@/%2e%2e/x", b"{bad"),
    get("@/roles/%2e%2e", "OPTIONS"), get("@/roles/%2e", "GET"), get("@/roles/...", "GET"), get("@%2froles", "LIST"),
    get("@/roles%2f", "LIST"), get("@/roles%2fllmops%2f"), get("@/roles%3flist=true"), get("@/roles/%0a"),
    get("@/roles/%7f"), get("@/roles/%00"), get("@/roles/%e2%80%8b"), get("@/roles/a%0a"), post("@/sign/a%0a"),
    get("@/roles/."), get("@/roles/.."), get("@/roles/x/../"), get("@/issuer//public_key", token="none"),
    get("@/roles/%41"), get("../v1/@/roles"), post("@/sign/llmops%0a"), post("@/sign/%6c%6c%6d%6f%70%73/"),
    post("%70arity/sign/nope"),
)  # fmt: skip

FAULTS = (
    post("@/sign/llmops/"), post("@/sign/llmops/", token="none"), post("@/sign/llmops/", b"{bad"),
    post("@/sign/llmops/x"), post("@/sign/llmops/x", b"{bad"), post("@/nope", b"{bad"), post("nomount/x", b"{bad"),
    post("sys/health", b"{bad"), post("@/sign/llmops", b"{}", token="none"),
    post("@/sign/llmops", b'{"ttl":"abc"}', token="bad"), post("@/public_key"), post("@/public_key", b"{bad"),
    post("@/public_key", token="none"), post("@/roles"), post("@/issuers"), post("@/issuers/import/x!"),
    post("@/issue/a!"), post("@/issue/"), post("@/config/nope"), get("@/sign/llmops", "DELETE", body=b"{bad"),
    get("@/sign/llmops", "GET", body=b"{bad"), get("@/roles", "LIST", body=b"{bad"),
    post("@/sign/llmops", b"{bad", "PATCH"),
    post("@/sign/llmops", b"{}", "PATCH", headers={"Content-Type": "application/json"}),
    post("@/sign/llmops", b"{}", "PATCH", headers={"Content-Type": "Text/Plain; a=b"}),
    post("@/sign/llmops", b"{}", "PATCH", headers=MERGE), post("@/sign/llmops", b"{bad", "PATCH", headers=MERGE),
    post("@/sign/llmops", b"{}", "PATCH", headers=MERGE, token="none"), post("@/nope", b"{}", "PATCH", headers=MERGE),
    post("@/sign/llmops/", b"{}", "PATCH", headers=MERGE), post("nomount/x", b"{}", "PATCH", headers=MERGE),
    post("@/sign/llmops", b"{}", "PATCH", headers={"Content-Type": "application/merge-patch+json; charset=utf-8"}),
)  # fmt: skip


def _token(**headers: str) -> list[Case]:
    return [get("@/roles", "LIST", token=None, headers={k.replace("_", "-"): v for k, v in headers.items()})]


KEY = b'{"public_key":"@KEY@"}'
HEADERS = (
    *_token(Authorization="Bearer @TOKEN@"), *_token(Authorization="bearer @TOKEN@"),
    *_token(Authorization="@TOKEN@"), *_token(Authorization="Bearer  @TOKEN@ "), *_token(Authorization="Bearer "),
    *_token(Authorization="Basic @TOKEN@"), *_token(Authorization="Bearer\t@TOKEN@"),
    *_token(Authorization="Bearer x", X_Vault_Token="@TOKEN@"),
    *_token(Authorization="Bearer @TOKEN@", X_Vault_Token="x"),
    *_token(Authorization="Bearer @TOKEN@", X_Vault_Token=""), *_token(X_Vault_Token=" @TOKEN@ "),
    *_token(X_Vault_Token="@TOKEN@x"), *_token(X_Vault_Token="@TOKEN@,@TOKEN@"), *_token(x_vault_token="@TOKEN@"),
    *_token(X_Vault_Token="x" * 4000), *_token(X_Vault_Token="é"),
    *(
        post("@/sign/llmops", KEY, headers={"X-Vault-Namespace": name}, token=token)
        for name in ("ns1", "ns1/", "team/a/", "/", "root", "root/", "", " ", "é")
        for token in ("good", "none")
    ),
    post("@/sign/llmops", b"{bad", headers={"X-Vault-Namespace": "ns1"}),
    get("@/public_key", headers={"X-Vault-Namespace": "ns1"}), get("nomount/x", headers={"X-Vault-Namespace": "ns1"}),
    get("sys/health", headers={"X-Vault-Namespace": "ns1"}),
    get("@/roles", "OPTIONS", headers={"X-Vault-Namespace": "ns1"}),
    post("@/sign/", headers={"X-Vault-Namespace": "ns1"}),
    *(
        post("@/sign/llmops", KEY, headers={"X-Vault-Wrap-TTL": ttl}, token=token)
        for ttl in ("", "0", "0s", "-1", "-5m", "xx", "1w", "1.5")
        for token in ("good", "none")
    ),
    post("@/sign/llmops", b"{bad", headers={"X-Vault-Wrap-TTL": "xx"}),
    get("@/public_key", headers={"X-Vault-Wrap-TTL": "xx"}),
    get("@/roles", "LIST", headers={"X-Vault-Wrap-TTL": "0"}),
    post("@/sign/llmops", KEY, headers={"X-Vault-Wrap-TTL": "xx", "X-Vault-Namespace": "ns1"}),
    post("@/sign/", headers={"X-Vault-Wrap-TTL": "xx"}), get("@/roles/%2e%2e", headers={"X-Vault-Namespace": "ns1"}),
    get("@/roles/%2e%2e", headers={"X-Vault-Wrap-TTL": "xx"}),
    get("@/x?list=foo", headers={"X-Vault-Wrap-TTL": "xx"}),
    get("@/sign/x", "OPTIONS", headers={"X-Vault-Wrap-TTL": "xx"}),
    get("sys/leader", headers={"X-Vault-Namespace": "x"}),
    post("@/roles/x", method="PATCH", headers={"X-Vault-Namespace": "ns1"}),
    post("@/sign/llmops", KEY, headers={"X-Vault-Request": "true"}),
    post("@/sign/llmops", KEY, headers={"X-Vault-Request": "no", "Accept": "text/html", "User-Agent": "x"}),
)  # fmt: skip


def _bare(view: dict[str, Any]) -> dict[str, Any]:
    """Of a redirect only the target counts: Go adds a line of HTML for browsers, and no browser comes here. And where
    there is no body, its type is nobody's business."""
    if view["status"] == 307:
        return {"status": 307, "location": view["headers"]["location"]}
    if view["status"] == 400 and view.get("body") == b"":
        return {"status": 400}
    return view


def _check(pair: Pair, case: Case) -> None:
    theirs, ours = pair.both(case)
    wanted, got = (_bare(seen(answer)) for answer in (theirs, ours))
    assert got == wanted, f"\nsent   {case}\ntheirs {theirs.status} {theirs.body!r}\nours   {ours.status} {ours.body!r}"


@pytest.mark.parametrize("case", _named(*EVERYWHERE))
def test_every_verb_on_every_path_is_answered_alike(pair: Pair, case: Case) -> None:
    _check(pair, case)


@pytest.mark.parametrize("case", _named(*LISTS))
def test_lists_are_spelled_and_paged_alike(pair: Pair, case: Case) -> None:
    _check(pair, case)


@pytest.mark.parametrize("case", _named(*READS))
def test_reads_are_answered_alike(pair: Pair, case: Case) -> None:
    _check(pair, case)


@pytest.mark.parametrize("case", _named(*SPELLINGS))
def test_odd_spellings_of_paths_are_answered_alike(pair: Pair, case: Case) -> None:
    _check(pair, case)


@pytest.mark.parametrize("case", _named(*FAULTS))
def test_faults_are_told_in_the_same_order(pair: Pair, case: Case) -> None:
    _check(pair, case)


@pytest.mark.parametrize("case", _named(*HEADERS))
def test_headers_are_read_alike(pair: Pair, case: Case) -> None:
    _check(pair, case)


@pytest.mark.parametrize("name", [name for name in parity.ROLES if name not in ("others", "wide")])
def test_a_role_reads_as_openbao_shows_its_equivalent(pair: Pair, name: str) -> None:
    theirs, ours = pair.both(get(f"@/roles/{name}"))
    wanted, got = theirs.json()["data"], ours.json()["data"]
    assert list(got) == list(wanted)
    assert len(got) == 27
    # Listed differences: kinds of keys are always restricted here, critical options are refused by default.
    lengths = got.pop("allowed_user_key_lengths"), wanted.pop("allowed_user_key_lengths")
    if name not in ("keys", "curves"):
        assert not lengths[1]
    else:
        assert lengths[0] in (lengths[1], {"ssh-ed25519" if k == "ed25519" else k: v for k, v in lengths[1].items()})
    if got["allowed_critical_options"] == "":
        assert wanted.pop("allowed_critical_options") == "none-of-them"
        del got["allowed_critical_options"]
    for view in (got, wanted):
        for names in ("allowed_users", "default_user", "allowed_extensions", "allowed_critical_options"):
            view[names] = sorted(view.get(names, "").split(","))
    assert got == wanted


def test_health_has_the_fields_that_monitors_read(pair: Pair) -> None:
    theirs, ours = pair.both(get("sys/health", token="none"))
    assert (ours.status, seen(ours)["headers"]) == (theirs.status, seen(theirs)["headers"])
    assert list(ours.json()) == list(theirs.json())
    same = ("initialized", "sealed", "standby", "replication_performance_mode", "replication_dr_mode")
    assert {name: ours.json()[name] for name in same} == {name: theirs.json()[name] for name in same}


def test_a_seal_status_is_open(pair: Pair) -> None:
    theirs, ours = pair.both(get("sys/seal-status", token="none"))
    assert set(theirs.json()) - set(ours.json()) == {"commit_date"}
    assert (ours.json()["initialized"], ours.json()["sealed"]) == (True, False)


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_token_looks_itself_up(pair: Pair, method: str) -> None:
    theirs, ours = pair.both(Case("lookup", "auth/token/lookup-self", method))
    assert list(ours.json()) == list(theirs.json())
    # A token of ours is never renewed.
    wanted = [name for name in theirs.json()["data"] if not name.startswith("last_renewal")]
    assert list(ours.json()["data"]) == wanted
    assert ours.json()["data"]["id"] == pair.service.tokens[parity.IDENTITY]
    assert ours.json()["data"]["display_name"] == parity.IDENTITY
    assert ours.json()["data"]["ttl"] > 0


def test_a_mount_may_have_slashes_in_its_name(pair: Pair) -> None:
    answer = pair.ours(Case("slashes", "team/ssh/sign/llmops", body={"public_key": "@KEY@"}))
    assert answer.status == 200, answer.body
    assert pair.ours(get("team/ssh/roles", "LIST")).json()["data"]["keys"]
    assert pair.ours(get("team/ssh/nope")).json() == {"errors": ["1 error occurred:\n\t* unsupported path\n\n"]}
