"""policy.toml: every fault is found, all at once, each with its line; nothing half-right is taken."""

from __future__ import annotations

import os
import tomllib
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from signer.errors import BadFile
from signer.policy.file import CEILING, DEFAULT_CEILING, load_policy, parse_policy
from signer.policy.reading import MAX_POLICY_BYTES
from tests.parts import builders
from tests.parts.builders import POLICY, policy, policy_text, role_lines


def problems(text: str) -> list[str]:
    """What a file is refused for, blanks evened out."""
    with pytest.raises(BadFile) as caught:
        parse_policy(policy_text(text).encode())
    assert caught.value.code == "policy_refused"
    return [" ".join(problem.split()) for problem in caught.value.problems]


def with_role(*lines: str, without: str = "") -> str:
    old, new = role_lines(*lines)
    text = POLICY.replace(old, new)
    return "\n".join(line for line in text.splitlines() if not (without and line.startswith(without)))


def line_of(text: str, start: str) -> int:
    return next(number for number, line in enumerate(text.splitlines(), start=1) if line.startswith(start))


def test_the_standard_policy_is_read() -> None:
    text = policy_text()
    read = parse_policy(text.encode())
    assert read.digest == sha256(text.encode()).hexdigest()
    assert read.ca.fingerprint == builders.PretendKey().fingerprint
    role = read.roles["llmops"]
    assert (role.default_ttl, role.max_ttl, role.rsa_min_bits) == (900, 1800, 3072)
    assert read.identities["operator"].may == {"approve", "freeze", "hosts", "ledger.read", "operate", "revoke"}
    assert read.identities["stranger"].roles == frozenset()


def test_what_is_left_out_means_the_least() -> None:
    text = POLICY
    for start in ("default_principals", "default_ttl", "max_ttl", "extensions"):
        text = "\n".join(line for line in text.splitlines() if not line.startswith(start))
    role = parse_policy(policy_text(text).encode()).roles["llmops"]
    assert role.default_principals == role.default_extensions == ()
    assert role.allowed_extensions == role.allowed_critical_options == frozenset()
    assert (role.default_ttl, role.max_ttl) == (900, DEFAULT_CEILING) == (900, 3600)
    assert (role.force_command, role.source_address, role.approval) == (None, None, None)
    assert not any((role.allow_key_id, role.reason_required, role.verify_required, role.no_touch_required))


def test_a_default_ttl_that_is_left_out_never_exceeds_the_maximum() -> None:
    text = with_role('max_ttl = "5m"', without="default_ttl").replace('max_ttl = "30m"\n', "")
    assert parse_policy(policy_text(text).encode()).roles["llmops"].default_ttl == 300


@pytest.mark.parametrize(
    "line,where,sentence",
    [
        ("colour = 1", "roles.llmops.colour", "unknown key"),
        ("max_tll = 1", "roles.llmops.max_tll", "unknown key, did you mean max_ttl"),
        ("limits = { per_minutes = 1 }", "roles.llmops.limits.per_minutes", "unknown key"),
        ("limits = { per_minute = 0 }", "roles.llmops.limits.per_minute", "greater than or equal to 1"),
        ("limits = { live = -1 }", "roles.llmops.limits.live", "greater than or equal to 1"),
        ("limits = { live = true }", "roles.llmops.limits.live", "valid integer"),
        ("rsa_min_bits = 1024", "roles.llmops.rsa_min_bits", "1024 is below 2048"),
        ('rsa_min_bits = "3072"', "roles.llmops.rsa_min_bits", "valid integer"),
        ("reason_required = 1", "roles.llmops.reason_required", "valid boolean"),
        ("source_address = []", "roles.llmops.source_address", "is empty"),
        ('source_address = "anywhere"', "roles.llmops.source_address", "caller"),
        ('source_address = ["10.0.0.1/8"]', "roles.llmops.source_address.0", "host bits zero"),
        ('source_address = ["10.0.0.0/8", "x"]', "roles.llmops.source_address.1", "CIDR"),
        ('source_address = ["10.0.0.0/255.0.0.0"]', "roles.llmops.source_address.0", "CIDR"),
        ('source_address = ["fe80::1%eth0"]', "roles.llmops.source_address.0", "CIDR"),
        ('force_command = ""', "roles.llmops.force_command", "printable"),
        ('force_command = "a\\nb"', "roles.llmops.force_command", "printable"),
        ("verify_required = true", "roles.llmops.verify_required", "applies only to FIDO keys"),
        ("no_touch_required = true", "roles.llmops.no_touch_required", "applies only to FIDO keys"),
        ("critical_options = { allowed = [] }", "roles.llmops.critical_options.allowed", "is empty"),
        ('critical_options = { allowed = ["x"] }', "roles.llmops.critical_options.allowed.0", "not a critical option"),
        ('approval = { for = [], by = ["operators"], valid_for = "10m" }', "roles.llmops.approval.for", "is empty"),
        ('approval = { for = ["agent"], by = [], valid_for = "10m" }', "roles.llmops.approval.by", "is empty"),
        ('approval = { for = ["agent"], by = ["operators"] }', "roles.llmops.approval.valid_for", "is missing"),
        ('approval = { for = ["robot"], by = ["operators"], valid_for = "1m" }', "approval.for.0", "agent"),
        ('approval = { for = ["agent"], by = ["x"], valid_for = "1m" }', "roles.llmops.approval.by.0",
         "no identity in"),
        ('approval = { for = ["agent"], by = ["operators"], valid_for = "0s" }', "roles.llmops.approval", "second"),
    ],
)  # fmt: skip
def test_each_fault_of_a_role_is_told_with_its_line(line: str, where: str, sentence: str) -> None:
    text = with_role(line)
    (problem,) = problems(text)
    assert where in problem
    assert sentence in problem
    assert problem.startswith(f"line {line_of(text, line.split(' ', maxsplit=1)[0])} ")


@pytest.mark.parametrize(
    "old,new,where,sentence",
    [
        ('max_ttl = "30m"', 'max_ttl = "25h"', "roles.llmops.max_ttl", "1d1h is above 1d"),
        ('max_ttl = "30m"', 'max_ttl = "10m"', "roles.llmops.default_ttl", "15m is above max_ttl 10m"),
        ('max_ttl = "30m"', "max_ttl = 1800", "roles.llmops.max_ttl", 'text such as "15m"'),
        ('max_ttl = "30m"', 'max_ttl = "soon"', "roles.llmops.max_ttl", "not a duration"),
        ('default_ttl = "15m"', 'default_ttl = "0s"', "roles.llmops.default_ttl", "below one second"),
        ('principals = ["llmops", "{identity}"]', "principals = []", "roles.llmops.principals", "is empty"),
        ('principals = ["llmops", "{identity}"]', 'principals = ["llmops", "*"]', "roles.llmops.principals.1", "'*'"),
        ('principals = ["llmops", "{identity}"]', 'principals = ["llmops", "a,b"]', "roles.llmops.principals.1", "a,b"),
        ('principals = ["llmops", "{identity}"]', 'principals = ["llmops", "{x}"]', "roles.llmops.principals.1", "{x}"),
        ('principals = ["llmops", "{identity}"]', 'principals = ["llmops", ""]', "roles.llmops.principals.1", "''"),
        ('principals = ["llmops", "{identity}"]', 'principals = ["llmops", "llmops"]', "principals.1", "twice"),
        ('default_principals = ["llmops"]', 'default_principals = ["root"]', "default_principals.0", "not among"),
        ('default_principals = ["llmops"]', "default_principals = []", "default_principals", "is empty"),
        ('["ssh-ed25519", "ssh-rsa"]', '["ssh-ed25519", "ssh-dss"]', "roles.llmops.key_types.1",
         "not a valid key type"),
        ('["ssh-ed25519", "ssh-rsa"]', "[]", "roles.llmops.key_types", "is empty"),
        ('default = ["permit-pty"]', 'default = ["permit-user-rc"]', "extensions.default.0", "not among allowed"),
        ('allowed = ["permit-pty"]', 'allowed = ["permit-pty", "x"]', "extensions.allowed.1", "not an extension"),
        ('allowed = ["permit-pty"]', 'allowed = ["permit-pty", "no-touch-required"]', "allowed.1", "no_touch_required"),
        ("[roles.llmops]", '[roles."llm ops"]', "roles.llm ops", "a role's name"),
        ('kind = "human"', 'kind = "agent"', "identities.operator.may.0", "an agent can never approve"),
        ('kind = "human"', 'kind = "workload"', "identities.operator.may.0", "a workload can never approve"),
        ('kind = "human"', 'kind = "robot"', "identities.operator.kind", "human"),
        ('groups = ["operators"]', 'group = ["operators"]', "identities.operator.group", "did you mean groups"),
        ('groups = ["operators"]', "groups = []", "identities.operator.groups", "is empty"),
        ('may = ["approve"', 'may = ["rule"', "identities.operator.may.0", "is not one of"),
        ('kind = "human"\n', 'kind = "human"\nroles = ["llmops"]\n', "", "not TOML"),
        ("[identities.stranger]", "[identities.Stranger]", "identities.Stranger", "an identity's name"),
        ("[identities.stranger]", "[identities.keeper]", "identities.keeper", "reserved for the ledger"),
        ("[identities.stranger]", "[identities.unauthenticated]", "identities.unauthenticated",
         "reserved for the ledger"),
        ("[identities.stranger]", "[identities.many]", "identities.many", "reserved for the ledger"),
        ('fingerprint = "{ca}"', 'fingerprint = "SHA256:abc"', "ca.fingerprint", "is not a fingerprint"),
        ('fingerprint = "{ca}"', "", "ca.fingerprint", "is missing"),
        ("[ca]", "[caa]", "caa", "unknown key, did you mean ca"),
        ("{token:stranger}", "{token:operator}", "identities.stranger.tokens.0.sha256", "also the token of operator"),
        ("{token:stranger}", "A" * 64, "identities.stranger.tokens.0.sha256", "not a SHA-256"),
        ("{token:stranger}", "a" * 63, "identities.stranger.tokens.0.sha256", "not a SHA-256"),
        ("{token:stranger}", "a" * 64 + "\\n", "identities.stranger.tokens.0.sha256", "not a SHA-256"),
    ],
)  # fmt: skip
def test_each_changed_line_is_told_with_its_place(old: str, new: str, where: str, sentence: str) -> None:
    assert old in POLICY
    found = problems(POLICY.replace(old, new, 1))
    matching = [problem for problem in found if where in problem and sentence in problem]
    assert matching, found
    assert not matching[0].startswith("line 0")


def test_an_expiry_needs_a_time_zone_and_a_token_an_expiry() -> None:
    zoneless = POLICY.replace("2099-01-01T00:00:00Z", "2099-01-01T00:00:00", 1)
    assert "has no time zone" in problems(zoneless)[0]
    endless = POLICY.replace(", expires = 2099-01-01T00:00:00Z", "", 1)
    assert "tokens.0.expires is missing" in problems(endless)[0]
    day = POLICY.replace("2099-01-01T00:00:00Z", "2099-01-01", 1)
    assert "expires" in problems(day)[0]


@pytest.mark.parametrize(
    "name", ["permit-port-forwarding", "permit-agent-forwarding", "permit-X11-forwarding", "permit-user-rc"]
)
def test_a_forced_command_stands_beside_nothing_that_leads_past_it(name: str) -> None:
    text = POLICY.replace('allowed = ["permit-pty"]', f'allowed = ["permit-pty", "{name}"]')
    (problem,) = problems(text.replace("max_ttl", 'force_command = "/bin/x"\nmax_ttl'))
    assert "extensions.allowed.1" in problem
    assert "would bypass force_command" in problem


def test_a_pinned_option_cannot_be_left_to_the_caller() -> None:
    text = with_role('force_command = "/bin/x"', 'source_address = "caller"',
                     'critical_options = { allowed = ["source-address", "force-command"] }')  # fmt: skip
    found = problems(text)
    assert ["is pinned by this role" in problem for problem in found] == [True, True]


def test_roles_for_fido_keys_may_demand_more_of_them() -> None:
    keys = ('["ssh-ed25519", "ssh-rsa"]', '["sk-ssh-ed25519@openssh.com"]')
    read = policy(POLICY, (keys[0], keys[1] + "\nverify_required = true"))
    assert read.roles["llmops"].verify_required
    both = POLICY.replace(keys[0], keys[1] + "\nverify_required = true\nno_touch_required = true")
    assert "contradicts verify_required" in problems(both)[0]


def test_all_problems_are_told_at_once_in_the_order_of_the_file() -> None:
    text = (
        POLICY.replace('max_ttl = "30m"', 'max_ttl = "25h"')
        .replace('["ssh-ed25519", "ssh-rsa"]', '["ssh-dss"]')
        .replace('kind = "human"', 'kind = "agent"')
        .replace("{token:stranger}", "xyz")
        .replace("[ca]", "colour = 1\n[ca]")
    )
    found = problems(text)
    lines = [int(problem.split()[1]) for problem in found]
    assert len(found) == 8
    assert lines == sorted(lines)


def test_the_second_token_of_an_array_of_tables_has_its_own_line() -> None:
    text = POLICY + '\n[[identities.later.tokens]]\nsha256 = "' + "a" * 64 + '"\nexpires = 2099-01-01T00:00:00Z\n'
    text += '[[identities.later.tokens]]\nsha256 = "short"\nexpires = 2099-01-01T00:00:00Z\n'
    found = problems(text + '[identities.last]\nkind = "agent"\n')
    (problem,) = (problem for problem in found if "tokens.1.sha256" in problem)
    assert problem.startswith(f"line {line_of(text, 'sha256 = ' + chr(34) + 'short')} ")


@pytest.mark.parametrize("missing", ["[ca]", "roles", "identities"])
def test_a_file_without_one_of_its_parts_is_refused(missing: str) -> None:
    assert any(
        missing.strip("[]") in problem for problem in problems("[roles]\n[identities]" if missing == "[ca]" else "")
    )


def test_names_may_not_make_a_key_id_too_long() -> None:
    def named(length: int) -> str:
        name = "r" * length
        return POLICY.replace("[roles.llmops]", f"[roles.{name}]").replace('roles = ["llmops"]', f'roles = ["{name}"]')

    assert set(parse_policy(policy_text(named(128)).encode()).roles) == {"r" * 128}
    assert "at most 128 characters" in problems(named(129))[0]


def test_256_principals_are_taken_and_257_are_not() -> None:
    def listed(count: int) -> str:
        names = ", ".join(f'"p{number}"' for number in range(count))
        text = POLICY.replace('default_principals = ["llmops"]\n', "")
        return text.replace('principals = ["llmops", "{identity}"]', f"principals = [{names}]")

    assert len(parse_policy(policy_text(listed(256)).encode()).roles["llmops"].principals) == 256
    assert "has 257 names; a certificate may have 256" in problems(listed(257))[0]


def test_the_ceiling_is_a_day() -> None:
    assert CEILING == 24 * 3600
    assert policy(POLICY, ('max_ttl = "30m"', 'max_ttl = "24h"')).roles["llmops"].max_ttl == 86_400


@pytest.mark.parametrize(
    "raw",
    [
        b"\xff\xfe",
        b"a = [" * 5_000,
        b"a = " + b"[" * 2_000 + b"]" * 2_000,
        b"a = " + b"9" * 5_000,
        b"a = 2027-02-30T00:00:00Z",
        b"[roles]\nx = 1\n[identities]\ny = 2\n",
        b"roles = 1\nidentities = []\nca = true\n",
        b"[identities.x]\ntokens = [1]\n",
        b"[identities.x]\ntokens = 0001-01-01T00:00:00+23:59\n",
        b"[[roles]]\n[[identities]]\n[[ca]]\n",
        b" " * (MAX_POLICY_BYTES + 1),
    ],
    ids=range(11),
)
def test_a_file_of_the_wrong_shape_is_refused_like_any_other(raw: bytes) -> None:
    with pytest.raises(BadFile):
        parse_policy(raw)


@pytest.mark.parametrize("year", ["0001-01-01T00:00:00+23:59", "0001-01-01T00:00:00Z", "9999-12-31T23:59:59-23:59"])
def test_the_ends_of_time_are_times(year: str) -> None:
    read = parse_policy(policy_text(POLICY.replace("2099-01-01T00:00:00Z", year)).encode())
    assert len(read.tokens) == 3


@given(st.binary())
@example(b"")
def test_no_bytes_raise_anything_but_bad_file(raw: bytes) -> None:
    with pytest.raises(BadFile):
        parse_policy(raw)


LEAVES = st.one_of(
    st.integers(), st.booleans(), st.floats(), st.text(max_size=8), st.datetimes(), st.dates(), st.times(),
    st.sampled_from(["llmops", "caller", "15m", "agent", "ssh-ed25519", "approve", "operators"]),
)  # fmt: skip
_WORDS = """
    ca roles identities fingerprint principals key_types max_ttl extensions allowed default approval for by valid_for
    limits live kind may tokens sha256 expires x llmops source_address critical_options groups
"""
KEYS = st.sampled_from(_WORDS.split())
TREES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4))
TABLES = st.dictionaries(
    st.sampled_from(["x", "llmops"]), st.dictionaries(KEYS, TREES, max_size=5) | LEAVES, max_size=2
)


@given(st.fixed_dictionaries({"roles": TABLES | TREES, "identities": TABLES | TREES}, optional={"ca": TREES}))
def test_no_values_in_known_places_raise_anything_but_bad_file(data: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tomllib, "loads", lambda _text: data)
        with pytest.raises(BadFile) as caught:
            parse_policy(b"# what tomllib reads is drawn")
    assert caught.value.problems


def test_a_file_is_read_from_disk_and_one_that_cannot_be_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(policy_text())
    assert load_policy(path) == parse_policy(policy_text().encode())
    for unreadable in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(BadFile) as caught:
            load_policy(unreadable)
        assert caught.value.code == "policy_unreadable"
        assert f"{unreadable} (SIGNER_POLICY_FILE)" in caught.value.text
        with pytest.raises(BadFile, match=r"\(--file\)") as caught:
            load_policy(unreadable, "--file")
        assert "--file" in caught.value.hint


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o664, 0o666])
def test_a_policy_that_group_or_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(policy_text())
    path.chmod(mode)
    with pytest.raises(BadFile) as caught:
        load_policy(path)
    assert caught.value.code == "policy_file_writable"
    assert f"{mode:04o}" in caught.value.text
    path.chmod(mode & ~0o022 | 0o044)
    assert load_policy(path) == parse_policy(policy_text().encode())


def test_a_policy_belongs_to_root_or_to_the_user_that_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(policy_text())
    owner = path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    if owner == 0:
        assert load_policy(path) == parse_policy(policy_text().encode())  # root's, read by the keeper's user
        os.chown(path, 4712, -1)
    with pytest.raises(BadFile) as caught:
        load_policy(path)
    assert caught.value.code == "policy_file_writable"
    assert f"belongs to uid {path.stat().st_uid}" in caught.value.text
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid)
    assert load_policy(path) == parse_policy(policy_text().encode())


def test_a_policy_is_read_through_a_link(tmp_path: Path) -> None:
    """Kubernetes mounts files as links; the file that is opened is the one that is checked."""
    (tmp_path / "real.toml").write_text(policy_text())
    (tmp_path / "policy.toml").symlink_to("real.toml")
    assert load_policy(tmp_path / "policy.toml") == parse_policy(policy_text().encode())
    (tmp_path / "real.toml").chmod(0o666)
    with pytest.raises(BadFile) as caught:
        load_policy(tmp_path / "policy.toml")
    assert caught.value.code == "policy_file_writable"


@pytest.mark.timeout(20)
def test_a_pipe_in_place_of_the_file_does_not_hang(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    os.mkfifo(path)
    with pytest.raises(BadFile):
        load_policy(path)


def test_problems_never_show_a_token_digest_that_is_right() -> None:
    text = POLICY.replace("{token:stranger}", "{token:operator}")
    digest = next(iter(policy().tokens))
    assert all(digest not in problem for problem in problems(text))
    assert digest not in repr(policy())
