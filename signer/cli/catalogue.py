"""The table of verbs: for each its words, section, short help, and where it is defined.

`signer --help`, suggestions and completion read this table; everything else about a verb is beside its function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Entry:
    """One verb: the words after `signer`, and the module in `signer.cli` whose function has the name of the verb."""

    words: str
    section: str
    summary: str
    module: str

    @property
    def function(self) -> str:
        return self.words.replace(" ", "_").replace("-", "_")


_RUN, _START, _POLICY, _ISSUED = "Run", "Before a start", "Policy and credentials", "Issued certificates"
_HUMANS, _STOP, _LEDGER = "Approvals by humans", "Stopping access", "The ledger"
_MOVE, _HELP = "Moving from Vault", "Help"

VERBS: Final = (
    Entry("serve", _RUN, "start the keeper and the API and keep both running", "services"),
    Entry("status", _RUN, "show whether the service is well, on one screen", "status"),
    Entry("reload", _RUN, "take a changed policy, CA key and TLS certificate", "reload"),
    Entry("api", _RUN, "run only the API, for systemd", "services"),
    Entry("keeper", _RUN, "run only the keeper (CA key and ledger), for systemd", "services"),
    Entry("notices run", _RUN, "run only the process that sends notices, for systemd", "services"),
    Entry("notices test", _RUN, "send one test notice to each channel", "services"),
    Entry("init", _START, "write a first policy, settings, token and CA key", "init"),
    Entry("check", _START, "check everything a start depends on", "check"),
    Entry("ca inspect", _START, "show the public facts of a CA key file and check it", "check"),
    Entry("ca new", _START, "create a CA key (never overwrites a file)", "ca"),
    Entry("ca render", _START, "write the CA key from Infisical to a root-owned file", "ca"),
    Entry("ca bundle", _START, "print the CA lines that hosts must trust", "check"),
    Entry("hosts install", _START, "make a host trust the CA, over ssh, with a rollback", "hosts"),
    Entry("hosts add", _START, "list a host's keys, so that clients know it", "host_keys"),
    Entry("hosts list", _START, "list hosts and the keys that clients know them by", "host_keys"),
    Entry("hosts remove", _START, "take a host off the list", "host_keys"),
    Entry("hosts key", _START, "print the key that hosts pin for the revocation list", "publish"),
    Entry("policy check", _POLICY, "validate the policy file; list every problem by line", "policy"),
    Entry("policy list", _POLICY, "list identities, roles and tokens", "access"),
    Entry("policy explain", _POLICY, "explain whether an identity would get a certificate", "policy"),
    Entry("policy import-vault", _POLICY, "convert the SSH roles of Vault or OpenBao to a policy file", "parity"),
    Entry("token new", _POLICY, "create a bearer token and its line for policy.toml", "tokens"),
    Entry("token list", _POLICY, "list the tokens, the next one to expire first", "tokens"),
    Entry("token renew", _POLICY, "give a token another end", "tokens"),
    Entry("token revoke", _POLICY, "remove a token from policy.toml", "tokens"),
    Entry("identity add", _POLICY, "add an identity to policy.toml", "access"),
    Entry("identity remove", _POLICY, "remove an identity from policy.toml", "access"),
    Entry("approval-key add", _POLICY, "add a passkey to policy.toml, with which a human approves", "access"),
    Entry("role add", _POLICY, "add a role to policy.toml", "access"),
    Entry("role show", _POLICY, "show every value of a role", "access"),
    Entry("key enrol", _POLICY, "print the line that restricts an identity or role to a key", "policy"),
    Entry("requests list", _HUMANS, "list requests that wait for a human", "requests"),
    Entry("requests show", _HUMANS, "show exactly what a request would open", "requests"),
    Entry("requests approve", _HUMANS, "sign a request with your security key", "requests"),
    Entry("requests deny", _HUMANS, "deny a request, with a reason", "requests"),
    Entry("requests watch", _HUMANS, "print requests as they come and are decided", "requests"),
    Entry("waivers list", _HUMANS, "list approvals that also cover later requests", "waivers"),
    Entry("waivers end", _HUMANS, "end a waiver at once", "waivers"),
    Entry("incidents list", _HUMANS, "list uses of break-glass", "waivers"),
    Entry("incidents show", _HUMANS, "show one use of break-glass", "waivers"),
    Entry("incidents close", _HUMANS, "close an incident with the commit that repairs it", "waivers"),
    Entry("certs list", _ISSUED, "list certificates, newest first", "ledger"),
    Entry("certs show", _ISSUED, "show everything recorded about one certificate", "ledger"),
    Entry("certs who", _ISSUED, "tell from sshd's log who logged in, why, and who approved it", "who"),
    Entry("revoke", _STOP, "have hosts refuse certificates or a key, for good", "revoke"),
    Entry("revocations", _STOP, "list what was revoked", "revoke"),
    Entry("freeze", _STOP, "stop issuing to an identity, a role or everybody", "freezes"),
    Entry("unfreeze", _STOP, "issue again", "freezes"),
    Entry("freezes", _STOP, "list what is frozen, by whom, since and until when", "freezes"),
    Entry("hosts seen", _STOP, "show which hosts have the newest revocation list", "host_keys"),
    Entry("publish", _STOP, "write what hosts fetch as files for any web server", "publish"),
    Entry("events list", _LEDGER, "list what happened, newest first", "ledger"),
    Entry("ledger verify", _LEDGER, "verify every event, every view and the files", "ledger"),
    Entry("ledger checkpoint", _LEDGER, "print the newest signed checkpoint, for a witness", "checkpoints"),
    Entry("ledger key", _LEDGER, "print the key that checkpoints are verified with", "checkpoints"),
    Entry("ledger witness", _LEDGER, "have witnesses cosign the newest checkpoint", "checkpoints"),
    Entry("ledger head", _LEDGER, "print number, hash and time of the newest event", "ledger"),
    Entry("ledger export", _LEDGER, "print every event as one line of JSON", "ledger"),
    Entry("ledger backup", _LEDGER, "copy the ledger while it is in use, verified", "backup"),
    Entry("ledger restore", _LEDGER, "put a backup in the ledger's place (service stopped)", "backup"),
    Entry("ledger follow", _LEDGER, "keep a verified copy of another host's ledger", "backup"),
    Entry("ledger promote", _LEDGER, "make the followed copy this host's ledger", "backup"),
    Entry("ledger archive", _LEDGER, "move old events to their own file (service stopped)", "backup"),
    Entry("ledger rebuild", _LEDGER, "rebuild the views from the events (keeper stopped)", "ledger"),
    Entry("witness serve", _LEDGER, "be a witness: cosign the checkpoints of logs", "witness"),
    Entry("witness key", _LEDGER, "print the witness's verifier key; the first time, make it", "witness"),
    Entry("witness list", _LEDGER, "list what the witness cosigned, and the forks that it refused", "witness"),
    Entry("cutover plan", _MOVE, "show what a move to the local CA would do", "cutover"),
    Entry("cutover parity", _MOVE, "compare what Vault and the local CA grant", "parity"),
    Entry("cutover apply", _MOVE, "move to the local CA exactly as planned", "cutover"),
    Entry("cutover status", _MOVE, "show the current state, past runs and the next step", "cutover"),
    Entry("cutover rollback", _MOVE, "move back to Vault, possible until it is removed", "cutover"),
    Entry("evidence verify", _MOVE, "verify a run's evidence and its ledger record", "evidence"),
    Entry("decommission plan", _MOVE, "show what removing Vault would do, or what blocks it", "cutover"),
    Entry("decommission apply", _MOVE, "remove Vault exactly as planned", "cutover"),
    Entry("decommission status", _MOVE, "show whether Vault still runs, past runs and the next step", "cutover"),
    Entry("whoami", _HELP, "show whose a token is, what it may do, and when it ends", "tokens"),
    Entry("error", _HELP, "show what an error code means and what to do about it", "error"),
    Entry("completion", _HELP, "print the completion script for bash, zsh or fish", "completion"),
)

# The first words that several verbs share.
GROUPS: Final[Mapping[str, str]] = {
    "ca": "create, inspect, render and publish CA keys",
    "hosts": "make hosts trust the CA, and clients know hosts",
    "policy": "list, validate, explain and import the policy",
    "token": "create, list, renew and revoke bearer tokens",
    "identity": "add and remove identities",
    "approval-key": "add keys with which humans approve",
    "role": "add and show roles",
    "key": "enrol keys of users",
    "requests": "show and decide requests that wait for a human",
    "notices": "tell humans by webhook, ntfy or chat what needs them",
    "waivers": "list and end approvals that also cover later requests",
    "incidents": "list and close uses of break-glass",
    "events": "list what happened",
    "certs": "list and show issued certificates",
    "ledger": "verify, export, back up, restore and follow the ledger",
    "witness": "cosign the checkpoints of logs",
    "cutover": "move the platform from Vault to the local CA, and back",
    "evidence": "verify the evidence of a run",
    "decommission": "remove Vault after the cutover",
}

_BY_WORDS: Final = {tuple(entry.words.split()): entry for entry in VERBS}


def find(words: Sequence[str]) -> Entry | None:
    return _BY_WORDS.get(tuple(words))


def starting_with(words: Sequence[str]) -> list[Entry]:
    """The verbs whose first words these are, in the order of the table."""
    return [entry for entry in VERBS if entry.words.split()[: len(words)] == list(words)]


def next_words(words: Sequence[str]) -> dict[str, str]:
    """What can follow `words`, in the order of the table, with the short help of each."""
    found: dict[str, str] = {}
    for entry in starting_with(words):
        following = entry.words.split()[len(words) :]
        if following:
            found.setdefault(following[0], entry.summary if len(following) == 1 else GROUPS[following[0]])
    return found
