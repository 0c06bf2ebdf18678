"""`ssh`, `scp` and `sftp` for the programs that a session runs: each runs the real one with the session's options.

ssh takes options from its command line and its configuration only, and an `IdentitiesOnly` or `IdentityAgent` of the
user's hides the private agent. So a private folder, first on PATH, has a script of each name. `ssh -J` and `ProxyJump`
start the jump host's ssh by the name under which ssh itself was started: that is the script, too.
"""

# ruff: noqa: PTH102, PTH119, PTH120, PTH123
# (pathlib costs more to import than everything here)

from __future__ import annotations

import os
import sys

import signer
from signer.errors import Unavailable
from signer.safe_session.command import find_command, option_words

NAMES = ("ssh", "scp", "sftp")
# POSIX shells cannot set the name of a program that they execute. Python ignores two signals, which ssh would inherit.
# A ControlPersist of the command's own removes ours, which would win: of two values ssh takes the first.
_EXECUTE = (
    "import _signal, os, sys\n"
    "_signal.signal(_signal.SIGPIPE, _signal.SIG_DFL)\n"
    "_signal.signal(_signal.SIGXFSZ, _signal.SIG_DFL)\n"
    "words = sys.argv[2:]\n"
    "ours = 'ControlPersist=no'\n"
    "if ours in words:\n"
    "    at = words.index(ours)\n"
    "    if any('controlpersist' in word.lower() for word in words[at + 1:]):\n"
    "        del words[at - 1:at + 1]\n"
    "os.execv(sys.argv[1], words)"
)
# In front of `_EXECUTE` where the session has a list of host keys: options for a listed host, before all others.
_LOOK_UP = (
    "import sys\n"
    "root, known_hosts = sys.argv[1:3]\n"
    "del sys.argv[1:3]\n"
    "sys.path.insert(0, root)\n"
    "from signer.safe_session.listed import Question, host_options\n"
    "names = Question(sys.argv[1], sys.argv[3:]).names()\n"
    "sys.argv[3:3] = host_options(names, known_hosts)\n"
)


def write_wrappers(folder: str, command: str, *, may_persist: bool, known_hosts: str = "") -> dict[str, str]:
    """Creates `folder` with a script for each of the programs that exist; returns their paths by name.

    `command` is the path of the session's command: if it is one of the programs, its script runs exactly that one.
    Without `may_persist` ssh gets `NO_PERSIST`, too, unless its own words have a ControlPersist. With the path of a
    list of host keys, each ssh verifies the hosts that are listed by it alone.
    Raises `Unavailable` if the scripts cannot be written or executed.
    """
    ssh = f"{folder}/ssh"
    options = option_words(may_persist=may_persist)
    root = os.path.dirname(signer.__path__[0])  # a folder, or the file of `scripts/build-client`
    scripts = {}
    try:
        os.mkdir(folder, 0o700)
        for name in NAMES:
            real = command if os.path.basename(command) == name else find_command(name, required=False)
            if real:
                # scp and sftp start ssh by an absolute path unless they are given another.
                look_up = [_LOOK_UP + _EXECUTE, root, known_hosts] if known_hosts else [_EXECUTE]
                run_ssh = [sys.executable, "-ISc", *look_up, real, ssh, *options]
                words = run_ssh if name == "ssh" else [real, "-S", ssh]
                scripts[name] = f"{folder}/{name}"
                _write(scripts[name], words)
        fault = "" if all(os.access(path, os.X_OK) for path in scripts.values()) else "it is mounted noexec"
    except OSError as error:
        fault = (error.strerror or "unknown reason").lower()
    if fault:
        raise Unavailable("no_wrappers", f"cannot put a script for ssh into {folder}: {fault}")
    return scripts


def _write(path: str, words: list[str]) -> None:
    text = "#!/bin/sh\nexec " + " ".join(map(_quoted, words)) + ' "$@"\n'
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o700)
    with open(descriptor, "wb") as file:
        file.write(os.fsencode(text))


def _quoted(word: str) -> str:
    return "'" + word.replace("'", "'\\''") + "'"
