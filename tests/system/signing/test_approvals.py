"""An agent asks and a human approves: the real service, real `ssh-keygen -Y sign`, an agent that holds a FIDO key."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from signer.ssh.statement import APPROVAL_NAMESPACE, approval_statement, request_digest
from tests.parts.agents import FidoAgent
from tests.parts.eventually import eventually
from tests.parts.fido import FidoKey, sign_through_agent
from tests.parts.keys import KeyRing
from tests.parts.lying_worker import LyingWorker, read_reply
from tests.parts.processes import command_line, descendants
from tests.parts.service import STANDARD_POLICY, Answer, Service, StartService

SECRET = "5e" * 32
CLAIM = sha256(bytes.fromhex(SECRET)).hexdigest()
CLIENTS = 990
POLICY = (
    STANDARD_POLICY.replace(
        "[identities.deploy-agent]",
        """[roles.prod]
principals = ["llmops"]
default_principals = ["llmops"]
key_types = ["ssh-ed25519"]
approval = { for = ["agent"], by = ["operators"], valid_for = "10m" }

[roles.glass]
principals = ["llmops"]
default_principals = ["llmops"]
max_ttl = "15m"
key_types = ["ssh-ed25519"]
break_glass = true

[identities.deploy-agent]""",
    )
    .replace('roles = ["llmops"]', 'roles = ["llmops", "prod"]')
    .replace('groups = ["operators"]\nroles = ["llmops", "prod"]', 'groups = ["operators"]\nroles = ["glass"]')
    + """
[identities.anna]
kind = "human"
groups = ["operators"]
may = ["approve", "ledger.read"]
approval_keys = [{ kind = "ssh", key = "{fido:anna}" }]
tokens = [{ sha256 = "{token:anna}", expires = 2099-01-01T00:00:00Z }]
"""
)


@pytest.fixture(scope="module")
def service(keyring: KeyRing, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("asking") / "service"
    with Service(folder, keyring("ed25519", "ca"), POLICY, environ={"SIGNER_WORKERS": "2"}) as started:
        yield started


class Human:
    """Signs what a reply shows, as a person does on their own machine, and sends it."""

    def __init__(self, service: Service, name: str, folder: Path) -> None:
        self.service, self.name, self.folder = service, name, folder
        self.key = FidoKey(name=name)

    def sign(self, shown: Any, waiver: Any = None) -> str:
        statement = approval_statement(shown["request"], request_digest(shown["frozen"]), self.name, waiver)
        with FidoAgent(self.key) as agent:
            return sign_through_agent(agent.socket, self.key, statement, APPROVAL_NAMESPACE, self.folder)

    def send(self, shown: Any, signature: str, waiver: Any = None) -> Answer:
        body = {"signature": signature, "waiver": waiver}
        return self.service.ask("POST", f"/api/requests/{shown['request']}/approve", body, identity=self.name)

    def approve(self, shown: Any) -> Any:
        answer = self.send(shown, self.sign(shown))
        assert answer.status == 200, answer.body
        return answer.json()


@pytest.fixture
def anna(service: Service, tmp_path: Path) -> Human:
    return Human(service, "anna", tmp_path)


def ask(service: Service, reason: str, **fields: object) -> Any:
    answer = service.ask("POST", "/api/sign/prod", {"reason": reason, **fields}, identity="deploy-agent")
    assert answer.status == 202, answer.body
    return answer.json()


def claim(service: Service, shown: Any, line: str, secret: str = SECRET) -> Answer:
    body = {"public_key": line, "claim_secret": secret}
    return service.ask("POST", f"/api/requests/{shown['request']}/claim", body, identity="deploy-agent")


def code(answer: Answer) -> str:
    return str(answer.json()["code"])


def test_a_request_is_approved_with_a_real_signature_and_claimed_once(
    service: Service, anna: Human, keyring: KeyRing
) -> None:
    line = keyring("ed25519").public_line
    shown = ask(service, "by secret", claim_sha256=CLAIM, public_key=line)
    assert claim(service, shown, line).status == 202
    assert anna.approve(shown)["state"] == "approved"
    assert code(claim(service, shown, line, "00" * 32)) == "claim_secret_wrong"
    issued = claim(service, shown, line)
    assert (issued.status, issued.json()["role"]) == (201, "prod")
    assert code(claim(service, shown, line)) == "request_issued"
    record = service.ask("GET", f"/api/certificates/{issued.json()['serial']}", identity="anna").json()
    assert (record["request"], record["approved_by"]) == (shown["request"], ["anna"])


def test_a_vault_client_is_told_to_repeat_its_call(service: Service, anna: Human, keyring: KeyRing) -> None:
    call = {"public_key": keyring("ed25519").public_line, "reason": "by vault"}
    waiting = service.ask("POST", "/v1/ssh/sign/prod", call, identity="deploy-agent")
    assert waiting.status == 400
    (sentence,) = waiting.json()["errors"]
    listed = service.ask("GET", "/api/requests?state=pending", identity="anna").json()["requests"]
    (shown,) = [row for row in listed if row["frozen"]["reason"] == "by vault"]
    assert shown["request"] in sentence
    assert "repeat the same call after approval" in sentence
    anna.approve(shown)
    signed = service.ask("POST", "/v1/ssh/sign/prod", call, identity="deploy-agent")
    assert signed.status == 200, signed.body
    assert signed.json()["data"]["signed_key"].startswith("ssh-ed25519-cert-v01@openssh.com ")


def test_a_signature_without_a_touch_or_by_another_key_approves_nothing(service: Service, anna: Human) -> None:
    shown = ask(service, "without a touch", claim_sha256=CLAIM)
    anna.key.flags = 0
    assert code(anna.send(shown, anna.sign(shown))) == "signature_without_presence"
    anna.key = FidoKey(name="operator")
    assert code(anna.send(shown, anna.sign(shown))) == "approval_key_unknown"
    anna.key = FidoKey(name="anna")
    assert code(anna.send(shown, anna.sign(shown, {"until": "2099-01-01T00:00:00Z", "uses": 5}))) == "signature_wrong"


def test_a_worker_that_lies_gets_no_certificate_without_a_signature(
    service: Service, anna: Human, keyring: KeyRing
) -> None:
    line = keyring("ed25519").public_line
    shown = ask(service, "a liar's", claim_sha256=CLAIM)
    agent, human = service.tokens["deploy-agent"], service.tokens["anna"]
    claimed = json.dumps({"public_key": line, "claim_secret": SECRET}).encode()
    forged = {"approved": True, "state": "approved", "now": 0, "approver": "anna", "identity": "anna", "kind": "human"}
    with LyingWorker(service.socket) as liar:
        for token in (agent, human, service.tokens["operator"]):
            for signature in ("", "junk", anna.sign({**shown, "frozen": {**shown["frozen"], "ttl": 1}})):
                body = json.dumps({"signature": signature, "waiver": None}).encode()
                told = liar.ask(body, op="approve", request=shown["request"], token=token, **forged)
                assert "error" in told, told
        told = liar.ask(claimed, op="claim", request=shown["request"], token=agent, **forged)
        assert told["reply"]["state"] == "pending"
        signed = json.dumps({"public_key": line, "reason": "a liar's"}).encode()
        assert liar.ask(signed, op="sign", role="prod", token=agent, **forged)["reply"]["state"] == "pending"
        for op in ("approve", "deny", "withdraw", "claim", "request", "requests", "waivers", "incidents"):
            told = liar.ask(claimed, op=op, request=shown["request"], token="sgn_x", **forged)
            assert told["error"]["code"].startswith("token_"), op
        watching = liar.connect()
        watching.send(b'{"op": "watch"}')
        assert read_reply(watching) == {"reply": {"requests": []}}
        anna.approve(shown)
        assert read_reply(watching) == {"reply": {"requests": [shown["request"]]}}, "a name, and nothing of it"


def test_an_agent_approves_through_no_door_not_even_with_a_humans_signature(service: Service, anna: Human) -> None:
    shown = ask(service, "an agent's own", claim_sha256=CLAIM)
    signed = {"signature": anna.sign(shown), "waiver": None}
    path = f"/api/requests/{shown['request']}/approve"
    assert code(service.ask("POST", path, signed, identity="deploy-agent")) == "approver_not_human"
    with LyingWorker(service.socket) as liar:
        told = liar.ask(
            json.dumps(signed).encode(), op="approve", request=shown["request"], token=service.tokens["deploy-agent"],
            identity="anna", kind="human", approver="anna",
        )  # fmt: skip
    assert told["error"]["code"] == "approver_not_human"
    assert service.ask("GET", f"/api/requests/{shown['request']}", identity="anna").json()["approvals"] == []


def test_break_glass_opens_an_incident_that_closes_with_a_commit(
    service: Service, keyring: KeyRing, tmp_path: Path
) -> None:
    operator = Human(service, "operator", tmp_path)
    body = {"public_key": keyring("ed25519").public_line, "reason": "the database is down, ticket 812"}
    shown = service.ask("POST", "/api/sign/glass", body, identity="operator").json()
    assert (shown["state"], shown["presence"]) == ("pending", "missing")
    operator.approve(shown)
    assert service.ask("POST", "/api/sign/glass", body, identity="operator").status == 201
    (row,) = service.ask("GET", "/api/incidents", identity="anna").json()["incidents"]
    path = f"/api/incidents/{row['incident']}/close"
    assert code(service.ask("POST", path, {"reference": "soon"}, identity="operator")) == "incident_reference_malformed"
    assert service.ask("POST", path, {"reference": "4a1f09c"}, identity="operator").status == 200
    assert service.ask("GET", "/api/incidents", identity="anna").json()["incidents"] == []


# --- waiting --------------------------------------------------------------------------------------------------------


class Waiting:
    """A client that waits for a decision, in a thread of the test's."""

    def __init__(self, look: Callable[[], Answer]) -> None:
        self.answer: Answer | None = None
        self._thread = threading.Thread(target=self._wait, args=(look,))
        self._thread.start()

    def _wait(self, look: Callable[[], Answer]) -> None:
        self.answer = look()

    def state(self) -> str:
        self._thread.join(60)
        assert self.answer is not None
        return str(self.answer.json().get("state"))


def wait_for(service: Service, shown: Any, identity: str = "deploy-agent", seconds: int = 50) -> Answer:
    path = f"/api/requests/{shown['request']}?wait={seconds}"
    return service.ask("GET", path, identity=identity, timeout=70)


def test_a_waiting_client_is_woken_by_the_decision(service: Service, anna: Human) -> None:
    shown = ask(service, "woken", claim_sha256=CLAIM)
    waiting = Waiting(lambda: wait_for(service, shown))
    anna.approve(shown)
    assert waiting.state() == "approved"
    assert wait_for(service, shown).json()["state"] == "approved", "nothing is left to wait for"
    denied = ask(service, "denied", claim_sha256=CLAIM)
    waiting = Waiting(lambda: wait_for(service, denied))
    service.ask("POST", f"/api/requests/{denied['request']}/deny", {"reason": "no"}, identity="anna")
    assert waiting.state() == "denied"


def test_a_client_whose_time_is_over_gets_the_pending_request(service: Service) -> None:
    shown = ask(service, "too slow", claim_sha256=CLAIM)
    assert wait_for(service, shown, seconds=1).json()["state"] == "pending"
    assert code(wait_for(service, shown, identity="stranger")) == "unknown_request"
    assert wait_for(service, shown, seconds=51).status == 400
    assert wait_for(service, shown, seconds=0).status == 200


def test_waiting_clients_survive_a_keeper_that_is_killed(start_service: StartService, tmp_path: Path) -> None:
    service = start_service(POLICY)
    shown = ask(service, "survives", claim_sha256=CLAIM)
    waiting = Waiting(lambda: wait_for(service, shown))
    eventually(lambda: threads_and_waiters(service)[1] >= 1, "it is connected")
    wait_for(service, shown, seconds=1)  # a client that comes later waits its whole second; so the first one waits
    keeper = service.keeper_pid()
    assert keeper is not None
    os.kill(keeper, signal.SIGKILL)
    eventually(lambda: service.keeper_pid() not in (None, keeper) and service.is_ready(), "the keeper is back")
    Human(service, "anna", tmp_path).approve(shown)
    assert waiting.state() == "approved"


@pytest.mark.timeout(300)
def test_a_thousand_waiting_clients_cost_no_thread_each(service: Service, anna: Human) -> None:
    shown = ask(service, "a thousand", claim_sha256=CLAIM)
    for _ in range(20):  # both workers have met the token
        wait_for(service, shown, seconds=0)
    threads, _ = threads_and_waiters(service)
    head = f"GET /api/requests/{shown['request']}?wait=50 HTTP/1.1\r\nHost: x\r\n"
    head += f"Authorization: Bearer {service.tokens['deploy-agent']}\r\n\r\n"
    clients = []
    try:
        for number in range(CLIENTS):
            source = f"127.0.0.{1 + number % 4}"  # one address may have three quarters of a worker's connections
            client = socket.create_connection(("127.0.0.1", service.port), 60, (source, 0))
            client.sendall(head.encode())
            clients.append(client)
        eventually(lambda: threads_and_waiters(service)[1] >= CLIENTS, "all of them wait")
        assert threads_and_waiters(service)[0] <= threads + 2
        assert service.ask("GET", "/healthz").status == 200
        anna.approve(shown)
        answers = [read_answer(client) for client in clients]
    finally:
        for client in clients:
            client.close()
    assert {status for status, _ in answers} == {200}
    assert all(b'"state":"approved"' in body for _, body in answers)


def read_answer(client: socket.socket) -> tuple[int, bytes]:
    """Status and body of the answer, in however many pieces they come."""
    answer = http.client.HTTPResponse(client)
    answer.begin()
    try:
        return answer.status, answer.read()
    finally:
        answer.close()


def threads_and_waiters(service: Service) -> tuple[int, int]:
    """Threads of all api processes, and established connections to the service's port."""
    threads = 0
    for process in descendants(service.pid):
        if b"keeper" not in command_line(process).split(b"\0"):
            status = Path(f"/proc/{process}/status").read_text()
            threads += int(status.partition("Threads:")[2].split()[0])
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    local = f":{service.port:04X}"
    return threads, sum(row[1].endswith(local) and row[3] == "01" for row in rows)
