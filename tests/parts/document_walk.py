"""Which test runs each block of commands that README and the runbooks show.

`WALK` are the blocks that one throwaway machine runs in this order, as they stand in the page: an operator's day by
systemd's way of installing. `before` is what the text around a block tells the reader to do first. `PAGES` are whole
pages whose sessions are run and compared with what they show; `ELSEWHERE` are single blocks that another test runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tests.parts.command_blocks import CommandBlock

ROOM: Final = "tests/system"

# Every session of the page, `$ ` and what it prints, by this test.
PAGES: Final = {
    "runbooks/ca-key.md": f"{ROOM}/ca/test_ca_render_runbook.py",
    "runbooks/ca-rotation.md": f"{ROOM}/ca/test_rotation_runbook.py",
    "runbooks/operate/approvals.md": f"{ROOM}/approvals/test_approvals_runbooks.py",
    "runbooks/operate/break-glass.md": f"{ROOM}/approvals/test_approvals_runbooks.py",
    "runbooks/operate/ca-key-in-hardware.md": f"{ROOM}/ca/test_ca_key_in_hardware_runbook.py",
    "runbooks/preflight.md": f"{ROOM}/migration/test_preflight_runbook.py",
    "runbooks/rollback.md": f"{ROOM}/migration/test_cutover_runbook.py",
    "runbooks/safe-session-local-ca-cutover.md": f"{ROOM}/migration/test_cutover_runbook.py",
    "runbooks/vault-decommission.md": f"{ROOM}/migration/test_cutover_runbook.py",
    # The help of every verb, which scripts/docs writes.
    "runbooks/reference/commands.md": "tests/unit/repository/test_docs.py",
}
# What scripts/docs writes into a page is compared with the program by this test, command by command.
TRANSCRIPTS: Final = "tests/unit/cli/test_cli_transcripts.py"

_HARDWARE: Final = "runbooks/operate/ca-key-in-hardware.md"
_CUTOVER: Final = "runbooks/safe-session-local-ca-cutover.md"
_RESTORE: Final = "runbooks/operate/backup-restore.md"
_DRILL: Final = f"{ROOM}/ledger/test_restore_drill.py"
# (page, how the block begins): the test that runs its commands, with paths and addresses of its own.
ELSEWHERE: Final = {
    ("README.md", "scripts/quickstart  "): f"{ROOM}/operations/test_quickstart.py",
    ("README.md", "bao write"): f"{ROOM}/operations/test_readme.py",
    ("README.md", "echo"): f"{ROOM}/operations/test_readme.py",
    ("runbooks/preflight.md", "sudo"): f"{ROOM}/migration/test_preflight_agent.py",
    ("runbooks/operate/console.md", "signer approval-key"): TRANSCRIPTS,
    ("runbooks/operate/notices.md", "signer notices test"): f"{ROOM}/approvals/test_notices.py",
    ("runbooks/install/reach.md", "echo 'd /run"): f"{ROOM}/container/test_container_socket.py",
    ("runbooks/ca-key.md", "cp /opt"): f"{ROOM}/operations/test_boot.py",
    ("runbooks/ca-key.md", "install -d"): f"{ROOM}/operations/test_boot.py",
    ("runbooks/ca-key.md", "systemd-creds"): f"{ROOM}/operations/test_boot.py",
    ("runbooks/reference/ledger.md", "signer ledger checkpoint"): f"{ROOM}/ledger/test_cosigning.py",
    (_HARDWARE, "#!/bin/sh\nexport"): f"{ROOM}/ca/test_ca_key_in_hardware_runbook.py",
    (_HARDWARE, "#!/bin/sh\nexec"): f"{ROOM}/ca/test_ca_key_in_hardware_runbook.py",
    (_HARDWARE, "systemd-ask-password"): f"{ROOM}/operations/test_boot.py",
    (_HARDWARE, "PLATFORM_RUNTIME"): f"{ROOM}/container/test_container_agent.py",
    (_RESTORE, "signer ledger follow"): _DRILL,
    (_RESTORE, "systemctl stop signer-follow"): _DRILL,
    (_RESTORE, "systemctl stop signer-api signer-keeper\nsigner ledger archive"): "tests/unit/ledger/test_archive.py",
    (_RESTORE, "signer ledger verify --segment"): "tests/unit/ledger/test_archive.py",
    (_CUTOVER, "signer cutover parity"): f"{ROOM}/vault/test_parity_roles.py",
    (_CUTOVER, "signer cutover rollback"): f"{ROOM}/migration/test_cutover_runbook.py",
    (_CUTOVER, "signer cutover status"): f"{ROOM}/migration/test_cutover_runbook.py",
}


@dataclass(frozen=True, slots=True)
class Stop:
    """One block of a page, found by how it begins.

    `before` and `after` are lines of a shell; in the block each name of `fill` is replaced. `typed` is what a person
    types: on a terminal, unless `piped`. `serves`: the block does not end by itself; it goes on in the background.
    """

    page: str
    begins: str
    before: str = ""
    after: str = ""
    fill: tuple[tuple[str, str], ...] = ()
    typed: str = ""
    piped: bool = False
    serves: bool = False
    shows: str = ""  # what the block prints, as a regular expression

    def is_of(self, block: CommandBlock) -> bool:
        return block.page == self.page and block.text.startswith(self.begins)


_POLICY: Final = "runbooks/install/first-policy.md"
_CLIENTS: Final = "runbooks/install/clients.md"
_HOSTS: Final = "runbooks/operate/hosts.md"
_MOVE: Final = "runbooks/operate/move-to-another-host.md"
_WITNESS: Final = "runbooks/operate/witness.md"
_REACH: Final = "runbooks/install/reach.md"
_SETTINGS: Final = "set -a; SIGNER_KEEPER_USER=signer-keeper SIGNER_API_USER=signer-api; set +a"
_READY: Final = "until curl -fsS http://127.0.0.1:8222/readyz >/dev/null 2>&1; do sleep 0.1; done"
_AS_OPERATOR: Final = "export SAFE_SESSION_TOKEN_FILE=~/operator.token"
_REPLACED: Final = "/var/lib/signer/ledger.replaced-"
_AS_AGENT: Final = "export SAFE_SESSION_TOKEN_FILE=~/.signer-token"

WALK: Final[tuple[Stop, ...]] = (
    # --- install -----------------------------------------------------------------------------------------------------
    Stop(_POLICY, "install -d", before='export PATH="/opt/signer/.venv/bin:$PATH"', shows=r"fingerprint"),
    Stop("runbooks/install/systemd.md", "/opt/signer/scripts/setup-venv",
         before="install -d -m 0755 /etc/signer; editor /etc/signer/policy.toml",
         after=f"{_READY}; systemctl stop signer-api.socket signer-api signer-keeper"),
    Stop(_POLICY, "signer policy check", before=_SETTINGS, shows=r"(?s)llmops.*granted.*ready: "),
    Stop(_POLICY, "signer serve", after=_READY, serves=True),
    Stop("runbooks/operate/tokens-and-policy.md", "signer policy check", shows=r"(?s)granted.*policy"),
    Stop("runbooks/operate/tokens-and-policy.md", "signer token new", shows=r"sgn_"),
    Stop("runbooks/operate/approvals.md", "signer approval-key",
         before="cp /run/enrolment.json .; signer identity add anna --kind human --role llmops --write",
         shows=r"(?s)webauthn.*identities +added anna"),
    Stop("runbooks/operate/upgrading.md", "signer policy check", shows=r"ready: ",
         # From here the units run it.
         after="kill $(cat /run/service.pid); while kill -0 $(cat /run/service.pid); do sleep 0.1; done 2>/dev/null; "
               f"systemctl start signer-api.socket signer-keeper signer-api; {_READY}"),
    # --- hosts -------------------------------------------------------------------------------------------------------
    Stop("runbooks/install/hosts.md", "signer hosts install",
         before="useradd -m -p '*' llmops; signer ca bundle >ca.pub; cp ca.pub /opt/signer/",
         shows=r"(?s)install.*confirmed"),
    Stop("runbooks/install/hosts.md", "scp -r", before="cd /opt/signer", after="cd"),
    Stop("runbooks/install/hosts.md", "/root/host/install", shows=r"trusts the CA already"),
    Stop(_HOSTS, "ssh-keyscan edge1",
         before=f"export SAFE_SESSION_ADDR=http://127.0.0.1:8222; {_AS_OPERATOR}",
         after="signer hosts remove edge1", shows=r"edge1 is listed with 1 key"),
    Stop(_HOSTS, "cat /etc/ssh", before="cp /etc/ssh/ssh_host_ed25519_key.pub edge1.pub", typed="yes\n",
         shows=r"edge1 is listed with 1 key"),
    Stop(_HOSTS, "signer certs list --active --on HOST",
         before="signer hosts add HOST --keys edge1.pub --principals llmops --yes", after="signer hosts remove HOST",
         shows=r"as recorded, host lets in llmops"),
    Stop(_HOSTS, "signer hosts key", shows=r'Good "known-hosts\.v1@signer" signature'),
    Stop(_HOSTS, "signer hosts seen"),
    Stop(_HOSTS, "install -d", after="test -s /var/www/signer/krl"),
    # --- clients -----------------------------------------------------------------------------------------------------
    Stop(_CLIENTS, "scripts/build-client", before="cd /opt/signer; mkdir -p /root/bin",
         after="cd; /root/bin/safe-session --version", shows=r"sha256"),
    Stop(_CLIENTS, "signer hosts key", before=_AS_AGENT),
    Stop("README.md", "export SAFE_SESSION_ADDR",
         before="printf 'Host HOST\\n  User llmops\\n' >>/etc/ssh/ssh_config"),
    Stop(_POLICY, "export SAFE_SESSION_ADDR", shows=r"llmops for 2 min"),
    Stop(_CLIENTS, "safe-session ssh HOST",
         before="mkdir -p site; touch site/index.html; install -d -o llmops /srv/site",
         after="test -e /srv/site/index.html"),
    Stop(_CLIENTS, "safe-session --reason", before="printf '#!/bin/sh\nssh-add -l\n' >deploy; chmod +x deploy",
         shows=r"ED25519-CERT"),
    Stop(_HOSTS, "ssh HOST journalctl", before="sed -i /User/d /etc/ssh/ssh_config",
         after="grep -q deploy-agent who-was-on-HOST.csv"),
    Stop("runbooks/reference/http.md", "curl",
         before='ssh-keygen -q -t ed25519 -N "" -f id; echo "X-Vault-Token: $(cat ~/.signer-token)" >token.header',
         shows=r"ssh-ed25519-cert-v01@openssh.com"),
    # --- stop access -------------------------------------------------------------------------------------------------
    Stop("runbooks/incident.md", "signer freeze all", before="unset SAFE_SESSION_TOKEN_FILE", shows=r"all is frozen"),
    Stop("runbooks/operate/freeze.md", "echo", shows=r'"frozen":false'),
    Stop("runbooks/operate/freeze.md", "signer ledger export", shows=r'"freeze\.lifted"'),
    Stop("runbooks/operate/shadow-mode.md", "signer ledger export"),
    # --- back up, restore, move --------------------------------------------------------------------------------------
    Stop(_RESTORE, "install -d", after="signer ledger head >head", shows=r"verified \d+ events"),
    Stop(_RESTORE, "systemctl stop signer-api signer-keeper\nsigner ledger restore",
         fill=(("SEQ:HASH", '"$(cut -d" " -f1 head)"'),), typed="yes\n",
         shows=r"will be lost"),
    Stop(_RESTORE, "SIGNER_DATA_DIR=", fill=((f"{_REPLACED}TIME", f'"$(echo {_REPLACED}*)"'),), shows=r"freeze\.set"),
    Stop(_MOVE, "systemctl disable", after="signer ledger head >head", shows=r"\d+:[0-9a-f]{64}"),
    Stop(_MOVE, "rsync"),
    Stop(_MOVE, "signer ledger verify", fill=(("SEQ:HASH", '"$(cut -d" " -f1 head)"'),), after=_READY,
         shows=r"(?s)goes on from the saved head.*ready: .*ca_fingerprint"),
    Stop(_MOVE, "systemctl stop",
         before="printf 'SIGNER_POLICY_FILE=/etc/signer/policy.toml\n' >/etc/signer/environment",
         after=f'{_READY}; test "$(stat -c %U /srv/signer/ledger.sqlite3)" = signer-two && (set -a; '
               '. /etc/signer/environment; signer ledger verify --head "$(cut -d" " -f1 head)" && signer status) && '
               # and back, by the same lines
               "systemctl stop signer-api signer-keeper && mv /srv/signer /var/lib/signer && "
               "chown -R signer-keeper: /var/lib/signer && rm -r /run/signer /etc/signer/environment && "
               "rm -r /etc/systemd/system/signer-keeper.service.d && systemctl daemon-reload && "
               f"systemctl restart signer-keeper signer-api && {_READY}"),
    # --- from elsewhere ----------------------------------------------------------------------------------------------
    Stop(_REACH, "ssh -N", before="mkdir -p /run/user/1000; unset SAFE_SESSION_PUBLISHERS_FILE",
         after=f"until test -S /run/user/1000/signer.sock; do sleep 0.1; done; {_AS_OPERATOR}; "
               "export SAFE_SESSION_SERVER_UID=0; safe-session whoami"),
    Stop(_REACH, "openssl req", before="cd /etc/signer", after="chown signer-api tls.key; cd"),
    Stop(_REACH, "install -d", before="cp /run/reach.ini /etc/signer/environment"),
    Stop(_REACH, "export SAFE_SESSION_ADDR"),
    Stop(_CLIENTS, "umask 077", typed="TOKEN", piped=True, shows=r"deploy-agent"),
    Stop(_WITNESS, "signer ledger checkpoint",
         before="git init -q --bare history.git && git clone -q history.git history 2>/dev/null && "
                "cd history && git config user.email ci@signer.example && git config user.name ci && "
                "git config push.default current"),
    Stop(_WITNESS, "git show", before="for day in {1..30}; do git commit -q --allow-empty -m day; done",
         after="cd; rm -r /etc/systemd/system/signer-api.*.d /etc/signer/environment; systemctl daemon-reload; "
               f"systemctl restart signer-api.socket signer-keeper signer-api; {_READY}",
         shows=r"intact"),
    # --- a witness ---------------------------------------------------------------------------------------------------
    Stop(_WITNESS, "/opt/signer/scripts/setup-venv", shows=r"witness\.example\.org\+[0-9a-f]{8}\+"),
    Stop(_WITNESS, "cp /opt/signer/scripts/systemd/signer-witness",
         before='echo "WITNESS_OPTIONS=--name witness.example.org --log $(signer ledger key)" >/etc/signer/witness'),
    Stop(_WITNESS, "runuser"),
    Stop(_WITNESS, "cp /opt/signer/scripts/systemd/signer-cosign",
         before='echo "COSIGN_OPTIONS=--to http://127.0.0.1:8333 --witness $(runuser -u signer-witness -- '
                '/opt/signer/.venv/bin/signer witness key --name witness.example.org)" >/etc/signer/cosign',
         after="systemctl start signer-cosign; cat /var/lib/signer/checkpoint | grep '^— witness.example.org '"),
    Stop("runbooks/operate/notices.md", "useradd", before="cp /run/notices.toml /etc/signer",
         after="set -a; . /etc/signer/environment; set +a; signer status", shows=""),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Line:
    """Lines of a shell that no block shows as they stand: what the text or a table says, with names of this day."""

    text: str
    shows: str = ""


@dataclass(frozen=True, slots=True)
class Reboot:
    """The machine ends, by systemd or by a power cut, and starts again."""

    in_order: bool = True


Step = Stop | Line | Reboot

_CONTAINER: Final = "runbooks/install/container.md"
_NAME: Final = "safe-session_safe-session-api_1"
_FILES: Final = "-f overlays/safe-session.yaml -f overlays/safe-session-local-ca.yaml"
_UP: Final = f"env $(grep = /etc/day/compose.env) scripts/container/compose {_FILES}"
_BACKUP: Final = "-f /root/backup.yaml"  # an overlay that mounts /backup/signer
_USER: Final = "-f /root/user.yaml"  # an overlay for another user of the keeper
_VERIFIES: Final = f'podman exec {_NAME} signer ledger verify --head "$(cut -d" " -f1 head)"'
_LOGIN: Final = "safe-session ssh HOST id"
_LOGIN_AS: Final = "safe-session ssh llmops@HOST id"

# The same day in a container: by README's lines, then with what `signer init` writes and prints.
CONTAINER_WALK: Final[tuple[Step, ...]] = (
    # --- by hand -----------------------------------------------------------------------------------------------------
    Stop("README.md", "scripts/container/make-base", before='cd /opt/signer; export PATH="/opt/signer/.venv/bin:$PATH"',
         after=_READY),
    Stop(_CONTAINER, "podman run", shows=r"(?s)sgn_.*SHA256:"),
    Stop(_CONTAINER, "scripts/container/make-base", after=_READY),
    Stop("runbooks/operate/notices.md", "PLATFORM_RUNTIME",
         before="install -D -m 0400 -o 8223 /run/notices.toml /etc/safe-session/notices/notices.toml",
         after=f"{_READY}; podman exec {_NAME} signer check"),
    Line("scripts/container/compose -f overlays/safe-session.yaml down --volumes; "
         "unset PLATFORM_RUNTIME_SAFE_SESSION_CA_KEY_DIR"),
    # --- init, start, login ------------------------------------------------------------------------------------------
    Line("signer init /etc/day --for container --platform edge --yes | tee init", r"container/compose -f"),
    # What a shell exports is not to beat what is written.
    Line("export PLATFORM_RUNTIME_SAFE_SESSION_POLICY_DIR=/nonexistent; "
         f'eval "$(grep "container/compose -f" init)"; {_READY}; unset PLATFORM_RUNTIME_SAFE_SESSION_POLICY_DIR'),
    Line("mkdir -p /etc/ssh/sshd_config.d; echo TrustedUserCAKeys /etc/ssh/day >/etc/ssh/sshd_config.d/day.conf; "
         "curl -fsS http://127.0.0.1:8222/api/ca >/etc/ssh/day; kill -HUP $(cat /run/sshd.pid); "
         "useradd -m -p '*' llmops; printf 'Host HOST\\n  User llmops\\n' >>/etc/ssh/ssh_config"),
    Line(f"set -a; . /etc/day/client; set +a; {_LOGIN}", r"\(llmops\)"),
    # --- an agent and a role -----------------------------------------------------------------------------------------
    Line("export SIGNER_POLICY_FILE=/etc/day/policy/policy.toml; "
         "signer role add deploy --principal llmops --max-ttl 10m --write; "
         "signer identity add agent7 --kind agent --role deploy --write; "
         "signer token new agent7 --expires 90d --write >agent7.token; chmod 0400 agent7.token",
         r"policy\.toml is written"),
    Line(f"podman exec {_NAME} signer reload", r"identities +added agent7"),
    Line("SAFE_SESSION_TOKEN_FILE=agent7.token safe-session whoami; "
         f"SAFE_SESSION_TOKEN_FILE=agent7.token SAFE_SESSION_ROLE=deploy {_LOGIN}", r"(?s)agent7.*\(llmops\)"),
    Line(f"podman exec {_NAME} signer status", r"mode local, well"),
    # --- freeze by API -----------------------------------------------------------------------------------------------
    Line('echo "Authorization: Bearer $(cat /etc/day/operator.token)" >operator.header; '
         "curl -sS -H @operator.header --json '{\"scope\":\"all\",\"reason\":\"a drill\"}' "
         "$SAFE_SESSION_ADDR/api/freezes; "
         f"{_LOGIN} && exit 1; "
         "curl -sS -H @operator.header -X DELETE $SAFE_SESSION_ADDR/api/freezes/all", r"all is frozen"),
    # --- rotate ------------------------------------------------------------------------------------------------------
    Line("cp /etc/day/ca-key/ca /run/old; signer ca new --out /run/next; "
         'sed -i "/^fingerprint/a public_key = \\"$(ssh-keygen -y -f /run/old)\\"\\n'
         "next = { fingerprint = \\\"$(ssh-keygen -l -f /run/next | cut -d' ' -f2)\\\", "
         'public_key = \\"$(ssh-keygen -y -f /run/next)\\" }" $SIGNER_POLICY_FILE; '
         f"podman exec {_NAME} signer reload; curl -fsS http://127.0.0.1:8222/api/ca >/etc/ssh/day; "
         f"mv /run/next /etc/day/ca-key/ca; podman exec {_NAME} signer reload; {_LOGIN}",
         r"(?s)CA key +rotated from SHA256:.*\(llmops\)"),
    # --- back up, restore --------------------------------------------------------------------------------------------
    Stop(_RESTORE, "podman exec",
         before="mkdir -p /backup/signer; chown 8221 /backup/signer; cp /run/backup.yaml /root; "
                f"{_UP} {_BACKUP} up -d; {_READY}",
         after="ls -l /backup/signer", fill=(("NAME", _NAME),), shows=r"verified \d+ events"),
    Stop(_RESTORE, "podman run", before=f"podman stop {_NAME}",
         fill=(("/etc/safe-session/policy", "/etc/day/policy"),), shows=r"restored"),
    Line(f"{_UP} up -d; {_READY}; signer unfreeze all; {_LOGIN}", r"(?s)no longer frozen.*\(llmops\)"),
    # --- upgrade, move, reboot ---------------------------------------------------------------------------------------
    Line(f"podman exec {_NAME} signer ledger head >head; scripts/container/build >built; "
         'number=$(grep -o "[0-9a-f]*$" built); podman image inspect localhost/signer:0.1.0 | grep $number; '
         "echo PLATFORM_RUNTIME_SAFE_SESSION_IMAGE=$number >>/etc/day/compose.env; "
         f"before=$(podman inspect --format '{{{{.Id}}}}' {_NAME}); "
         f"{_UP} up -d; {_READY}; {_VERIFIES}; "
         f"test $before != $(podman inspect --format '{{{{.Id}}}}' {_NAME}); "
         f"test $number = $(podman inspect --format '{{{{.Image}}}}' {_NAME})", r"goes on from the saved head"),
    Line(f"podman stop {_NAME}; podman volume export safe-session_ledger --output ledger.tar; {_UP} down --volumes; "
         "mv /etc/day /etc/night; sed -i s,/etc/day,/etc/night, /etc/night/compose.env /etc/night/client; "
         "ln -s night /etc/day; "
         "podman volume create safe-session_ledger; podman volume import safe-session_ledger ledger.tar; "
         f"{_UP} up -d; {_READY}; {_VERIFIES}", r"goes on from the saved head"),
    Stop(_MOVE, "chown -R 1:1",
         before=f"podman stop {_NAME} && "
                "echo 'services: {safe-session-api: {environment: {SIGNER_KEEPER_USER: daemon}}}' >/root/user.yaml",
         after=f"{_UP} {_USER} up -d; {_READY}; {_VERIFIES} && {_LOGIN} && podman exec {_NAME} signer status && "
               f"podman top {_NAME} user args | grep '^daemon .* keeper'"),
    Stop(_CONTAINER, "cp /opt/signer",
         before="install -d -m 0755 /var/lib/safe-session; sed 's,/usr/local,/opt/signer/.venv,' /run/boot.ini >boot; "
                "sed 's,^,variable=,' /etc/night/compose.env | grep =PLATFORM >>boot; "
                "(grep -v KEY_DIR=/run boot; echo file=/root/user.yaml) >/var/lib/safe-session/boot; "
                "chmod 0600 /var/lib/safe-session/boot",
         shows=r"podman-compose .*up --detach"),
    Line(f"podman rm --force --time 0 {_NAME}; /opt/signer/scripts/container/start-recorded; {_READY}; "
         f"{_VERIFIES}; {_LOGIN}",
         r"(?s)goes on from the saved head.*\(llmops\)"),
)  # fmt: skip

_DAY: Final = "export SIGNER_POLICY_FILE=/etc/signer/policy.toml; set -a; . /etc/signer/environment; set +a"
_HEAD: Final = 'signer ledger verify --head "$(cut -d" " -f1 head)"'
_ASKS: Final = f"{_READY}; {_HEAD}; {_LOGIN_AS}"
_ANEW: Final = f"{_DAY}; set -a; . /etc/signer/client; set +a"  # the shell of a machine that has just started

# The day on a host with systemd: by what `signer init` writes and prints, and by the pages' blocks.
HOST_DAY: Final[tuple[Step, ...]] = (
    # --- init, start, login ------------------------------------------------------------------------------------------
    Stop("README.md", "/opt/signer/scripts/setup-venv", before="useradd -m -p '*' llmops",
         fill=(("ACCOUNT", "llmops"), ("ssh llmops@HOST", "ssh llmops@HOST id")),
         typed="\n" * 6,
         shows=r"(?s)next:.*signer serve.*confirmed.*\(llmops\)"),
    Line("set -a; . /etc/signer/client; set +a; "
         f'systemctl stop signer-api.socket signer-api signer-keeper; {_LOGIN_AS} && exit 1; '
         # The service as `signer init` prints it, and as units again.
         '(eval "$(signer init /root/shown --yes | sed -n "s,/root/shown,/etc/signer,g; s/signer serve/exec &/p")" '
         f'>/var/log/service 2>&1 </dev/null) & echo $! >/run/service.pid; {_READY}; {_LOGIN_AS}; '
         "kill $(cat /run/service.pid); "
         "while kill -0 $(cat /run/service.pid) 2>/dev/null; do sleep 0.1; done; "
         f"systemctl start signer-api.socket signer-keeper signer-api; {_READY}", r"\(llmops\)"),
    # --- an agent and a role -----------------------------------------------------------------------------------------
    Line(f"{_DAY}; signer role add deploy --principal llmops --max-ttl 10m --write; "
         "signer identity add agent7 --kind agent --role deploy --write; "
         "signer token new agent7 --expires 90d --write >agent7.token; chmod 0400 agent7.token",
         r"policy\.toml is written"),
    Line("systemctl reload signer-keeper; export SAFE_SESSION_TOKEN_FILE=agent7.token; "
         "until safe-session whoami; do sleep 0.2; done; "
         f"SAFE_SESSION_ROLE=deploy {_LOGIN_AS}; export SAFE_SESSION_TOKEN_FILE=/etc/signer/operator.token",
         r"(?s)agent7.*\(llmops\)"),
    Line("signer policy list; signer status", r"(?s)agent7.*mode local, well"),
    # --- freeze by API -----------------------------------------------------------------------------------------------
    Stop("runbooks/operate/freeze.md", "echo", before="cp /etc/signer/operator.token .", shows=r'"frozen":false'),
    # --- rotate ------------------------------------------------------------------------------------------------------
    Line("cp /etc/signer/ca /run/old; signer ca new --out /run/next; "
         'sed -i "/^fingerprint/a public_key = \\"$(ssh-keygen -y -f /run/old)\\"\\n'
         "next = { fingerprint = \\\"$(ssh-keygen -l -f /run/next | cut -d' ' -f2)\\\", "
         'public_key = \\"$(ssh-keygen -y -f /run/next)\\" }" $SIGNER_POLICY_FILE; '
         "systemctl reload signer-keeper; "
         "until curl -fsS http://127.0.0.1:8222/api/ca | grep next; do sleep 0.2; done; "
         "signer ca bundle >ca.pub; signer hosts install HOST --ca ca.pub --principals llmops=llmops; "
         f"mv -f /run/next /etc/signer/ca; systemctl restart signer-keeper; {_READY}; {_LOGIN_AS}; "
         "signer events list --kind ca.rotated", r"(?s)\(llmops\).*ca\.rotated"),
    # --- back up, restore --------------------------------------------------------------------------------------------
    Stop(_RESTORE, "install -d", after="signer ledger head >head", shows=r"verified \d+ events"),
    Stop(_RESTORE, "systemctl stop signer-api signer-keeper\nsigner ledger restore",
         fill=(("SEQ:HASH", '"$(cut -d" " -f1 head)"'),), typed="yes\n",
         after=f"systemctl start signer-keeper signer-api; {_READY}; {_LOGIN_AS} && exit 1; "
               f"signer unfreeze all; {_LOGIN_AS}; signer ledger head >head", shows=r"will be lost"),
    # --- upgrade, move -----------------------------------------------------------------------------------------------
    Stop("runbooks/operate/upgrading.md", "signer policy check", shows=r"ready: ",
         after="/opt/signer/scripts/setup-venv run; cp /opt/signer/scripts/systemd/*.{service,socket,timer} "
               "/etc/systemd/system/; systemctl daemon-reload; systemctl restart signer-keeper signer-api; "
               f"{_ASKS}"),
    Stop(_MOVE, "systemctl stop",
         after=f"{_DAY}; {_ASKS}; test \"$(stat -c %U /srv/signer/ledger.sqlite3)\" = signer-two"),
    # --- reboot ------------------------------------------------------------------------------------------------------
    Reboot(),
    Line(f"{_ANEW}; {_ASKS}; systemctl is-system-running; signer status",
         r"(?s)goes on from the saved head.*\(llmops\).*running.*mode local, well"),
    Reboot(in_order=False),
    Line(f"{_ANEW}; {_ASKS}; systemctl is-system-running", r"(?s)goes on from the saved head.*\(llmops\).*running"),
)  # fmt: skip


# Each block that a day or the walk runs, by the first step that runs it.
STOPS: Final = tuple(
    {(step.page, step.begins): step for step in (*HOST_DAY, *CONTAINER_WALK, *WALK) if isinstance(step, Stop)}.values()
)


def run_by(block: CommandBlock) -> str:
    """The test that runs a block; "" if none does."""
    if block.is_generated:
        return TRANSCRIPTS
    if any(stop.is_of(block) for stop in STOPS):
        return f"{ROOM}/operations/test_documents.py"
    for (page, begins), test in ELSEWHERE.items():
        if block.page == page and block.text.startswith(begins):
            return test
    return PAGES.get(block.page, "") if block.is_session else ""
