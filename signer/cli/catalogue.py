"""Every verb of the `signer` command as data: words, help, arguments, and the function that does it.

Help, dispatch and tests are made from `VERBS`. Nothing is imported that makes `signer --help` slow.
"""

from __future__ import annotations

import argparse
from typing import Final

from signer.cli.arguments import (
    JSON,
    KEY_KINDS,
    MAX_SEQ,
    MAX_SERIAL,
    Verb,
    address,
    argument,
    duration,
    fingerprint,
    head,
    identity,
    pause,
    token_life,
    whole,
)
from signer.cli.platform_catalogue import PLATFORM_VERBS

__all__ = ["VERBS", "Verb"]

MAX_PAGE: Final = 1_000

_LOOK, _POLICY, _ISSUED, _LEDGER = "Before a start", "Policy and credentials", "What was issued", "The ledger"
_HASH_RULE: Final = """\
Anybody can check the lines without this program: `hash` is the hex SHA-256 of the RFC 8785
canonical JSON (UTF-8) of {actor, body, kind, prev, seq, time}, that is of the line without its
`hash`; `prev` is the `hash` of the line before, 64 zeros in line 1; `seq` counts from 1; `time`
is milliseconds since 1970 UTC."""

VERBS: Final = (
    Verb(
        "serve",
        "Run",
        "start keeper and API, and keep both alive",
        "Checks the settings, starts the keeper and the API, each under its own user when started as root,\n"
        "starts either again when it dies, and forwards signals. SIGHUP reads policy and key file again.",
        ("signer serve",),
        lists_settings=True,
    ),
    Verb(
        "keeper",
        "Run",
        "the process with key and ledger alone, for systemd",
        "Holds the CA key and the ledger, decides, records and signs what comes through its socket. SIGHUP\n"
        "reads policy and key file again. The API is then started separately:\n"
        "gunicorn -k signer.api.worker.PatientWorker 'signer.api.app:create_app()'",
        ("signer keeper",),
        # How `signer serve` hands the CA key file over at SIGHUP; of no use to anybody else.
        (argument("--key-channel", type=whole(3, 1_000_000), help=argparse.SUPPRESS),),
        lists_settings=True,
    ),
    Verb(
        "check",
        _LOOK,
        "would it start? settings, users, policy, key file, ledger",
        "Looks at everything a start depends on, changes nothing, and says `ok`, `warn` or `FAIL` for each.\n"
        "In a checkout of the repository it also compares overlays, runbooks and preflight with the program.\n"
        "Run it as the user that starts the service. Exit status 1 if anything failed.",
        ("signer check", "signer check --json | jq '.checks[] | select(.outcome != \"ok\")'"),
        (JSON,),
        "check",
        "check",
        lists_settings=True,
    ),
    Verb(
        "ca inspect",
        _LOOK,
        "the public facts of a CA key file, and each check on it",
        "Kind, size, fingerprint and public line of a key; nothing of the private half is ever shown. For a\n"
        "private key file it tells, too, what the keeper would say to owner, mode, links, content and pin.\n"
        "A file whose name ends in .pub is read as a public key. Exit status 1 if a check failed.",
        ("signer ca inspect /run/signer-ca/ca", "signer ca inspect ca.pub --json"),
        (argument("file", metavar="FILE", help="a CA key file, or its .pub"), JSON),
        "check",
        "ca_inspect",
    ),
    Verb(
        "ca new",
        _LOOK,
        "make a new CA key, in a file that must not exist",
        "Writes the key, 0400, and shows its public line, its fingerprint and how to bring it into use by hand.\n"
        "Nothing of the private half is shown, and nothing is written to Infisical.",
        ("signer ca new --out /dev/shm/ca", "signer ca new --out /dev/shm/ca --kind ecdsa256 --json"),
        (
            argument("--out", metavar="FILE", required=True, help="a file that does not exist"),
            argument("--kind", choices=KEY_KINDS, default="ed25519", help="default ed25519"),
            JSON,
        ),
        "ca",
        "ca_new",
    ),
    Verb(
        "ca render",
        _LOOK,
        "bring the CA key from Infisical to a root-owned file",
        "Fetches the key, checks it against SIGNER_CA_FINGERPRINT and puts it in place in one step, 0400. The same\n"
        "key is left as it is. --check writes nothing; exit status 1 if file and Infisical differ. With --watch it\n"
        "goes on until SIGTERM and renders again on a change; it signals nobody.",
        ("signer ca render --to /run/signer-ca/ca", "signer ca render --to /run/signer-ca/ca --check --json"),
        (
            argument("--to", metavar="FILE", required=True, help="an absolute path, on a memory file system"),
            argument("--check", action="store_true", help="write nothing, say whether they agree"),
            argument("--watch", metavar="60s", type=pause, help="render again every so often"),
            argument("--allow-disk", action="store_true", help="take a target that outlives a reboot"),
            JSON,
        ),
        "ca",
        "ca_render",
    ),
    Verb(
        "ca bundle",
        _LOOK,
        "the CA lines that hosts must trust: current, next, retired",
        "What `GET /api/ca` of the running service answers, made from the policy file: for TrustedUserCAKeys. The\n"
        "public half of the key file is read only if the policy does not say `ca.public_key`.",
        ("signer ca bundle > signer-ca.pub", "signer ca bundle --json | jq -r '.keys[].fingerprint'"),
        (JSON,),
        "check",
        "ca_bundle",
    ),
    Verb(
        "policy check",
        _POLICY,
        "is the policy file good? all its problems, with their lines",
        "Reads the policy file as the keeper would. Exit status 1 if it has a problem.",
        ("signer policy check", "signer policy check policy.toml --json"),
        (
            argument("file", metavar="FILE", nargs="?", help="default: SIGNER_POLICY_FILE"),
            JSON,
        ),
        "policy",
        "policy_check",
    ),
    Verb(
        "policy explain",
        _POLICY,
        "why somebody would get a certificate, or not",
        "Asks every rule of the policy file, also those after one that refuses; signs and records nothing.\n"
        "Limits and freezes are the running keeper's knowledge and are not looked at. Exit status 1 if refused.",
        (
            "signer policy explain llmops --as deploy-agent",
            "signer policy explain llmops --as deploy-agent --key id.pub --ttl 2h --address 10.0.0.7",
        ),
        (
            argument("role", metavar="ROLE", help="the role that is asked for"),
            argument("--as", dest="identity", metavar="IDENTITY", required=True, help="who asks"),
            argument("--key", metavar="FILE", help="the public key to be certified, such as id.pub"),
            argument("--ttl", type=duration, help="such as 15m or 1h30m; default: the role's"),
            argument("--principal", action="append", metavar="NAME", help="repeat for more; default: the role's"),
            argument("--extension", action="append", metavar="NAME", help="repeat for more; default: the role's"),
            argument("--reason", help="why, for roles that want to know"),
            argument("--address", metavar="IP", type=address, help="where the caller asks from"),
            JSON,
        ),
        "policy",
        "policy_explain",
    ),
    Verb(
        "policy import-vault",
        _POLICY,
        "the SSH roles of a live Vault or OpenBao as a policy file",
        "Reads the roles and writes the policy.toml that equals them; where ours gives less a comment says so, and\n"
        "what cannot be carried over is listed. Who may ask, and the CA key's pin, are yours to fill in. The token\n"
        "needs read and list on MOUNT/roles, read on MOUNT/config/ca and on sys/mounts/MOUNT/tune.",
        (
            "signer policy import-vault --address https://vault.example:8200 --token-file ~/.vault --mount ssh",
            "signer policy import-vault --address http://127.0.0.1:8200 --token-file t --mount ssh --out policy.toml",
        ),
        (
            argument("--address", metavar="URL", required=True, help="where Vault or OpenBao is"),
            argument("--token-file", metavar="FILE", required=True, help="a file with its token, for its owner only"),
            argument("--mount", metavar="NAME", required=True, help="the mount of its SSH engine"),
            argument("--ca-file", metavar="FILE", help="certificates that vouch for its TLS"),
            argument("--role", action="append", metavar="NAME", help="repeat for more; default: all"),
            argument("--fingerprint", metavar="SHA256:…", type=fingerprint, help="of the local CA key, to pin it"),
            argument("--out", metavar="FILE", help="a file that does not exist; default: stdout"),
            JSON,
        ),
        "parity",
        "policy_import_vault",
    ),
    Verb(
        "token new",
        _POLICY,
        "make a bearer token, and the policy line for it",
        "Prints the token on stdout, once: it is stored nowhere. The line for policy.toml, which holds only\n"
        "the token's SHA-256, goes to stderr; with --json all is on stdout.",
        ("signer token new deploy-agent --expires 90d", "signer token new ci --expires 12h --json"),
        (
            argument("identity", metavar="IDENTITY", type=identity, help="whose token it will be"),
            argument("--expires", metavar="TIME", type=token_life, required=True, help="from now, such as 90d"),
            JSON,
        ),
        "policy",
        "token_new",
    ),
    Verb(
        "certs list",
        _ISSUED,
        "certificates, newest first",
        "Reads the ledger in SIGNER_DATA_DIR, also while the keeper runs. Times are UTC.",
        ("signer certs list --active", "signer certs list --identity deploy-agent --limit 200 --json"),
        (
            argument("--identity", metavar="NAME", help="issued to this identity"),
            argument("--role", metavar="NAME", help="of this role"),
            argument("--principal", metavar="NAME", help="good for this principal"),
            argument("--fingerprint", metavar="SHA256:…", help="for this public key"),
            argument("--backend", choices=("local", "vault"), help="signed by the CA key here, or by Vault"),
            argument("--active", action="store_true", help="released and not yet expired"),
            argument(
                "--limit", metavar="N", type=whole(1, MAX_PAGE), default=50, help=f"at most {MAX_PAGE}; default 50"
            ),
            argument("--before", metavar="SEQ", type=whole(1, MAX_SEQ), help="the next page, as this one says"),
            JSON,
        ),
        "ledger",
        "certs_list",
    ),
    Verb(
        "certs show",
        _ISSUED,
        "all that was recorded of one certificate",
        "Reads the ledger in SIGNER_DATA_DIR, also while the keeper runs.",
        ("signer certs show 4711",),
        (
            argument("serial", metavar="SERIAL", type=whole(0, MAX_SERIAL), help="as `certs list` shows it"),
            JSON,
        ),
        "ledger",
        "certs_show",
    ),
    Verb(
        "ledger verify",
        _LEDGER,
        "check every event, every table and the file",
        "Follows the hash chain from the first event to the last and compares the tables with the events.\n"
        "A head that was written down earlier also finds a tail that was cut off. Exit status 1 if broken.",
        ("signer ledger verify", 'signer ledger verify --head "$(cat head-of-last-week)"'),
        (
            argument("--head", metavar="SEQ:HASH", type=head, help="an earlier output of `signer ledger head`"),
            JSON,
        ),
        "ledger",
        "ledger_verify",
    ),
    Verb(
        "ledger head",
        _LEDGER,
        "the newest event's number, hash and time, to write down",
        "Keep it where the keeper cannot write. `signer ledger verify --head` compares with it.",
        ("signer ledger head > head-of-this-week",),
        (JSON,),
        "ledger",
        "ledger_head",
    ),
    Verb(
        "ledger export",
        _LEDGER,
        "every event as a line of JSON, for anybody to verify",
        "Writes {actor, body, hash, kind, prev, seq, time} for each event, unverified, with or without --json.\n\n"
        + _HASH_RULE,
        ("signer ledger export > ledger.jsonl", "signer ledger export --from 1000 | jq -r .kind | sort | uniq -c"),
        (
            argument("--from", dest="first", metavar="SEQ", type=whole(1, MAX_SEQ), default=1, help="default 1"),
            JSON,
        ),
        "ledger",
        "ledger_export",
    ),
    Verb(
        "ledger rebuild",
        _LEDGER,
        "make the tables anew from the events; keeper stopped",
        "Takes the write lock, checks the chain on the way, and replaces the tables in one transaction: after\n"
        "any failure they are as they were. Events are never changed. Refused while a keeper runs.",
        ("signer ledger rebuild",),
        (JSON,),
        "ledger",
        "ledger_rebuild",
    ),
    *PLATFORM_VERBS,
    Verb(
        "error",
        "Help",
        "what an error code means and what to do about it",
        "Codes are in the JSON of errors, in the ledger and in metrics. Without CODE, lists all codes, one line\n"
        "each: code, HTTP status (- if it is never sent over HTTP), meaning.",
        ("signer error frozen", "signer error --json | jq -r '.errors[].code'"),
        (
            argument("code", metavar="CODE", nargs="?", help="an error code, such as frozen; default: all"),
            JSON,
        ),
        "error",
        "error",
    ),
)
