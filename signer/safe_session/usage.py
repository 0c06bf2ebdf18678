"""The text of `safe-session --help`. Imported only when somebody asks for it."""

from __future__ import annotations

TEXT = """\
usage: safe-session [options] ssh [ssh options] host [command]
       safe-session [options] exec -- command [arguments]

Logs in with a certificate that lives for minutes. A new key is made in memory,
the signing service certifies it, a private ssh-agent holds both while the
command runs, and nothing is left behind.

options, before `ssh` or `exec`, or after it but before the remote command or `--`:
  --role ROLE            what to ask for; default: SAFE_SESSION_ROLE
  --principal NAME       the name sshd matches, if not the role's default; may be repeated
  --ttl TIME             how long, as 15m, 1h or 900 (seconds), if not the role's default
  --reason TEXT          why; some roles demand it
  -v                     say what was issued (before `ssh`, or with `exec`; after `ssh` it is ssh's own)
  -h, --help             this text
  --version              the version

settings, from the environment:
  SAFE_SESSION_ADDR        http://127.0.0.1:8222 if unset; https://host[:port] or unix:/path;
                           plain http:// only to this machine
  SAFE_SESSION_TOKEN_FILE  a file that holds the token and only its owner can read
  SAFE_SESSION_ROLE        the role, unless --role is given

exit status: the command's own, 128+n if signal n ended it; 2 for a usage error;
1 if no certificate was had, and then nothing was run.
"""
