"""Command lines that are not valid: sentence, hint and exit status of each, and what a suggestion may be."""

from __future__ import annotations

import shlex

import pytest

from signer.cli.catalogue import VERBS
from signer.cli.suggestions import distance, nearest, suggest_verb
from tests.parts.command import run

LEDGER = "verify|checkpoint|key|witness|head|export|backup|restore|follow|promote|archive|rebuild"
STATES = "pending, approved, denied, expired, withdrawn, issued, lapsed, all"
CASES = (
    ("", "no verb given", "see `signer --help`, or begin with `signer check`"),
    ("polcy check", 'there is no verb "polcy"', "did you mean `signer policy check`"),
    ("chekc", 'there is no verb "chekc"', "did you mean `signer check`"),
    ("explain llmops", 'there is no verb "explain"', "write signer policy explain"),
    ("verify", 'there is no verb "verify"', "write signer ledger verify, signer evidence verify"),
    ("policy", "policy needs a second word", "write signer policy check|list|explain|import-vault"),
    ("policy lst", 'there is no verb "policy lst"', "did you mean `signer policy list`"),
    ("policy --json", "policy needs a second word", "write signer policy check|list|explain|import-vault"),
    ("token", "token needs a second word", "write signer token new|list|renew|revoke"),
    ("token revok deploy-agent", 'there is no verb "token revok"', "did you mean `signer token revoke`"),
    ("token delete deploy-agent", 'there is no verb "token delete"', "write signer token new|list|renew|revoke"),
    ("token remove deploy-agent", 'there is no verb "token remove"', "write signer token new|list|renew|revoke"),
    ("token create ci", 'there is no verb "token create"', "write signer token new|list|renew|revoke"),
    ("token nwe ci", 'there is no verb "token nwe"', "did you mean `signer token new`"),
    ("tokens list", 'there is no verb "tokens"', "did you mean `signer token list`"),
    ("identity revoke ci", 'there is no verb "identity revoke"', "write signer identity add|remove"),
    ("identity delete ci", 'there is no verb "identity delete"', "write signer identity add|remove"),
    ("identiy add ci", 'there is no verb "identiy"', "did you mean `signer identity add`"),
    ("role list", 'there is no verb "role list"', "write signer role add|show"),
    ("role delete llmops", 'there is no verb "role delete"', "write signer role add|show"),
    ("role ad x", 'there is no verb "role ad"', "write signer role add|show"),
    ("cert list", 'there is no verb "cert"', "did you mean `signer certs list`"),
    ("certs", "certs needs a second word", "write signer certs list|show|who"),
    ("certs find 3", 'there is no verb "certs find"', "write signer certs list|show|who"),
    ("certificate list", 'there is no verb "certificate"', "see `signer --help`"),
    ("ledger verfiy", 'there is no verb "ledger verfiy"', "did you mean `signer ledger verify`"),
    ("ledger check", 'there is no verb "ledger check"', f"write signer ledger {LEDGER}"),
    ("ledger copy", 'there is no verb "ledger copy"', f"write signer ledger {LEDGER}"),
    ("witness", "witness needs a second word", "write signer witness serve|key|list"),
    ("witness add", 'there is no verb "witness add"', "write signer witness serve|key|list"),
    ("witness serve --name w", "missing: --log", "see `signer witness serve --help`"),
    ("unfreze all", 'there is no verb "unfreze"', "did you mean `signer unfreeze`"),
    ("cutover", "cutover needs a second word", "write signer cutover plan|parity|apply|status|rollback"),
    ("cutover revert", 'there is no verb "cutover revert"', "write signer cutover plan|parity|apply|status|rollback"),
    ("cutover aply plan.json", 'there is no verb "cutover aply"', "did you mean `signer cutover apply`"),
    ("rollback", 'there is no verb "rollback"', "write signer cutover rollback"),
    ("decomission plan", 'there is no verb "decomission"', "did you mean `signer decommission plan`"),
    ("decommission rolback", 'there is no verb "decommission rolback"', "write signer decommission plan|apply|status"),
    ("decommission undo", 'there is no verb "decommission undo"', "write signer decommission plan|apply|status"),
    ("start", 'there is no verb "start"', "see `signer --help`"),
    ("stop", 'there is no verb "stop"', "see `signer --help`"),
    ("restart", 'there is no verb "restart"', "see `signer --help`"),
    ("delete", 'there is no verb "delete"', "see `signer --help`"),
    ("remove", 'there is no verb "remove"', "write signer hosts remove, signer identity remove"),
    ("lst", 'there is no verb "lst"', "see `signer --help`"),
    ("--json check", 'unexpected option "--json"', "options go after the verb: `signer VERB --flag`"),
    ("-V", 'unexpected option "-V"', "options go after the verb: `signer VERB --flag`"),
    ("check now", 'unexpected argument "now"', "see `signer check --help`"),
    ("check --jsn", "signer check has no flag --jsn", "did you mean --json"),
    ("check --json=yes", "--json takes no value", "see `signer check --help`"),
    ("certs list --limt 3", "signer certs list has no flag --limt", "did you mean --limit"),
    ("certs list --limit", "--limit needs a value", "see `signer certs list --help`"),
    ("certs list --limit --json", "--limit needs a value", "see `signer certs list --help`"),
    ("certs list --limit 0", '--limit: "0" is not a whole number from 1 to 1000', "see `signer certs list --help`"),
    (
        "certs list --limit=many",
        '--limit: "many" is not a whole number from 1 to 1000',
        "see `signer certs list --help`",
    ),
    ("certs list --backend both", '--backend: "both" is not one of local, vault', "see `signer certs list --help`"),
    ("certs list --backend locla", '--backend: "locla" is not one of local, vault', "did you mean local"),
    ("requests list --state=pendign", f'--state: "pendign" is not one of {STATES}', "did you mean pending"),
    ("completion zhs", 'SHELL: "zhs" is not one of bash, zsh, fish', "did you mean zsh"),
    ("certs show", "missing: SERIAL", "see `signer certs show --help`"),
    ("certs show -1", 'SERIAL: "-1" is not a serial number', "see `signer certs show --help`"),
    ("certs show first", 'SERIAL: "first" is not a serial number', "see `signer certs show --help`"),
    ("certs show 1 2", 'unexpected argument "2"', "see `signer certs show --help`"),
    ("token revoke", "missing: TOKEN", "see `signer token revoke --help`"),
    ("token revoke deploy-agent --al", "signer token revoke has no flag --al", "did you mean --all"),
    ("token renew deploy-agent", "missing: --expires", "see `signer token renew --help`"),
    ("token renew deploy-agent --expires", "--expires needs a value", "see `signer token renew --help`"),
    (
        "token renew deploy-agent --expires soon",
        "--expires: 'soon' is not a duration such as 90s, 15m, 1h30m or 90d",
        "see `signer token renew --help`",
    ),
    (
        "token renew deploy-agent --expires 10s",
        '--expires: "10s" is not between 1m and 3650d',
        "see `signer token renew --help`",
    ),
    (
        "token new Deploy --expires 1d",
        'IDENTITY: "Deploy" is not a valid identity: lower case letters, digits, and . _ @ - inside, at most 64',
        "see `signer token new --help`",
    ),
    (
        "token new keeper --expires 1d",
        'IDENTITY: "keeper" is reserved: the ledger uses it as an actor',
        "see `signer token new --help`",
    ),
    ("identity add ci", "missing: --kind", "see `signer identity add --help`"),
    (
        "identity add ci --kind robot",
        '--kind: "robot" is not one of human, agent, workload',
        "see `signer identity add --help`",
    ),
    (
        "identity add ci --kind agent --may everything",
        '--may: "everything" is not one of approve, freeze, hosts, ledger.read, operate, revoke',
        "see `signer identity add --help`",
    ),
    ("role add x", "missing: --principal", "see `signer role add --help`"),
    (
        "role add x --principal p --max-ttl long",
        "--max-ttl: 'long' is not a duration such as 90s, 15m, 1h30m or 90d",
        "see `signer role add --help`",
    ),
    (
        "role add x --principal p --per-minute 0",
        '--per-minute: "0" is not a whole number from 1 to 1000000',
        "see `signer role add --help`",
    ),
    ("policy explain llmops", "missing: --as", "see `signer policy explain --help`"),
    (
        "policy explain llmops --as ci --ttl soon",
        "--ttl: 'soon' is not a duration such as 90s, 15m, 1h30m or 90d",
        "see `signer policy explain --help`",
    ),
    (
        "policy explain llmops --as ci --address here",
        '--address: "here" is not an IP address',
        "see `signer policy explain --help`",
    ),
    (
        "ledger verify --head 7",
        '--head: "7" is not SEQ:HASH as `signer ledger head` prints it',
        "see `signer ledger verify --help`",
    ),
    (
        "ledger export --from 0",
        '--from: "0" is not a whole number from 1 to 9223372036854775807',
        "see `signer ledger export --help`",
    ),
    ('policy check ""', "FILE: the name of a file must not be empty", "see `signer policy check --help`"),
    ("ca new", "missing: --out", "see `signer ca new --help`"),
    ("ca key", 'there is no verb "ca key"', "write signer ca inspect|new|render|bundle"),
    ("key enroll id.pub", 'there is no verb "key enroll"', "did you mean `signer key enrol`"),
    ("completion tcsh", 'SHELL: "tcsh" is not one of bash, zsh, fish', "see `signer completion --help`"),
    ("help nothing", 'there is no verb "nothing"', "see `signer --help`"),
)


@pytest.mark.parametrize("line, sentence, hint", CASES, ids=[line or "nothing" for line, _, _ in CASES])
def test_a_wrong_command_line_has_a_sentence_a_hint_and_status_2(line: str, sentence: str, hint: str) -> None:
    ran = run(*shlex.split(line))
    assert (ran.status, ran.out) == (2, "")
    assert ran.err == f"signer: error: {sentence}\nsigner: hint: {hint}\n"


def test_there_are_sixty_cases_and_more() -> None:
    assert len({line for line, _, _ in CASES}) >= 60


@pytest.mark.parametrize(
    "one, other, expected",
    [("", "", 0), ("new", "new", 0), ("nwe", "new", 1), ("ne", "new", 1), ("neww", "new", 1), ("mew", "new", 1),
     ("renew", "new", 2), ("revoke", "remove", 2), ("abc", "", 3), ("verfiy", "verify", 1), ("ca", "abc", 3)],
)  # fmt: skip
def test_the_distance_of_words_counts_typing_errors(one: str, other: str, expected: int) -> None:
    assert distance(one, other) == distance(other, one) == expected


def test_no_verb_is_suggested_for_another_one() -> None:
    """Each word of a verb, and its nearest neighbours among acts, mean themselves and nothing else."""
    names = {word for entry in VERBS for word in entry.words.split()}
    acts = (
        "delete",
        "remove",
        "create",
        "destroy",
        "undo",
        "revert",
        "disable",
        "enable",
        "drop",
        "show",
        "get",
        "set",
    )
    for entry in VERBS:
        *group, name = entry.words.split()
        assert suggest_verb(entry.words.split()) == entry.words
        for act in {*acts, *names} - {name}:
            suggested = suggest_verb([*group, act])
            assert suggested in (None, " ".join([*group, act])), f"{entry.words} is not {act}"


def test_a_word_between_two_is_neither() -> None:
    assert nearest("lst", ["last", "list"]) is None
    assert nearest("x" * 100_000, ["list"]) is None
