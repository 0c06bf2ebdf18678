"""The verbs that move a platform from Vault to the local CA and back, and remove Vault: part of `verbs.VERBS`."""

from __future__ import annotations

from typing import Final

from signer.cli.arguments import JSON, Argument, Verb, argument, reason, whole

_MOVE: Final = "Moving from Vault"
CONFIG: Final = argument("--config", metavar="FILE", required=True, help="cutover.toml of the platform")
APPROVE: Final = argument("--approve", metavar="PHRASE", help="the approval phrase; without it a terminal is asked")


def _plan_file() -> Argument:
    return argument("plan", metavar="PLAN", help="a plan file as `plan --out` writes it")


PLATFORM_VERBS: Final = (
    Verb(
        "cutover plan",
        _MOVE,
        "what a move to the local CA would do; changes nothing",
        "Reads host, service, Vault and policy.toml, and prints each step with its effect and its undo. The\n"
        "plan file holds all that the steps depend on, under one digest: `apply` applies that or nothing.",
        ("signer cutover plan --config cutover.toml --out plan.json",),
        (
            CONFIG,
            argument("--out", metavar="PLAN", help="write the plan there, for `apply`"),
            argument("--commands", action="store_true", help="show the commands that would be run, too"),
            JSON,
        ),
        "cutover",
        "cutover_plan",
    ),
    Verb(
        "cutover parity",
        _MOVE,
        "would the local CA give what Vault gives? asks both",
        "Role against role, then real requests to both for keys that nobody has, compared field by field. What is\n"
        "wider here, or names other principals, is an error; what is stricter a note. Where the running service is\n"
        "not in mode local yet, one on trial signs, beside it and apart. Exit status 1 if there is an error.",
        ("signer cutover parity --config cutover.toml", "signer cutover parity --config cutover.toml --json"),
        (
            CONFIG,
            argument("--samples", metavar="N", type=whole(1, 1000), default=20, help="how many requests; default 20"),
            JSON,
        ),
        "parity",
        "cutover_parity",
    ),
    Verb(
        "cutover apply",
        _MOVE,
        "move to the local CA, exactly as planned",
        "Needs the approval phrase, on the command line or typed at a terminal. A plan whose world has changed\n"
        "is refused (exit 4), a wrong phrase changes nothing (exit 3). Whatever fails after the service was\n"
        "changed brings it back to Vault by itself. A run that was cut off goes on with the same plan.",
        ("signer cutover apply plan.json --approve PHRASE",),
        (_plan_file(), APPROVE, JSON),
        "cutover",
        "cutover_apply",
    ),
    Verb(
        "cutover status",
        _MOVE,
        "what runs now, what was done, what comes next",
        "Reads the service's state and the journals of all runs, and says how to go on after a crash.",
        ("signer cutover status --config cutover.toml",),
        (CONFIG, JSON),
        "cutover",
        "cutover_status",
    ),
    Verb(
        "cutover rollback",
        _MOVE,
        "back to Vault, at any time before it is removed",
        "Starts the service without the overlay, and proves by logins that Vault signs. Refused, with nothing\n"
        "changed, if Vault does not sign. Ends a cutover that was cut off, too.",
        ('signer cutover rollback --config cutover.toml --reason "edge1 lacks the new CA"',),
        (CONFIG, argument("--reason", metavar="TEXT", type=reason, required=True, help="why, for the record"), JSON),
        "cutover",
        "cutover_rollback",
    ),
    Verb(
        "evidence verify",
        _MOVE,
        "is a run's evidence as it was sealed, and in the ledger?",
        "Holds every file against SHA256SUMS, plan, approvals and outcome against each other, and asks the ledger\n"
        "for the digest: the running service that cutover.toml names, or without --config the ledger file in\n"
        "SIGNER_DATA_DIR. Exit status 1 if anything is wrong; a warning is not.",
        (
            "signer evidence verify /var/lib/safe-session/evidence/2026-11-22T14-05-02Z-cutover",
            "signer evidence verify . --config cutover.toml --json",
        ),
        (
            argument("directory", metavar="DIR", help="the directory of one run"),
            argument("--config", metavar="FILE", help="cutover.toml of the platform, to ask its service"),
            JSON,
        ),
        "evidence",
        "evidence_verify",
    ),
    Verb(
        "decommission plan",
        _MOVE,
        "what removing Vault would do, or what stands in the way",
        "Reads names and counts of all that is in Vault, never a secret's value, with ledger, evidence, audit log\n"
        "and logins. Whatever stands in the way is listed with what to do, and then there is no plan (exit 1).",
        ("signer decommission plan --config cutover.toml --out plan.json",),
        (
            CONFIG,
            argument("--out", metavar="PLAN", help="write the plan there, for `apply`"),
            argument("--commands", action="store_true", help="show the commands that would be run, too"),
            JSON,
        ),
        "decommission",
        "decommission_plan",
    ),
    Verb(
        "decommission apply",
        _MOVE,
        "remove Vault, exactly as planned",
        "Needs its own approval phrase. Takes a snapshot, disables the SSH mount, revokes the tokens, seals and\n"
        "stops Vault, and proves that it is gone and that logins work. From the SSH mount on there is no undo.\n"
        "A run that was cut off goes on with the same plan, with or without Vault.",
        (
            "signer decommission apply plan.json --approve PHRASE",
            "signer decommission apply plan.json --approve PHRASE --data-is-removed",
        ),
        (
            _plan_file(),
            APPROVE,
            argument("--config", metavar="FILE", help="cutover.toml, if not where the plan was made"),
            argument(
                "--data-is-removed",
                action="store_true",
                help="on your word Vault's data was removed by hand, after the command for it failed",
            ),
            JSON,
        ),
        "decommission",
        "decommission_apply",
    ),
    Verb(
        "decommission status",
        _MOVE,
        "whether Vault is still there, what was done, what comes next",
        "Reads the service's ledger, the journals of all runs and Vault's seal state; needs no Vault.",
        ("signer decommission status --config cutover.toml",),
        (CONFIG, JSON),
        "decommission",
        "decommission_status",
    ),
)
