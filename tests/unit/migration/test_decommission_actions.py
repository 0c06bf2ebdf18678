"""What the actions that remove Vault check once more: a late blocker, and a Vault that only restarts."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from signer.errors import SignerError, Unavailable
from signer.migration.config import CutoverFile, parse_cutover_file
from signer.migration.decommission import actions
from signer.migration.decommission.actions import RemovalActions
from signer.migration.decommission.blockers import Blocker
from signer.migration.decommission.snapshot import Snapshot
from signer.migration.decommission.steps import removal_steps
from signer.migration.decommission.survey import Blocked, RemovalReadiness
from signer.migration.evidence.store import Evidence
from signer.migration.journal import Journal, RunState
from signer.migration.observe import Observed
from signer.migration.plan import StepFailed
from signer.migration.run import Run, destroyed_by
from signer.subprocesses import CommandResult
from signer.vault.inventory import KvEntries, Mount, Server, Unread
from tests.parts.cutover_file import GOOD, REMOVAL
from tests.parts.removal import CLEAR, READY
from tests.parts.runs import Ledger

NO_SERVICE: Any = None  # nothing here asks the service
FULL = replace(READY, blockers=[Blocker("secrets_left", "secrets are left: 1 in late/", "move them")])


BUILT_IN: dict[str, Any] = {"sys/": {"type": "system"}, "identity/": {"type": "identity"}}


class Vault:
    """Answers as told, and keeps what it was asked to do."""

    asked: ClassVar[list[tuple[str, str]]] = []
    answers: ClassVar[dict[str, Any]] = {}

    def __init__(self, *_: object) -> None:
        pass

    def __enter__(self) -> Vault:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass

    def call(self, method: str, path: str, *_: object, **__: object) -> dict[str, Any]:
        self.asked.append((method, path))
        answer = self.answers.get(path, {"data": {}})
        if isinstance(answer, SignerError):
            raise answer
        return answer  # type: ignore[no-any-return]

    def is_unrouted(self, method: str, path: str, _body: object) -> bool:
        return self.call(method, path).get("unrouted") is True


@pytest.fixture
def file(tmp_path: Path) -> CutoverFile:
    for name in ("token", "vault-token", "admin"):
        (tmp_path / name).write_text(f"{name}-that-nobody-knows\n")
        (tmp_path / name).chmod(0o600)
    text = (GOOD + REMOVAL).replace("/root/", f"{tmp_path}/") + 'remove_data_command = ["rm", "-rf", "/data"]\n'
    return parse_cutover_file(text.replace("/var/lib/safe-session/evidence", f"{tmp_path}/evidence").encode())


def acting_on(file: CutoverFile, *begun: str, removed_by: str = "") -> RemovalActions:
    """Of a run that was cut off after those steps began."""
    evidence = Evidence.create(file.evidence_dir, "decommission", 1_800_000_000)
    journal = Journal(file.evidence_dir, evidence.run)
    for step in begun:
        journal.write("step.began", step=step)
    acting = RemovalActions(file, NO_SERVICE, removed_by)
    acting.begin(Run(journal, evidence, "", Ledger()))
    return acting


@pytest.fixture(autouse=True)
def vault(monkeypatch: pytest.MonkeyPatch) -> type[Vault]:
    Vault.asked, Vault.answers = [], {"sys/mounts": {"data": BUILT_IN}}
    monkeypatch.setattr(actions, "VaultAdmin", Vault)
    monkeypatch.setattr(actions, "_places", lambda address: [address])
    return Vault


def test_what_came_in_the_way_during_the_snapshot_stops_it_before_anything_is_destroyed(
    file: CutoverFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actions, "read_readiness", lambda *_: FULL)
    steps = removal_steps(file, acting_on(file))
    at = next(number for number, step in enumerate(steps) if step.effect == "DESTROYS")
    verify = steps[at - 1].verify
    assert verify is not None
    with pytest.raises(Blocked, match="secrets_left"):
        verify()


@pytest.mark.parametrize("found, is_blocked", [(FULL, True), (READY, False)])
def test_a_run_that_was_cut_off_before_it_destroyed_anything_looks_again(
    file: CutoverFile, monkeypatch: pytest.MonkeyPatch, vault: type[Vault], found: RemovalReadiness, is_blocked: bool
) -> None:
    monkeypatch.setattr(actions, "read_readiness", lambda *_: found)
    late = acting_on(file, "disable")
    if is_blocked:
        with pytest.raises(Blocked):
            late.disable()
    else:
        late.disable()
    assert (("DELETE", "sys/mounts/ssh") in vault.asked) != is_blocked


def test_a_vault_that_refuses_connections_is_stopped_all_the_same(
    file: CutoverFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be on its way up: what starts it again is what the stop command ends."""
    monkeypatch.setattr(RemovalActions, "is_gone", lambda _self: True)
    stop = {step.name: step for step in removal_steps(file, acting_on(file))}["stop"]
    assert not stop.is_done()
    stop = {step.name: step for step in removal_steps(file, acting_on(file, "stop"))}["stop"]
    assert stop.is_done()


def test_the_version_of_the_vault_that_was_removed_is_kept_whenever_the_run_ends(
    file: CutoverFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actions, "read_readiness", lambda *_: READY)
    monkeypatch.setattr(actions, "observe_service", lambda *_: Observed())
    first = acting_on(file)
    first.inventory()
    run = first._run
    assert run.versions == {"vault": CLEAR.version}
    run.versions = {}
    RemovalActions(file, NO_SERVICE).begin(run)  # resumed, with Vault gone
    assert run.versions == {"vault": CLEAR.version}


def test_steps_that_destroy_are_known_by_their_names_where_the_plan_is_lost(file: CutoverFile) -> None:
    steps = removal_steps(file, acting_on(file))
    for step in steps:
        state = RunState("2027-01-15T08-00-00Z-decommission", "decommission", begun={step.name: None})
        assert (destroyed_by(file.evidence_dir, state) != "") == (step.effect == "DESTROYS"), step.name
    assert "remove-data" in [step.name for step in steps]
    of_a_cutover = RunState("2027-01-15T08-00-00Z-cutover", "cutover", begun={"disable": None})
    assert destroyed_by(file.evidence_dir, of_a_cutover) == ""


@pytest.mark.parametrize(
    "wanted, why", [("removed", "in the step that removes it"), ("kept, sealed", "no run looks at Vault's disk")]
)
def test_the_end_is_looked_at_beside_the_plan_and_what_is_out_of_sight_is_said(
    file: CutoverFile, monkeypatch: pytest.MonkeyPatch, wanted: str, why: str
) -> None:
    monkeypatch.setattr(actions, "_is_refused", lambda _: True)
    monkeypatch.setattr(actions, "observe_service", lambda *_: Observed({"ready": True, "mode": "local"}))
    acting = acting_on(file)
    plan = {
        "operation": "decommission", "inputs": {"policy": {"ca": "SHA256:ours", "digest": "d"}},
        "now": {"mode": "local", "vault": {"version": "1"}}, "then": {"vault": "gone", "data": wanted},
    }  # fmt: skip
    acting._run.evidence.write_json("plan.json", plan)
    assert acting._run.look is not None
    planned, seen = acting._run.look()
    assert planned == {
        "ready": True, "mode": "local", "ca": "SHA256:ours", "policy": "d", "vault": "gone", "data": wanted,
    }  # fmt: skip
    assert seen.facts == {"ready": True, "mode": "local", "vault": "gone"}
    assert why in seen.unread["data"]


# --- data that was removed by hand ----------------------------------------------------------------------------------


@pytest.mark.parametrize("word", [True, False])
def test_the_operators_word_stands_for_the_command_that_removes_the_data(
    file: CutoverFile, monkeypatch: pytest.MonkeyPatch, word: bool
) -> None:
    ran: list[object] = []

    def run(words: tuple[str, ...], **_: object) -> CommandResult:
        ran.append(words)
        return CommandResult(1, "", "", True, 0.1)

    monkeypatch.setattr(actions, "run", run)
    acting = acting_on(file, "remove-data", removed_by="ops" if word else "")
    if word:
        seen = acting.remove_data()
        assert ran == []
        assert seen.summary == "removed by hand, confirmed by the operator"
        assert seen.facts == {"by_hand": True, "by_the_word_of": "ops", "not_run": "rm -rf /data"}
    else:
        with pytest.raises(StepFailed) as refused:
            acting.remove_data()
        assert len(ran) == 1
        assert "signer decommission apply PLAN --data-is-removed" in refused.value.hint


# --- what proves nothing ---------------------------------------------------------------------------------------------

SIGN = "ssh/sign/llmops"
FORBIDDEN = Unavailable("vault_forbidden", "no")


@pytest.mark.parametrize(
    "answer", [{}, {"data": {}}, {"data": {"sys/": {"type": "system"}}}, {"data": {**BUILT_IN, "sys/": {"type": "kv"}}}]
)
def test_audit_5_a_partial_list_of_mounts_does_not_prove_that_one_is_gone(
    file: CutoverFile, vault: type[Vault], answer: dict[str, Any]
) -> None:
    acting = acting_on(file)
    assert acting.is_disabled()
    vault.answers["sys/mounts"] = answer
    with pytest.raises(Unavailable, match="not understood"):
        acting.is_disabled()


@pytest.mark.parametrize(
    "answer, code",
    [
        (FORBIDDEN, "vault_proof_missing"),
        (Unavailable("vault_mount_missing", "a 404 of a proxy"), "vault_mount_missing"),
        ({"data": {"signed_key": "x"}}, "vault_still_signs"),
    ],
)
def test_audit_5_forbidden_does_not_prove_that_vault_signs_no_more(
    file: CutoverFile, vault: type[Vault], answer: object, code: str
) -> None:
    vault.answers[SIGN] = answer
    with pytest.raises(SignerError) as refused:
        acting_on(file).signs_no_more()
    assert refused.value.code == code


def test_audit_5_no_route_proves_it_and_the_expired_token_of_the_cutover_is_in_nobodys_way(
    file: CutoverFile, vault: type[Vault], monkeypatch: pytest.MonkeyPatch
) -> None:
    vault.answers[SIGN] = {"unrouted": True}
    assert acting_on(file).signs_no_more().facts == {"asked": 2, "no_such_mount": 2}

    class Expired(Vault):
        def __init__(self, _address: str, token_file: Path, *_: object) -> None:
            self.is_expired = token_file.name == "vault-token"

        def is_unrouted(self, method: str, path: str, body: object) -> bool:
            if self.is_expired:
                raise FORBIDDEN
            return super().is_unrouted(method, path, body)

    monkeypatch.setattr(actions, "VaultAdmin", Expired)
    assert acting_on(file).signs_no_more().facts == {"asked": 2, "no_such_mount": 1}


@pytest.mark.parametrize("keys", [["own", 7], ["other"], None])
def test_audit_5_a_partial_list_of_tokens_does_not_prove_that_all_are_revoked(
    file: CutoverFile, vault: type[Vault], keys: object
) -> None:
    vault.answers["auth/token/lookup-self"] = {"data": {"accessor": "own"}}
    vault.answers["auth/token/accessors"] = {"data": {"keys": keys}}
    with pytest.raises(Unavailable):
        acting_on(file).is_revoked()


@pytest.mark.parametrize("answer", [{}, {"sealed": None}, {"sealed": "true"}])
def test_audit_5_an_answer_without_the_seal_state_is_not_sealed(
    file: CutoverFile, vault: type[Vault], monkeypatch: pytest.MonkeyPatch, answer: dict[str, Any]
) -> None:
    monkeypatch.setattr(actions, "_is_refused", lambda _: False)
    vault.answers["sys/seal-status"] = answer
    with pytest.raises(Unavailable, match="not understood"):
        acting_on(file).is_sealed()
    assert actions.vault_state(file) == "vault_answer_malformed"


@pytest.mark.parametrize("is_gone", [True, False])
def test_audit_5_a_vault_that_was_sealed_or_stopped_before_the_last_look_is_not_done(
    file: CutoverFile, vault: type[Vault], monkeypatch: pytest.MonkeyPatch, is_gone: bool
) -> None:
    monkeypatch.setattr(actions, "_is_refused", lambda _: is_gone)
    vault.answers["sys/seal-status"] = {"sealed": True}
    acting = acting_on(file, "seal-vault")
    with pytest.raises(StepFailed) as refused:
        acting.is_sealed()
    assert refused.value.code == "vault_sealed_early"
    acting._run.evidence.write_json("last-look.json", {"at": 1})
    assert acting.is_sealed()


# --- what came since the snapshot ------------------------------------------------------------------------------------

LATE_KV = KvEntries("late/", 2, ("a/secret",))
LATE = replace(CLEAR, mounts=(*CLEAR.mounts, Mount("late/", "kv", 2, "u")), kv=(LATE_KV,))
CHANGES = {
    "secret": (LATE, "late/a/secret, mount late/ (kv, u)"),
    "ssh mount": (replace(CLEAR, mounts=(*CLEAR.mounts, Mount("ssh/", "ssh", 0, "anew"))), "mount ssh/ (ssh, anew)"),
    "namespace": (replace(CLEAR, namespaces=("team/",)), "namespace team/"),
    "auth method": (replace(CLEAR, auth_methods=(*CLEAR.auth_methods, Mount("jwt/", "jwt"))), "auth method jwt/ (jwt)"),
    "policy": (replace(CLEAR, policies=("default", "late", "root")), "policy late"),
    "entity": (replace(CLEAR, entities=4), "entity 4"),
    "node": (replace(CLEAR, servers=(Server("two", "b:8201", "http://b"),)), "node two at http://b"),
}


class Looking:
    """Looks at a Vault that has what `found` says, and is sealed by the first call to do so."""

    def __init__(self, file: CutoverFile, monkeypatch: pytest.MonkeyPatch, acting: RemovalActions) -> None:
        self.found = CLEAR
        self.snapshots: list[Path] = []
        acting._run.evidence.write_json("inventory.json", CLEAR.as_json())
        monkeypatch.setattr(actions, "read_inventory", lambda *_: self.found)
        monkeypatch.setattr(acting, "_seal_nodes", lambda: {file.vault.address: "sealed"})
        monkeypatch.setattr(acting, "is_sealed", lambda: True)
        monkeypatch.setattr(acting, "_download", self._download)

    def _download(self, path: Path, *_: object) -> Snapshot:
        self.snapshots.append(path)
        return Snapshot("s", 1, 99)


@pytest.fixture
def acting(file: CutoverFile) -> RemovalActions:
    return acting_on(file)


@pytest.fixture
def looking(file: CutoverFile, monkeypatch: pytest.MonkeyPatch, acting: RemovalActions) -> Looking:
    return Looking(file, monkeypatch, acting)


def changed(acting: RemovalActions) -> str:
    with pytest.raises(StepFailed) as stopped:
        acting.seal_vault()
    assert stopped.value.code == "vault_changed"
    return stopped.value.text.partition("snapshot: ")[2]


def test_nothing_new_is_sealed_at_once(acting: RemovalActions, looking: Looking) -> None:
    looking.found = replace(CLEAR, mounts=CLEAR.mounts[:2], ssh=(), tokens=1, leases=0)
    assert acting.seal_vault().summary == "nothing new since the snapshot; sealed"
    assert looking.snapshots == []


@pytest.mark.parametrize("what", CHANGES)
def test_audit_5_what_is_new_since_the_snapshot_stops_the_run_and_then_is_in_a_second_one(
    acting: RemovalActions, looking: Looking, what: str
) -> None:
    looking.found, told = CHANGES[what]
    assert changed(acting) == told
    assert looking.snapshots == []
    assert acting.seal_vault().summary == "snapshot 2 has what was new; sealed"
    assert [path.name.partition("decommission")[2] for path in looking.snapshots] == [".2.snap"]
    assert acting._run.evidence.read_json("snapshot-2.json")["sha256"] == "s"


def test_audit_5_what_is_new_since_it_was_told_stops_the_run_once_more(
    acting: RemovalActions, looking: Looking, monkeypatch: pytest.MonkeyPatch
) -> None:
    looking.found = LATE
    changed(acting)
    looking.found = replace(LATE, policies=(*LATE.policies, "later"))
    assert changed(acting) == "policy later"
    looks = iter((looking.found, replace(looking.found, entities=4)))  # one comes during the second snapshot
    monkeypatch.setattr(actions, "read_inventory", lambda *_: next(looks))
    assert changed(acting) == "entity 4"
    assert len(looking.snapshots) == 1
    monkeypatch.setattr(actions, "read_inventory", lambda *_: replace(looking.found, entities=4))
    assert acting.seal_vault().summary == "snapshot 3 has what was new; sealed"


def test_audit_5_where_the_operator_makes_the_snapshot_what_is_new_must_go(
    file: CutoverFile, monkeypatch: pytest.MonkeyPatch, acting: RemovalActions, looking: Looking
) -> None:
    monkeypatch.setattr(acting, "_wanted", replace(acting._wanted, snapshot_file=file.evidence_dir))
    looking.found = LATE
    assert changed(acting) == changed(acting)
    looking.found = CLEAR
    assert acting.seal_vault().summary == "nothing new is left; sealed"
    assert looking.snapshots == []


def test_audit_5_a_last_look_that_cannot_read_everything_seals_nothing(
    acting: RemovalActions, looking: Looking
) -> None:
    looking.found = replace(CLEAR, unread=(Unread("kv/", "vault_forbidden"),))
    with pytest.raises(StepFailed, match="kv/ \\(vault_forbidden\\)"):
        acting.seal_vault()


# --- gone, and not back again ----------------------------------------------------------------------------------------


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(time, "monotonic", found.monotonic)
    monkeypatch.setattr(time, "sleep", found.sleep)
    return found


@pytest.mark.parametrize("back_after", [5, 29, None])
def test_audit_5_a_supervisor_that_starts_vault_again_is_waited_for(
    file: CutoverFile, monkeypatch: pytest.MonkeyPatch, clock: Clock, back_after: int | None
) -> None:
    acting = acting_on(file)
    monkeypatch.setattr(actions, "_places", lambda address: [address])
    monkeypatch.setattr(
        actions, "_is_refused", lambda _: clock.now >= 2 and (back_after is None or clock.now < 2 + back_after)
    )
    if back_after is None:
        assert acting.gone().facts["seconds"] == 30
        assert clock.now >= 32
        return
    with pytest.raises(StepFailed, match=f"accepts connections again after {back_after} s"):
        acting.gone()


def test_audit_5_every_named_node_must_be_gone_and_is_looked_at_once_more_before_the_seal(
    file: CutoverFile, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    acting = acting_on(file)
    monkeypatch.setattr(acting, "_wanted", replace(acting._wanted, other_nodes=("http://b:8200",)))
    monkeypatch.setattr(actions, "_places", lambda address: [address])
    monkeypatch.setattr(actions, "_is_refused", lambda places: places != ["http://b:8200"])
    assert not acting.is_gone()
    for act in (acting.gone, acting.seal):
        with pytest.raises(StepFailed, match=r"^http://b:8200 ") as refused:
            act()
        assert refused.value.code == "vault_still_there"
    assert clock.now > actions.GONE_WITHIN


class Cluster:
    """Nodes by address; a sealed one is followed by the next standby if `enough` of all are unsealed."""

    def __init__(self, states: dict[str, str], enough: int) -> None:
        self.states, self.enough = states, enough

    def state(self, address: str) -> str:
        unsealed = [one for one, state in self.states.items() if state in ("active", "standby")]
        if "active" not in self.states.values() and len(unsealed) >= self.enough:
            self.states[unsealed[0]] = "active"
        return self.states[address]

    def seal(self, address: str) -> None:
        assert self.states[address] == "active"
        self.states[address] = "sealed"


@pytest.mark.parametrize(
    "is_raft, never, left",
    [(True, False, ["sealed", "sealed", "standby"]), (False, False, ["sealed"] * 3), (True, True, [])],
)
def test_audit_5_each_node_that_becomes_active_is_sealed_until_none_can(
    file: CutoverFile, monkeypatch: pytest.MonkeyPatch, clock: Clock, is_raft: bool, never: bool, left: list[str]
) -> None:
    acting = acting_on(file)
    names = (file.vault.address, "http://b", "http://c")
    monkeypatch.setattr(acting, "_wanted", replace(acting._wanted, other_nodes=names[1:]))
    monkeypatch.setattr(acting, "_is_raft", is_raft)
    cluster = Cluster(dict.fromkeys(names, "standby"), 4 if never else 2 if is_raft else 1)
    monkeypatch.setattr(acting, "_node_state", cluster.state)

    class Sealing(Vault):
        def __init__(self, address: str, *_: object) -> None:
            self.address = address

        def call(self, *_: object, **__: object) -> dict[str, Any]:
            cluster.seal(self.address)
            return {}

    monkeypatch.setattr(actions, "VaultAdmin", Sealing)
    if never:
        with pytest.raises(StepFailed, match="can become active and sign"):
            acting._seal_nodes()
        assert clock.now >= actions.ELECTED_WITHIN
        return
    assert sorted(acting._seal_nodes().values()) == left
