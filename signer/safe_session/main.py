"""The `safe-session` command: one session, from the arguments to the exit status."""

from __future__ import annotations

import os
import sys

from signer.errors import SignerError
from signer.safe_session import output as voice
from signer.safe_session.arguments import Invocation, Usage, parse_arguments
from signer.safe_session.command import Ended, end_on_signals, find_command, run, ssh_command


def main(arguments: list[str] | None = None) -> int:
    """Exit status: the command's own (128+n for signal n), 2 for a usage error, 1 if no certificate was had."""
    try:
        _occupy_standard_descriptors()
        end_on_signals()
        asked = parse_arguments(sys.argv[1:] if arguments is None else arguments)
        if asked.verb in ("help", "version"):
            _inform(asked.verb)
            return 0
        return _session(asked)
    except Usage as error:
        voice.say_error(error)
        return 2
    except SignerError as error:
        voice.say_error(error)
        return 1
    except Ended as ended:
        return 128 + ended.number
    except KeyboardInterrupt:
        return 130


def _session(asked: Invocation) -> int:
    """1 check the command and the settings, before anything is started
    2 start the agent, which gets ready while we
    3 make the key and
    4 ask for the certificate
    5 give both to the agent, for as long as the certificate lives; from here on we hold no key
    6 run the command
    7 end the agent, whatever happened
    """
    # 1
    command = ssh_command(asked.command) if asked.verb == "ssh" else asked.command
    path = find_command(command[0])
    from signer.safe_session.settings import load_settings

    settings = load_settings(asked.role)
    # 2
    from signer.safe_session.agent import PrivateAgent

    with PrivateAgent() as agent:
        # 3 (imported now: the agent starts meanwhile)
        from signer.safe_session.keypair import forbid_core_dumps, make_key
        from signer.safe_session.request import ask
        from signer.ssh.agent import render_add_ed25519_certificate

        forbid_core_dumps()
        key = make_key()
        try:
            # 4
            certificate = ask(settings, asked, key)
            # 5
            message = render_add_ed25519_certificate(
                certificate.blob,
                memoryview(key.seed).cast("B"),
                key.public,
                comment=f"safe-session {settings.role} {certificate.serial}",
                lifetime=certificate.lifetime,
            )
            try:
                agent.add(message)
            finally:
                message[:] = bytes(len(message))
        finally:
            key.wipe()
        # 6
        if asked.verbose:
            voice.say_certificate(settings.role, certificate.serial, certificate.lifetime)
        return run(path, command, agent.socket)
        # 7 is the end of `with`


def _inform(topic: str) -> None:
    if topic == "version":
        from signer import __version__

        voice.show(f"safe-session {__version__}\n")
    else:
        from signer.safe_session.usage import TEXT

        voice.show(TEXT)


def _occupy_standard_descriptors() -> None:
    """If we were started with 0, 1 or 2 closed, a pipe of ours must not become somebody's standard input or output."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
