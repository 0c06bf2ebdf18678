"""Where `safe-session`'s own time goes: its steps one by one, in a fresh process. Prints milliseconds as JSON.

Run as a module in the environment of a session. It takes the steps of `safe_session.main._session` one after another,
where the real one starts the agent and lets it get ready meanwhile: the sum is more than a session adds.
"""

from __future__ import annotations

import json
import time


def main() -> None:
    told: dict[str, float] = {}
    last = time.perf_counter()

    def note(step: str) -> None:
        nonlocal last
        now = time.perf_counter()
        told[step] = (now - last) * 1000
        last = time.perf_counter()

    from signer.safe_session.agent import PrivateAgent
    from signer.safe_session.arguments import parse_arguments
    from signer.safe_session.request import Patience, obtain_certificate
    from signer.safe_session.settings import load_settings
    from signer.ssh.agent import render_add_ed25519_certificate

    note("imports")
    asked = parse_arguments(["exec", "--", "true"])
    settings = load_settings(asked.role)
    note("settings, token file")
    key, certificate = obtain_certificate(settings, asked, Patience(None))
    note("key, request and answer")
    agent = PrivateAgent()
    note("agent: start")
    message = render_add_ed25519_certificate(
        certificate.blob, memoryview(key.seed).cast("B"), key.public, comment="bench", lifetime=certificate.lifetime
    )
    agent.add(message)
    note("agent: ready, key in it")
    key.wipe()
    agent.end()
    note("agent: end")
    print(json.dumps(told))


if __name__ == "__main__":
    main()
