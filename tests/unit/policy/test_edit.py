"""Edits of policy.toml: the tables come out as meant, and every line that an edit does not concern stays."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signer.errors import BadFile
from signer.policy import edit

A, B, C, D, NEW = (letter * 64 for letter in "abcde")
END = "2027-01-01T00:00:00Z"
POLICY = f"""\
# Who may get what.
[ca]
fingerprint = "SHA256:x"   # pinned

# --- agents ---

# The agent that deploys.
[identities.deploy-agent]
kind = "agent"   # a bot
roles = ["llmops"]
tokens = [{{ sha256 = "{A}", expires = {END} }}]   # laptop

[roles.llmops]
principals = ["llmops"]   # exact names
limits = {{ per_minute = 30 }}

[roles."deploy.all"]
principals = ["deploy"]

# Two tokens.
[identities.ci]
kind = "workload"
tokens = [
    # of the old runner
    {{ sha256 = "{B}", expires = {END} }},
    {{ sha256 = "{C}", expires = {END} }},   # of the new one
]

[identities.bare]
kind = "human"

[[identities.rows.tokens]]
sha256 = "{D}"   # d
expires = {END}

[identities.rows]
kind = "human"

# Nobody else.
"""


def tokens(text: str, name: str) -> list[str] | None:
    found = tomllib.loads(text)["identities"][name].get("tokens")
    return None if found is None else [token["sha256"] for token in found]


def lost(before: str, after: str) -> list[str]:
    """The lines of `before` that `after` lacks."""
    left = after.splitlines()
    missing = []
    for line in before.splitlines():
        if line in left:
            left.remove(line)
        else:
            missing.append(line)
    return missing


@pytest.mark.parametrize(
    "name, expected, changed",
    [
        ("deploy-agent", [A, NEW], 1),
        ("ci", [B, C, NEW], 0),
        ("bare", [NEW], 0),
        ("rows", [D, NEW], 0),
    ],
)
def test_a_token_is_added_to_a_list_in_each_form(name: str, expected: list[str], changed: int) -> None:
    after = edit.add_token(POLICY, name, NEW, END)
    assert tokens(after, name) == expected
    assert len(lost(POLICY, after)) == changed  # a list in one line gets a line for each entry
    assert lost(POLICY, after) == [line for line in POLICY.splitlines() if line not in after]
    assert after.count("# laptop") == 1
    added = lost(after, POLICY)
    assert [line for line in added if line.count("sha256") > 1] == []


@pytest.mark.parametrize(
    "digests, name, expected, gone",
    [
        ([A], "deploy-agent", None, ["# laptop"]),
        ([B], "ci", [C], [B]),
        ([C], "ci", [B], [C]),
        ([B, C], "ci", None, [B, C, "of the old runner"]),
    ],
)
def test_tokens_are_removed_and_the_list_with_the_last_one(
    digests: list[str], name: str, expected: list[str] | None, gone: list[str]
) -> None:
    after = edit.remove_tokens(POLICY, digests)
    assert tokens(after, name) == expected
    assert [text for text in gone if text in after] == []
    kept = [line for line in lost(POLICY, after) if not re.search("sha256|tokens = |# of|^]", line.strip())]
    assert kept == []


def test_only_the_end_of_a_token_changes_when_it_is_renewed() -> None:
    for digest in (A, B, C, D):
        after = edit.renew_token(POLICY, digest, "2028-02-03T04:05:06Z")
        before_lines, after_lines = POLICY.splitlines(), after.splitlines()
        changed = [(old, new) for old, new in zip(before_lines, after_lines, strict=True) if old != new]
        assert [(old.replace(END, "2028-02-03T04:05:06Z"), new) for old, new in changed] == [
            (new, new) for _, new in changed
        ]
        assert len(changed) == 1


def test_a_new_table_stands_behind_the_last_one_of_its_kind() -> None:
    after = edit.add_table(
        POLICY, "roles", "dev@x", {"principals": ["dev", 'a"b'], "limits": {"live": 3}, "keys": None}
    )
    assert tomllib.loads(after)["roles"]["dev@x"] == {"principals": ["dev", 'a"b'], "limits": {"live": 3}}
    assert lost(POLICY, after) == []
    headers = re.findall(r"^\[+(.+?)\]+$", after, re.MULTILINE)
    assert headers[headers.index('roles."deploy.all"') + 1] == 'roles."dev@x"'
    assert '\n\n[roles."dev@x"]\n' in after
    assert "\n\n# Two tokens.\n[identities.ci]" in after
    at_end = edit.add_table(POLICY, "identities", "last", {"kind": "agent", "may": ["freeze"], "reason_required": True})
    assert at_end.startswith(POLICY.rstrip("\n"))
    assert at_end.endswith('\n\n[identities.last]\nkind = "agent"\nmay = ["freeze"]\nreason_required = true\n')


@pytest.mark.parametrize("name", ["deploy-agent", "ci", "bare", "rows"])
def test_a_removed_identity_takes_its_comment_and_nothing_else(name: str) -> None:
    after = edit.remove_table(POLICY, "identities", name)
    assert name not in tomllib.loads(after)["identities"]
    assert "# --- agents ---" in after
    assert "# Nobody else." in after
    assert "\n\n\n" not in after
    own = {"deploy-agent": "# The agent that deploys.", "ci": "# Two tokens."}.get(name, "\0")
    assert own not in after
    others = [comment for comment in ("# The agent that deploys.", "# Two tokens.", "# exact names") if comment != own]
    assert [comment for comment in others if comment not in after] == []


INLINE = f'identities = {{ ci = {{ kind = "agent", tokens = [{{ sha256 = "{A}", expires = {END} }}] }} }}\n'
DOTTED = f'identities.ci.kind = "agent"\nidentities.ci.tokens = [{{ sha256 = "{A}", expires = {END} }}]\n'


@pytest.mark.parametrize(
    "attempt",
    [
        lambda: edit.remove_table(INLINE, "identities", "ci"),
        lambda: edit.remove_table(DOTTED, "identities", "ci"),
        lambda: edit.add_table(INLINE, "identities", "new", {"kind": "agent"}),
        lambda: edit.add_token("x = 1\n", "ci", NEW, END),
        lambda: edit.add_token('[identities.ci]\ntokens = "none"\n', "ci", NEW, END),
    ],
    ids=["remove inline", "remove dotted", "add inline", "no identities", "no list"],
)
def test_a_table_in_another_form_is_left_to_an_editor(attempt: Callable[[], str]) -> None:
    with pytest.raises(BadFile) as caught:
        attempt()
    assert caught.value.code == "policy_edit_by_hand"


@pytest.mark.parametrize("text", [INLINE, DOTTED])
def test_tokens_are_removed_from_tables_without_a_header(text: str) -> None:
    assert tokens(edit.remove_tokens(text, [A]), "ci") is None


def test_a_header_inside_a_text_of_several_lines_is_no_table() -> None:
    text = '[identities.a]\nkind = """\n[identities.b]\n# x\n"""\n\n[identities.b]\nkind = "y"\n'
    assert edit.remove_table(text, "identities", "b") == '[identities.a]\nkind = """\n[identities.b]\n# x\n"""\n'


def test_ends_of_lines_and_a_byte_order_mark_stay() -> None:
    raw = b"\xef\xbb\xbf" + POLICY.replace("\n", "\r\n").encode()
    text = edit.decode_policy(raw)
    for change in _CHANGES:
        after = edit.encode_policy(change(text), raw)
        assert after.startswith(b"\xef\xbb\xbf#")
        assert after.count(b"\n") == after.count(b"\r\n")


_CHANGES: tuple[Callable[[str], str], ...] = (
    lambda text: edit.add_token(text, "ci", NEW, END),
    lambda text: edit.add_token(text, "bare", NEW, END),
    lambda text: edit.add_token(text, "deploy-agent", NEW, END),
    lambda text: edit.renew_token(text, A, END.replace("7", "8")),
    lambda text: edit.remove_tokens(text, [A, B]),
    lambda text: edit.add_table(text, "roles", "x", {"principals": ["x"]}),
    lambda text: edit.remove_table(text, "identities", "ci"),
)

_COMMENT = st.sampled_from(["", "# one", "#[x]", '# "', "# ]", "# \u2028 \x1c".replace("\x1c", "\u0085")])


@given(st.lists(st.tuples(st.integers(0, 60), _COMMENT), max_size=12), st.integers(0, len(_CHANGES) - 1))
def test_an_edit_keeps_comments_wherever_they_stand(inserted: list[tuple[int, str]], which: int) -> None:
    lines = POLICY.splitlines()
    for at, comment in inserted:
        lines.insert(at % len(lines), comment)
    text = "\n".join(lines) + "\n"
    plain, after = _CHANGES[which](POLICY), _CHANGES[which](text)
    assert tomllib.loads(plain) == tomllib.loads(after)
    if which not in (4, 6):  # these remove lines
        assert lost("\n".join(comment for _, comment in inserted if comment), after) == []


# --- the file ---------------------------------------------------------------------------------------------------------


def test_a_written_policy_keeps_mode_and_link(tmp_path: Path) -> None:
    real, link = tmp_path / "real.toml", tmp_path / "policy.toml"
    real.write_bytes(b"old")
    real.chmod(0o640)
    link.symlink_to("real.toml")
    edit.write_policy(link, b"old", b"new")
    assert (real.read_bytes(), real.stat().st_mode & 0o777) == (b"new", 0o640)
    assert link.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy.toml", "real.toml"]


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file away")
def test_a_written_policy_keeps_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_bytes(b"old")
    os.chown(path, 1, 2)
    edit.write_policy(path, b"old", b"new")
    assert (path.stat().st_uid, path.stat().st_gid) == (1, 2)


def test_a_policy_that_changed_meanwhile_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_bytes(b"of somebody else")
    with pytest.raises(BadFile) as caught:
        edit.write_policy(path, b"old", b"new")
    assert (caught.value.code, path.read_bytes()) == ("policy_changed", b"of somebody else")


def test_a_policy_that_cannot_be_written_is_named_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(BadFile) as caught:
        edit.write_policy(tmp_path / "none.toml", b"old", b"new")
    assert caught.value.code == "policy_not_written"
    assert "none.toml" in caught.value.text
