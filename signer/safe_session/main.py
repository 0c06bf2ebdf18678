"""The `safe-session` command: runs one session from the arguments to the exit status."""

# ruff: noqa: PTH119
# (pathlib costs more to import than everything here)

from __future__ import annotations

import os
import sys

from signer.errors import SignerError, Unavailable
from signer.safe_session import output
from signer.safe_session.arguments import Invocation, parse_arguments
from signer.safe_session.command import (
    EndedBySignal,
    end_on_signals,
    find_command,
    has_terminal,
    run,
    session_environment,
    ssh_command,
)
from signer.safe_session.statuses import INTERRUPTED, SIGNALLED, Limited, RequestOver, StillPending, UsageError

TYPE_CHECKING = False  # type checkers know the name; importing it from typing costs 20 ms
if TYPE_CHECKING:
    from signer.safe_session.agent import PrivateAgent
    from signer.safe_session.request import Patience
    from signer.safe_session.response import Certificate
    from signer.safe_session.settings import Settings


def main(arguments: list[str] | None = None) -> int:
    """Returns the command's exit status (128+n for signal n), or one of `statuses` if the command was not run."""
    words = sys.argv[1:] if arguments is None else arguments
    invocation = Invocation()
    try:
        return _main(words, invocation)
    except UsageError as error:
        return output.report(error, as_json=invocation.json or "--json" in words)
    except (StillPending, RequestOver, Limited) as error:
        as_json = invocation.json or invocation.is_for_program()
        to_stderr = invocation.verb == "ssh" and not invocation.json
        return output.report(error, as_json=as_json, to_stderr=to_stderr)
    except SignerError as error:
        return output.report(error, as_json=invocation.json)
    except EndedBySignal as ended:
        return SIGNALLED + ended.number
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 - status 1, which Python would end with, is the command's own
        return output.say_internal_error(error, as_json=invocation.json)


def _main(words: list[str], invocation: Invocation) -> int:
    _occupy_standard_descriptors()
    end_on_signals()
    parse_arguments(words, invocation)
    if invocation.verb in ("help", "version"):
        _inform(invocation.verb)
        return 0
    if invocation.asks_ssh:
        command = ssh_command(invocation.command, may_persist=_may_persist(invocation))
        return run(find_command("ssh"), command, dict(os.environ))
    if invocation.verb in ("ssh", "exec"):
        return _session(invocation)
    from signer.safe_session.questions import answer
    from signer.safe_session.settings import load_settings

    return answer(load_settings("", needs_role=False), invocation)


def _session(invocation: Invocation) -> int:
    """Runs the session and returns its exit status.

    1  check the command and the settings
    2  start the agent, which gets ready during step 3; fetch the list of host keys, if the user has pinned its signer
    3  generate the key and request the certificate
    4  load both into the agent for the certificate's lifetime and wipe the key
    5  run the command, with the session's options for every ssh that it starts
    6  end the agent, also after an error
    """
    # 1
    command = invocation.command
    if invocation.verb == "ssh":
        command = ssh_command(command, may_persist=_may_persist(invocation))
    path = find_command(command[0])
    from signer.safe_session.settings import load_settings

    settings = load_settings(invocation.role)
    # 2
    from signer.safe_session.agent import PrivateAgent

    with PrivateAgent() as agent:
        from signer.safe_session.keypair import forbid_core_dumps
        from signer.safe_session.request import Patience, obtain_certificate
        from signer.ssh.agent import render_add_ed25519_certificate

        away = f"trying again for {invocation.wait} s"
        patience = Patience(invocation.wait, lambda error: _note(invocation, f"{error.text}; {away}"))
        known_hosts, options = _host_keys(settings, invocation, path, agent, patience)
        # 3 (imported here because the agent starts meanwhile)
        forbid_core_dumps()
        key, certificate = obtain_certificate(settings, invocation, patience)
        try:
            # 4
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
        # 5
        if invocation.verbose:
            output.say_certificate(settings.role, certificate.serial, certificate.lifetime, as_json=invocation.json)
        if options:
            command = [command[0], *options, *command[1:]]
        return _run_command(invocation, path, command, agent, certificate, known_hosts)
        # 6: the end of `with`


def _host_keys(
    settings: Settings, invocation: Invocation, path: str, agent: PrivateAgent, patience: Patience
) -> tuple[str, list[str]]:
    """The file with the list of host keys, "" if the user has pinned no signer; and the options for `ssh` that it calls
    for. ssh resolves its host while the list is fetched."""
    if not settings.publishers:
        return "", []
    from signer.safe_session.host_list import fetch_host_list
    from signer.safe_session.listed import Question, host_options

    question = Question(path, invocation.command) if invocation.verb == "ssh" else None
    try:
        known_hosts = fetch_host_list(settings.server, settings.publishers, agent.hosts, patience)
    except BaseException:
        if question is not None:
            question.drop()
        raise
    return known_hosts, [] if question is None else host_options(question.names(), known_hosts)


def _run_command(
    invocation: Invocation,
    path: str,
    command: list[str],
    agent: PrivateAgent,
    certificate: Certificate,
    known_hosts: str,
) -> int:
    """Step 5. If a host has refused the certificate and the command has failed, a line says what the certificate was.

    Without wrappers the command runs all the same, after a note; with a list of host keys, which every ssh of the
    command must look up, it does not.
    """
    from signer.safe_session.relay import AgentRelay
    from signer.safe_session.wrappers import write_wrappers

    try:
        wrappers = write_wrappers(agent.programs, path, may_persist=_may_persist(invocation), known_hosts=known_hosts)
    except Unavailable as error:
        if known_hosts:
            raise  # no ssh that the command starts would verify its host by the list
        _note(invocation, f"{error.text}; a jump host, and ssh, scp and sftp started by the command, follow only")
        _note(invocation, "your own configuration of ssh, and offer the certificate unless that prevents it")
        wrappers = {}
    if invocation.verb == "ssh":
        # ssh starts the ssh of a jump host by its own name.
        command = [wrappers.get("ssh", command[0]), *command[1:]]
    else:
        path = wrappers.get(os.path.basename(path), path)
    with AgentRelay(agent.socket, agent.relay) as relay:
        status = run(path, command, session_environment(relay.path, agent.programs))
        if status and relay.was_refused():
            output.say_refused_login(certificate, as_json=invocation.json)
    return status


def _may_persist(invocation: Invocation) -> bool:
    """False where a master connection would keep a program waiting for the end of what is written."""
    return has_terminal() or invocation.sets_persist


def _note(invocation: Invocation, text: str) -> None:
    output.remark(text if invocation.json else f"note: {text}", as_json=invocation.json)


def _inform(topic: str) -> None:
    if topic == "version":
        from signer import __version__

        output.show(f"safe-session {__version__}\n")
    else:
        from signer.safe_session.usage import TEXT

        output.show_help(TEXT)


def _occupy_standard_descriptors() -> None:
    """Opens closed descriptors 0, 1 and 2, so that no pipe of this process becomes a standard stream of the command."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
