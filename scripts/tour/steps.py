"""The steps of `scripts/quickstart --tour`: an operator's day, one entry a step.

A step is a title, a command as an operator types it, and what its output must show; `walk.py` runs them in this order,
in one folder, with the settings that `signer init` wrote there. To add a step, add an entry. Only constants live here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Step:
    """One command. `expects` is a regular expression that its output, stdout and stderr, must contain.

    With `log` the command goes on in the background until the tour ends, its output goes to that file, and the step is
    over when the file contains what is expected. `lines` of the output are shown at most. A step with `on_host` needs
    the host of `throwaway-host`; it is left out, and the tour says so, where none can be made.
    """

    title: str
    command: str
    expects: str
    status: int = 0
    log: str = ""
    lines: int = 12
    on_host: bool = False


TRUST: Final = "signer ca bundle >web1/trusted-ca && cat web1/trusted-ca"
LOGIN: Final = "safe-session ssh -F web1/ssh_config web1 id"
AGENT_LOGIN: Final = (
    "SAFE_SESSION_TOKEN_FILE=deploy-agent.token safe-session --role deploy ssh -F web1/ssh_config web1 restart"
)
LOGIN_WEB2: Final = "safe-session ssh -F web2/ssh_config web2 id"
ON_WEB2: Final = "throwaway-host run web2"
INSTALL: Final = (
    f"{ON_WEB2} scripts/host/install --ca trusted-ca --principals root=llmops "
    "--url $SAFE_SESSION_ADDR/api --publisher publisher"
)
VERIFY: Final = f"{ON_WEB2} scripts/host/verify"

STEPS: Final = (
    # --- install -----------------------------------------------------------------------------------------------------
    Step(
        "Write a first policy, settings, a token and a CA key",
        "signer init etc --platform tour --operator alice --yes",
        r"role llmops, identity alice",
        lines=4,
    ),
    Step("Check everything a start depends on", "signer check", r"(?m)^ready: ", lines=30),
    Step("Start the service", "signer serve", r"serving on 127\.0\.0\.1", log="service.log"),
    Step("Let a host trust the CA", TRUST, r"ssh-ed25519 .*current"),
    Step("Start that host's sshd", "/usr/sbin/sshd -D -e -f web1/sshd_config", r"Server listening", log="sshd.log"),
    # --- log in ------------------------------------------------------------------------------------------------------
    Step("Log in: a key and a certificate for this session, neither on disk", LOGIN, r"uid="),
    Step("Whose token is this, and when does it end?", "safe-session whoami", r"alice"),
    # --- set up a host -----------------------------------------------------------------------------------------------
    Step(
        "The key that hosts verify the revocation list with",
        "signer hosts key >web2/publisher && cat web2/publisher",
        r"ssh-ed25519 \S+ signer-publishing",
    ),
    Step(
        "A second host, with files of its own in memory; it trusts no CA yet",
        "throwaway-host start web2",
        r"Server listening",
        log="web2.log",
        on_host=True,
    ),
    Step("It lets nobody in", LOGIN_WEB2, r"Permission denied", status=255, on_host=True),
    Step(
        "See what the host kit would change there",
        f"cp web1/trusted-ca web2 && {INSTALL} --check",
        r"would reload +sshd",
        lines=30,
        on_host=True,
    ),
    Step(
        "Install: it rolls back by itself unless a new login confirms it",
        f"{INSTALL} | tee web2/installed",
        r"installed, not confirmed",
        lines=30,
        on_host=True,
    ),
    Step(
        "Confirm it from another machine, in a login by certificate",
        "safe-session ssh -F web2/ssh_config web2 \"$(sed -n 's/.*there, as root: *//p' web2/installed)\"",
        r"confirmed by a login from 127\.0\.0\.2",
        on_host=True,
    ),
    Step(
        "What that host trusts, and how old its revocation list is",
        VERIFY,
        r"(?s)ok +installed +confirmed.*ok +list +version \d+",
        on_host=True,
    ),
    Step(
        "Would this certificate be accepted there, and why?",
        "safe-session exec -- ssh-add -L | grep cert-v01 >web2/alice-cert.pub && "
        f"{VERIFY} --certificate alice-cert.pub --account root",
        r"accepted: sshd would let it in as root",
        on_host=True,
    ),
    # --- give access -------------------------------------------------------------------------------------------------
    Step(
        "Add a role: one command, ten minutes at most",
        "signer role add deploy --principal llmops --max-ttl 10m --force-command 'echo deployed' --write",
        r"policy\.toml is written",
    ),
    Step(
        "Add an agent that may ask for it",
        "signer identity add deploy-agent --kind agent --role deploy --role llmops --write",
        r"policy\.toml is written",
    ),
    Step(
        "Give it a token; the policy has its hash",
        "signer token new deploy-agent --expires 90d --write >deploy-agent.token && chmod 0400 deploy-agent.token",
        r"policy\.toml is written",
    ),
    Step("Validate the policy", "signer policy check", r"policy\.toml", lines=30),
    Step("Take it, without a restart", "signer reload", r"identities +added deploy-agent"),
    Step(
        "The agent logs in; sshd runs the role's command",
        AGENT_LOGIN,
        r"deployed",
    ),
    Step(
        "A certificate of its other role would be accepted on the second host",
        "SAFE_SESSION_TOKEN_FILE=deploy-agent.token safe-session --role llmops exec -- ssh-add -L | "
        f"grep cert-v01 >web2/agent-cert.pub && {VERIFY} --certificate agent-cert.pub --account root",
        r"accepted: sshd would let it in as root",
        on_host=True,
    ),
    # --- see ---------------------------------------------------------------------------------------------------------
    Step("See the service on one screen", "signer status", r"keeper", lines=30),
    Step("Who may get what", "signer policy list", r"deploy-agent +agent", lines=30),
    Step(
        "Why would this be refused?",
        "ssh-keygen -q -t ed25519 -N '' -f key && "
        "signer policy explain deploy --as deploy-agent --key key.pub --ttl 2h",
        r"above the role's maximum",
        status=1,
        lines=30,
    ),
    Step("What was issued", "signer certs list", r"deploy-agent", lines=30),
    Step(
        "Who logged in, from sshd's own log",
        "grep 'Accepted publickey' sshd.log | signer certs who",
        r"deploy-agent +deploy",
        lines=30,
    ),
    Step("What happened, newest first", "signer events list --limit 5", r"certificate\.", lines=30),
    # --- change and end access ---------------------------------------------------------------------------------------
    Step("Give the agent's token another end", "signer token renew deploy-agent --expires 30d --write", r"is written"),
    Step("Take the token away", "signer token revoke deploy-agent --write && signer reload", r"tokens +removed"),
    Step("It opens nothing any more", AGENT_LOGIN, r"the token is unknown", status=77),
    Step(
        "Revoke what it got: hosts that fetch the list refuse it, and it gets nothing more",
        "signer revoke --identity deploy-agent --reason 'a drill' --yes",
        r"revoked by identity deploy-agent: list version \d+, and identity:deploy-agent is frozen",
    ),
    Step(
        "The list as sshd reads it",
        "until curl -fsS -o list $SAFE_SESSION_ADDR/api/krl && ssh-keygen -Qlf list | grep serial; do sleep 0.2; done",
        r"serial: \d+",
    ),
    Step(
        "The second host fetches it, as it does each minute by itself",
        f"{ON_WEB2} /usr/local/libexec/safe-session-host/update",
        r"up to date: version \d+",
        on_host=True,
    ),
    Step(
        "The agent's certificate is refused there",
        f"{VERIFY} --certificate agent-cert.pub --account root",
        r"FAIL +revoked ",
        status=1,
        on_host=True,
    ),
    Step(
        "What is still valid: nothing of the agent's",
        "signer certs list --active",
        r"(?s)\A(?!.*deploy-agent).*alice",
        lines=30,
    ),
    Step("What was revoked, by whom and why", "signer revocations", r"identity +deploy-agent +a drill"),
    # --- stop everything ---------------------------------------------------------------------------------------------
    Step("Stop issuing at once, to everybody", "signer freeze all --reason 'a drill' --until 1h", r"all is frozen"),
    Step("Nobody gets a certificate", LOGIN, r"frozen", status=77),
    Step("Issue again", "signer unfreeze all", r"all is no longer frozen"),
    # --- rotate ------------------------------------------------------------------------------------------------------
    Step("Rotate the CA key: make the next one", "signer ca new --out etc/next-ca", r"fingerprint", lines=2),
    Step(
        "Name it as next in the policy",
        'sed -i "/^fingerprint/a public_key = \\"$(ssh-keygen -y -f etc/ca)\\"\\n'
        "next = { fingerprint = \\\"$(ssh-keygen -l -f etc/next-ca | cut -d' ' -f2)\\\", "
        'public_key = \\"$(ssh-keygen -y -f etc/next-ca)\\" }" etc/policy.toml && signer reload',
        r"policy +changed",
    ),
    Step("Have hosts trust both", TRUST, r" next SHA256"),
    Step("Switch", "mv etc/next-ca etc/ca && signer reload", r"CA key +rotated from SHA256:"),
    Step("A login with the new key", LOGIN, r"uid="),
    # --- prove -------------------------------------------------------------------------------------------------------
    Step(
        "Save the ledger's head where the service cannot write",
        "signer ledger head >head && cat head",
        r":[0-9a-f]{64}",
    ),
    Step(
        "Prove that nothing was changed or cut off since",
        "signer ledger verify --head \"$(cut -d' ' -f1 head)\"",
        r"intact.* goes on from the saved head",
    ),
    Step("Back up the ledger while it is in use", "signer ledger backup copy", r"verified \d+ events"),
    Step(
        "A witness, in life on a machine of somebody else: its key",
        "signer witness key --name w1 --state witness >vkey && cat vkey",
        r"w1\+[0-9a-f]{8}\+",
    ),
    Step(
        "Start it",
        'signer witness serve --name w1 --log "$(signer ledger key)" --state witness --listen $WITNESS',
        r"serving on",
        log="witness.log",
    ),
    Step(
        "Have it cosign what the ledger is now",
        'signer ledger witness --to http://$WITNESS --witness "$(cat vkey)" --out data/checkpoint',
        r"cosigned \d+ events",
    ),
    Step(
        "Prove the ledger by it",
        'signer ledger verify --checkpoint data/checkpoint --witness "$(cat vkey)" --max-age 1h',
        r"w1 cosigned it at",
    ),
    Step(
        "Rewrite the ledger, as whoever owns this host can",
        "python -P -m scripts.tour.rewrite data forged",
        r"event \d+ of \d+ is rewritten",
    ),
    Step("By itself it looks intact", "SIGNER_DATA_DIR=$PWD/forged signer ledger verify", r"intact: \d+ events"),
    Step(
        "It is not what the witness saw",
        "SIGNER_DATA_DIR=$PWD/forged "
        'signer ledger verify --checkpoint data/checkpoint --witness "$(cat vkey)" --max-age 1h',
        r"the ledger was rewritten or cut off",
        status=1,
    ),
    Step("See when the last backup and cosignature were", "signer status", r"cosigned +up to event \d+", lines=30),
)
