"""The text of `safe-session --help`, imported only for that option."""

from __future__ import annotations

TEXT = """\
usage: safe-session [options] ssh [ssh options] host [command]
       safe-session [options] exec -- command [arguments]
       safe-session whoami | requests | wait ID [--for TIME] | withdraw ID

Logs in with a short-lived certificate. Generates a key in memory, has the
signing service certify it, and holds both in a private ssh-agent while the
command runs. Leaves no key, agent, file or shared connection behind.

Every ssh, scp and sftp that the command finds on PATH, and the ssh of a jump host,
logs in with this certificate alone, whatever ~/.ssh/config says, and shares no
connection (ControlMaster). A program that starts /usr/bin/ssh by that path follows
its own configuration. `ssh -V`, -Q, -G and -O are answered by ssh; nothing is requested.

Where a role asks humans, a person sees the request and waits; Ctrl-C withdraws it. A
program (stderr is no terminal) gets one line of JSON and status 75 at once; the same
command later goes on with the same request. The secret that claims the certificate is
kept in XDG_RUNTIME_DIR, if that is a private folder in memory; elsewhere use --wait.

  whoami                 identity, roles, and when the token ends
  requests               your requests to humans, of the last day
  wait ID                wait until humans have decided: 0 approved, 75 pending, 77 over
  withdraw ID            withdraw a request

options, before `ssh` or `exec`, or after it but before the remote command or `--`:
  --role ROLE            role to request; default: SAFE_SESSION_ROLE
  --principal NAME       principal to request, if not the role's default; may be repeated
  --ttl TIME             lifetime: 15m, 1h or 900 (seconds); default: 2 minutes with `ssh`, and with
                         `exec` of ssh, scp, sftp or rsync, whose session outlives its certificate,
                         otherwise the role's default
  --reason TEXT          reason for the ledger; some roles require it
  --wait TIME            wait this long for humans, and for a service that is away; default: 3 s for
                         a service; for humans as long as it takes on a terminal, else not at all
  --no-wait              do not wait for humans; the line of JSON on a terminal, too
  --exact                with `ssh`: request a certificate for the remote command alone (force-command),
                         so that humans approve a command and not a shell
  --sign-key FILE        the key for your own signature, where the role wants it (presence, break-glass);
                         default: your approval key in ~/.ssh or in your ssh-agent
  --json                 what is said before the command runs, as lines of JSON: the reason for not
                         running it on stdout, remarks on stderr
  -v                     print what was issued (before `ssh`, or with `exec`; after `ssh` it is ssh's
                         option)
  -h, --help             print this text
  --version              print the version

settings, from the environment:
  SAFE_SESSION_ADDR        unix:/run/signer-api/api.sock if unset, or http://127.0.0.1:8222
                           where /run/signer-api does not exist; https://host[:port],
                           unix:/path, or plain http:// to this machine
  SAFE_SESSION_SERVER_UID  over plain http: the uid of the process that listens there, if it
                           is neither root's nor your own; nobody else gets the token
  SAFE_SESSION_TOKEN_FILE  a file that contains the token and that only its owner can read
  SAFE_SESSION_ROLE        the role, unless --role is given
  SAFE_SESSION_PUBLISHERS_FILE
                           the public key that signs the service's list of host keys: hosts on
                           the list are then known by it alone, and without a verified list no
                           command is run

exit status: the command's own, 128+n if signal n ended it, ssh's 255 if it cannot log in;
if the command was not run:
  64        the command line is not valid
  69        the service is not reachable, or a program of this host is missing
  70        internal error
  74        stdout cannot be written
  75        no human has decided yet, or a limit is reached; try again later
  77        refused, denied, expired or frozen
  78        a setting is missing or wrong
  126, 127  the command cannot be executed, does not exist
"""
