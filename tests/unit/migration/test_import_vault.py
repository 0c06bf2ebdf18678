"""Vault's roles as policy.toml: all 27 fields accounted for, never wider, and nothing of Vault's ends a line of it."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signer.errors import BadFile
from signer.migration.import_vault import FILL_IN, Imported, comment, import_role, import_vault, toml_text, write_policy
from signer.model import PublicKey, Role
from signer.policy.file import parse_policy
from signer.units import plain
from signer.vault.parity import compare_roles, errors_in
from signer.vault.role import DEFAULTS, MountTtls
from tests.parts.roles import VAULTS

PIN = "SHA256:" + "B" * 43
MOUNT = MountTtls()
IDENTITY = '\n[identities.deploy-agent]\nkind = "agent"\n'


class FakeVault:
    def __init__(self, told: dict[str, dict[str, Any]], ttls: MountTtls | None = MOUNT) -> None:
        self.told, self.ttls = told, ttls

    def roles(self, mount: str) -> tuple[str, ...]:
        assert mount.startswith("ssh")
        return tuple(self.told)

    def role(self, mount: str, name: str) -> dict[str, Any]:
        assert mount.startswith("ssh")
        return self.told[name]

    def mount_ttls(self, mount: str) -> MountTtls | None:
        assert mount.startswith("ssh")
        return self.ttls

    def ca_public_key(self, mount: str) -> PublicKey:
        assert mount.startswith("ssh")
        return PublicKey("ssh-ed25519", b"", 256, "SHA256:" + "V" * 43)


def take_over(fields: dict[str, Any], ttls: MountTtls | None = MOUNT, name: str = "llmops") -> tuple[Imported, Role]:
    """The import of one role, and that role as our own reader has it."""
    made = import_vault(FakeVault({name: {**VAULTS, **fields}}, ttls), "ssh", (), PIN)
    return made, parse_policy((made.policy + IDENTITY).encode()).roles[name]


def test_a_plain_role_is_taken_over_whole() -> None:
    made, role = take_over({"allowed_critical_options": "source-address"})
    assert (role.principals, role.default_principals) == (("llmops",), ("llmops",))
    assert (role.default_ttl, role.max_ttl) == (900, 1800)
    assert role.key_types == {"ssh-ed25519", "sk-ssh-ed25519@openssh.com", "ssh-rsa"}
    assert role.rsa_min_bits == 3072
    assert role.allowed_extensions == {"permit-pty"}
    assert role.default_extensions == ("permit-pty",)
    assert role.allowed_critical_options == {"source-address"}
    assert "# Not carried over: nothing." in made.policy


def test_what_is_missing_yet_is_what_check_says_is_missing_and_comments_ask_for() -> None:
    made = import_vault(FakeVault({"llmops": VAULTS}), "ssh")
    with pytest.raises(BadFile) as caught:
        parse_policy(made.policy.encode())
    told = " ".join(caught.value.problems)
    assert len(caught.value.problems) == 2
    assert "ca.fingerprint" in told
    assert "identities" in told
    assert made.policy.count("FILL IN") == 3
    assert FILL_IN in made.policy
    uncommented = "\n".join(
        line.removeprefix("# ").replace("…", "ab" * 32)
        for line in made.policy.split("FILL IN the identities,")[1].split("#\n")[1:]
    )
    filled = made.policy.replace(FILL_IN, PIN) + uncommented.replace("# ", "")
    assert parse_policy(filled.encode()).identities["deploy-agent"].roles == {"llmops"}


# For each field: another value, and what is then in the file instead (None: a comment that names the field).
FIELDS: list[tuple[str, object, str | None]] = [
    ("algorithm_signer", "rsa-sha2-256", None),
    ("allow_bare_domains", True, None),
    ("allow_commas_in_identity_templates", True, None),
    ("allow_empty_principals", True, None),
    ("allow_host_certificates", True, None),
    ("allow_subdomains", True, None),
    ("allow_user_certificates", False, None),
    ("allow_user_key_ids", True, "allow_key_id = true"),
    ("allow_wildcards_in_identity_templates", True, None),
    ("allowed_critical_options", "source-address", 'critical_options = { allowed = ["source-address"] }'),
    ("allowed_critical_options", "", None),
    ("allowed_domains", "example.com", None),
    ("allowed_domains_template", True, None),
    ("allowed_extensions", "permit-pty,permit-user-rc", '"permit-user-rc"'),
    ("allowed_extensions", "permit-pty,login@github.com", None),
    ("allowed_user_key_lengths", {"ecdsa-sha2-nistp384": [0]}, 'key_types = ["ecdsa-sha2-nistp384"]'),
    ("allowed_user_key_lengths", {"ed25519": [0], "dsa": [1024]}, None),
    ("allowed_user_key_lengths", {}, None),
    ("allowed_users", "llmops,deploy", 'principals = ["llmops", "deploy"]'),
    ("allowed_users", "llmops,a b", None),
    ("allowed_users", "*", None),
    ("allowed_users_template", True, None),
    ("default_critical_options", {"force-command": "date"}, 'force_command = "date"'),
    ("default_critical_options", {"source-address": "10.0.0.0/8,::/0"}, 'source_address = ["10.0.0.0/8", "::/0"]'),
    ("default_critical_options", {"verify-required": ""}, "verify_required = true"),
    ("default_extensions", {"permit-user-rc": ""}, 'default = ["permit-user-rc"]'),
    ("default_extensions", {"login@github.com": "x"}, None),
    ("default_extensions_template", True, None),
    ("default_user", "", None),
    ("default_user", "llmops,{{identity.entity.name}}", None),
    ("default_user_template", True, None),
    ("issuer_ref", "old", None),
    ("key_id_format", "{{role_name}}", None),
    ("key_type", "otp", None),
    ("max_ttl", 3600, 'max_ttl = "1h"'),
    ("max_ttl", 0, None),
    ("not_before_duration", 0, None),
    ("ttl", 60, 'default_ttl = "1m"'),
    ("ttl", 0, None),
]  # fmt: skip


def test_all_27_fields_are_tried_below() -> None:
    assert {field for field, _, _ in FIELDS} == set(DEFAULTS)
    assert len(DEFAULTS) == 27


@pytest.mark.parametrize("field, value, line", FIELDS, ids=[f"{field}={value}" for field, value, _ in FIELDS])
def test_every_field_is_carried_or_named(field: str, value: object, line: str | None) -> None:
    """Whatever a field says either changes the policy or is told by name, and the account has all 27."""
    role = import_role("llmops", {**VAULTS, field: value}, MOUNT)
    assert list(role.accounts) == sorted(DEFAULTS)
    account = role.accounts[field]
    text = "\n".join([*role.lines, *role.not_carried()])
    if line is not None:
        assert line in text
        return
    if field == "default_user" and not value:
        assert "default_principals" not in text
    else:
        assert field in text, f"{account}: neither carried nor named"
        assert (account.outcome, account.text) != ("carried", "") or role.blockers


def test_fields_without_effect_on_users_are_named_even_where_nothing_is_lost() -> None:
    role = import_role("llmops", {**VAULTS, "allowed_domains": "example.com", "more": 1}, MOUNT)
    assert role.not_carried() == [
        "allowed_domains: used only by host certificates, which signer does not issue",
        "more: unknown field",
    ]


@pytest.mark.parametrize(
    "fields, why",
    [
        ({"key_type": "otp"}, "key_type is not ca"),
        ({"allow_user_certificates": False}, "signer issues only user"),
        ({"allowed_users": "", "default_user": ""}, "no valid principal"),
        ({"allowed_users": "*", "default_user": ""}, "no valid principal"),
        ({"allowed_users": "{{identity.entity.name}}", "allowed_users_template": True}, "no valid principal"),
        ({"allowed_user_key_lengths": {"dsa": [1024]}}, "no key type"),
        ({"allowed_user_key_lengths": {"rsa": [1024]}}, "no key type"),
        ({"allowed_user_key_lengths": {"ed25519": []}}, "no key type"),
        ({"default_critical_options": {"verify-required": ""}, "allowed_user_key_lengths": {"rsa": [4096]}}, "no key"),
        ({"default_critical_options": {"no-such@example.com": ""}}, "must not be dropped"),
        ({"default_critical_options": {"source-address": "everywhere"}}, "must not be dropped"),
        ({"default_critical_options": {"force-command": "a\nb"}}, "must not be dropped"),
        ({"default_critical_options": {"force-command": " "}}, "must not be dropped"),
    ],
)
def test_what_restricts_and_cannot_be_said_here_keeps_the_whole_role_out(fields: dict[str, Any], why: str) -> None:
    told = {"odd": {**VAULTS, **fields}, "llmops": VAULTS}
    made = import_vault(FakeVault(told), "ssh", (), PIN)
    assert set(parse_policy((made.policy + IDENTITY).encode()).roles) == {"llmops"}
    assert why in " ".join(made.roles[0].not_carried())
    assert "Role odd is not carried over" in made.policy
    with pytest.raises(BadFile) as caught:
        import_vault(FakeVault({"odd": {**VAULTS, **fields}}), "ssh", (), PIN)
    assert caught.value.code == "nothing_to_import"
    assert why in " ".join(caught.value.problems)


def test_anybody_in_vault_becomes_its_default_users_here() -> None:
    _, role = take_over({"allowed_users": "*", "default_user": "llmops,deploy"})
    assert set(role.principals) == set(role.default_principals) == {"llmops", "deploy"}


def test_defaults_that_cannot_all_be_named_are_none() -> None:
    fields = {"default_user": "llmops,a b", "allowed_users": "llmops,a b"}
    made, role = take_over(fields)
    assert (role.principals, role.default_principals) == (("llmops",), ())
    assert "a request without principals is refused" in made.policy


@pytest.mark.parametrize(
    "fields, ttls, expected",
    [
        ({"ttl": 0, "max_ttl": 0}, MOUNT, (86_400, 86_400)),
        ({"ttl": 0, "max_ttl": 0}, MountTtls(600, 1200), (600, 1200)),
        ({"ttl": 0, "max_ttl": 0}, None, (900, 3600)),
        ({"ttl": 7200, "max_ttl": 0}, None, (7200, 7200)),
        ({"ttl": 0, "max_ttl": 300}, MOUNT, (300, 300)),
        ({"ttl": 200_000, "max_ttl": 400_000}, MOUNT, (86_400, 86_400)),
    ],
)
def test_a_life_that_vault_leaves_to_the_mount_is_named_and_a_day_is_the_most(
    fields: dict[str, Any], ttls: MountTtls | None, expected: tuple[int, int]
) -> None:
    made, role = take_over(fields, ttls)
    assert (role.default_ttl, role.max_ttl) == expected
    assert "ttl: " in made.policy
    assert ("could not be read" in made.policy) is (ttls is None)


def test_a_forced_command_keeps_out_what_would_lead_past_it() -> None:
    fields = {
        "default_critical_options": {"force-command": "date"},
        "allowed_extensions": "*",
        "default_extensions": {"permit-pty": "", "permit-port-forwarding": ""},
        "allowed_critical_options": "force-command,source-address",
    }
    made, role = take_over(fields)
    assert role.force_command == "date"
    assert role.allowed_extensions == {"permit-pty"}
    assert role.default_extensions == ("permit-pty",)
    assert role.allowed_critical_options == {"source-address"}
    assert "default_extensions: not permit-port-forwarding" in made.policy


def test_named_roles_only_are_taken_if_some_are_named() -> None:
    told = {"llmops": VAULTS, "other": VAULTS}
    made = import_vault(FakeVault(told), "ssh", ("other",), PIN)
    assert [role.name for role in made.roles] == ["other"]


def test_the_json_has_every_field_and_all_that_was_left_behind() -> None:
    made, _ = take_over({"issuer_ref": "old"})
    facts = json.loads(json.dumps(made.as_json()))
    assert [field["field"] for field in facts["roles"][0]["fields"]] == sorted(DEFAULTS)
    assert [(one["role"], one["text"].split(":")[0]) for one in facts["not_carried"]] == [("llmops", "issuer_ref")]
    assert facts["policy"] == made.policy


# --- nothing of Vault's gets out of its place ------------------------------------------------------------------------

_ANY = st.text(max_size=40) | st.text('"\\\n\r\t\x00\x7f\u2028\ud800[]{}=#,*. ab', max_size=20)
_EVIL = st.sampled_from(['x"]\nprincipals = ["root"]\n#', "llmops\n[roles.root]", "'''", '"""', "a\rb = 1", "\x85x"])
_TEXT = _ANY | _EVIL
_OPTION = st.sampled_from(["force-command", "source-address", "permit-pty"]) | _TEXT
_FIELDS = st.fixed_dictionaries(
    {},
    optional={
        name: (
            st.booleans() if isinstance(default, bool)
            else st.integers(0, 10**7) if isinstance(default, int)
            else _TEXT if isinstance(default, str)
            else st.dictionaries(
                st.sampled_from(["ed25519", "rsa", "ec", "dsa"]) | _TEXT,
                st.lists(st.integers(0, 8192), max_size=3), max_size=3,
            ) if name == "allowed_user_key_lengths"
            else st.dictionaries(_OPTION, _TEXT, max_size=3)
        )
        for name, default in DEFAULTS.items() if name not in ("key_type", "allow_user_certificates")
    },
)  # fmt: skip


@given(_FIELDS, _TEXT, st.sampled_from([MOUNT, None, MountTtls(60, 600)]))
def test_whatever_vault_says_the_file_is_read_and_gives_nobody_more(
    fields: dict[str, Any], name: str, ttls: MountTtls | None
) -> None:
    told = {"llmops": {**VAULTS, **fields}, name: {**VAULTS, **fields}, "plain": VAULTS}
    made = import_vault(FakeVault(told, ttls), "ssh\n[x]", (), PIN)
    data = tomllib.loads(made.policy)
    assert set(data) == {"ca", "roles"}
    assert data["ca"] == {"fingerprint": PIN}
    assert set(data["roles"]) <= set(told)
    for found, role in parse_policy((made.policy + IDENTITY).encode()).roles.items():
        wider = [one.field for one in errors_in(compare_roles(told[found], role, ttls))]
        assert set(wider) <= ({"default_user"} if not role.default_principals else set())
    assert all(line.isprintable() for line in made.policy.split("\n"))


@given(_TEXT)
def test_a_string_is_read_back_as_it_was(text: str) -> None:
    readable = "".join("?" if "\ud800" <= char <= "\udfff" else char for char in text)
    assert tomllib.loads(f"x = {toml_text(text)}") == {"x": readable}


@given(_TEXT)
def test_a_comment_is_one_line_of_comment(text: str) -> None:
    line = comment(text)
    assert line.startswith("# ")
    assert tomllib.loads(f"{line}\nx = 1") == {"x": 1}
    assert plain(line) == line


def test_a_file_that_exists_is_never_written(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    write_policy(path, "new\n")
    assert path.read_text() == "new\n"
    with pytest.raises(BadFile) as caught:
        write_policy(path, "other\n")
    assert (caught.value.code, path.read_text()) == ("target_exists", "new\n")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(BadFile):
        write_policy(link, "other\n")
    assert not (tmp_path / "nowhere").exists()
