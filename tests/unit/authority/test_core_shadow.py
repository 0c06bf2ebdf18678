"""Mode shadow in the core: Vault's certificate for the caller, ours for the comparison, each difference on record."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from signer.authority import shadow
from signer.authority.core import Core
from signer.authority.limits import Differences
from signer.authority.vault_certificates import PendingCertificate
from signer.ca.backends import Backend, FileBackend
from signer.ca.key import load_ca_key
from signer.errors import BadFile, SignerError, Unavailable
from signer.ledger.store import Ledger
from signer.model import Entry, Event, PublicKey, Returned
from signer.protocol.commands import Freeze
from signer.protocol.replies import Reply
from signer.service.key_source import FileSource
from signer.service.reload import Reloader
from signer.settings import load_settings
from signer.ssh.certificate import CertificateFields, decode_certificate
from signer.ssh.signing import CertifyInPool
from signer.vault.parity import Difference, compare_certificates
from tests.parts import builders, vault_episodes
from tests.parts.builders import NOW, MemoryStore, PretendKey, rotations
from tests.parts.episodes import Memory
from tests.parts.keys import KeyRing
from tests.parts.vault_episodes import CA, DOWN, VaultEpisode, backend, code, made

HOUR = Differences.window
OURS = builders.public_key("ssh-ed25519", "ca")  # the public half of what PretendKey signs with


class Batches(MemoryStore):
    """Keeps which events came in one transaction."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[list[str]] = []

    def commit(self, events: Sequence[Event], now_ms: int) -> list[Entry]:
        done = super().commit(events, now_ms)
        self.batches.append([event.kind for event in events])
        return done


@dataclass
class Bench(vault_episodes.Bench):
    """A core without a key, and a shadow."""

    store: Batches = field(default_factory=Batches)

    def restart(self) -> Core:
        self.backend = backend(OURS)
        self.core = Core(
            policy=self.policy,
            backend=self.backend,
            ledger=self.store,
            clock=lambda: self.now,
            random=lambda _count: pytest.fail("nothing is drawn for a certificate that is not made"),
            report=self.faults.append,
        )
        self.shadow = self.core.shadow
        self.core.begin({})
        return self.core

    @property
    def compared_with(self) -> PublicKey:
        key = self.backend.order.local_key
        assert key is not None
        return key

    def login(self, **changes: Any) -> Any:
        """One request that Vault signs, with `changes` to what it makes of it."""
        forward = self.send()
        return self.finish_one(forward, made(forward, **changes))

    def told(self) -> dict[str, tuple[str, str, str]]:
        """The differences on record: field to ours, Vault's and how bad."""
        bodies = self.store.bodies("shadow.difference")
        return {body["field"]: (body["ours"], body["vault"], body["severity"]) for body in bodies}


KEY_ID = {"key_id": "deploy-agent:llmops"}  # as ours, so that the test's own difference is the only one


def test_the_caller_gets_what_it_gets_in_mode_vault_and_the_same_is_recorded() -> None:
    beside, alone = Bench(), vault_episodes.Bench()
    forwards = beside.send(), alone.send()
    result = made(forwards[0], serial=7, extensions=())
    assert beside.finish_one(forwards[0], result) == alone.finish_one(forwards[1], result)
    assert beside.store.bodies("certificate.issued") == alone.store.bodies("certificate.issued")
    assert set(beside.store.kinds()) - set(alone.store.kinds()) == {"shadow.difference"}
    assert decode_certificate(builders.certificate_of(beside.login()))[0].ca_key == CA.blob


def test_what_is_the_same_is_counted_and_leaves_no_event() -> None:
    bench = Bench()
    bench.login(**KEY_ID)
    assert bench.shadow.compared == {"llmops": 1}
    assert not bench.shadow.differences
    assert "shadow.difference" not in bench.store.kinds()


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"valid_before": NOW + 600}, {"lifetime": ("15m30s", "10m30s", "error")}),
        ({"extensions": ()}, {"extensions": ("permit-pty", "none", "error")}),
        ({"valid_after": NOW}, {"lifetime": ("15m30s", "15m", "note")}),
        ({"valid_after": NOW - 60}, {"lifetime": ("15m30s", "16m", "note")}),
        ({"key_id": "vault-root-1"}, {"key_id": ("deploy-agent:llmops", "vault-root-1", "note")}),
    ],
)
def test_each_difference_is_told_with_both_values(
    changes: dict[str, Any], told: dict[str, tuple[str, str, str]]
) -> None:
    bench = Bench()
    reply = bench.login(**{**KEY_ID, **changes})
    assert bench.told() == told
    (body,) = bench.store.bodies("shadow.difference")
    assert (body["role"], body["serial"]) == ("llmops", reply["serial"])
    assert bench.store.entries[-1].actor == "deploy-agent"
    assert bench.shadow.differences == {("llmops", name): 1 for name in told}


@given(
    ttl=st.integers(1, 1800),
    pty=st.booleans(),
    clamp=st.integers(0, 1800),
    back=st.integers(-60, 60),
    fewer=st.booleans(),
    same_id=st.booleans(),
)
def test_what_is_told_is_how_a_certificate_of_mode_local_differs(
    ttl: int, pty: bool, clamp: int, back: int, fewer: bool, same_id: bool
) -> None:
    changes: dict[str, Any] = {"ttl": ttl, "extensions": (("permit-pty", ""),) if pty else ()}
    local: Any = builders.Bench().sign(**changes)
    ours = decode_certificate(builders.certificate_of(local))[0]
    bench = Bench()
    forward = bench.send(**changes)
    vaults: CertificateFields = CA.fields(forward.grant, NOW, valid_after=NOW - 30 - back)
    vaults = msgspec.structs.replace(
        vaults, valid_before=max(vaults.valid_before - clamp, NOW + 1, vaults.valid_after + 1)
    )
    vaults = msgspec.structs.replace(vaults, extensions=() if fewer else vaults.extensions)
    vaults = msgspec.structs.replace(vaults, key_id=ours.key_id if same_id else vaults.key_id)
    reply = bench.finish_one(forward, Returned(CA.certify(vaults), CA.blob))
    assert isinstance(reply, dict) == (vaults.valid_before <= NOW + ttl + 60), "refused for its times alone"
    if isinstance(reply, dict):
        differing = compare_certificates(ours, vaults)
        assert bench.told() == {found.field: (found.ours, found.vaults, found.severity) for found in differing}


def test_a_difference_is_recorded_in_the_transaction_of_its_certificate() -> None:
    bench = Bench()
    bench.login(extensions=())
    assert bench.store.batches[-1] == ["certificate.issued", "shadow.difference", "shadow.difference"]


@pytest.mark.parametrize("fail", ["before", "read"])
def test_without_the_record_there_is_neither_certificate_nor_difference(fail: str) -> None:
    bench = Bench()
    forward = bench.send()
    bench.store.fail = fail
    assert code(bench.finish_one(forward, made(forward, extensions=()))) == "ledger_unavailable"
    assert set(bench.store.kinds()) == {"keeper.started"}


# --- nothing of ours is signed ---------------------------------------------------------------------------------------


def test_no_serial_of_ours_is_used_up(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    given: dict[str, Any] = {"policy": builders.policy(), "ledger": ledger, "clock": lambda: NOW}
    faults: list[Exception] = []
    given |= {"random": os.urandom, "report": faults.append}
    core = Core(backend=backend(OURS), **given)
    core.begin({})
    for _ in range(3):
        ((_, forward),) = core.run([builders.sign()])
        assert isinstance(forward, PendingCertificate)
        ((_, reply),) = core.finish([(forward, made(forward))])
        assert isinstance(reply, Reply)
    assert ledger.last_serial() == 0
    core.end()
    local = Core(backend=FileBackend(PretendKey()), **given)
    local.begin({})
    ((_, first),) = local.run([builders.sign()])
    assert isinstance(first, Reply)
    assert builders.fields_of(first)["serial"] == "1"
    assert not faults
    ledger.close()


def test_only_the_public_half_of_a_key_is_kept_at_the_start_and_after_another_came() -> None:
    bench, new = Bench(), PretendKey("new")
    assert type(bench.compared_with) is PublicKey
    assert bench.core.use_key(new) is None
    assert type(bench.compared_with) is PublicKey
    assert bench.compared_with.fingerprint == new.fingerprint
    assert rotations(bench.store.bodies("ca.rotated")) == [{"from": OURS.fingerprint, "to": new.fingerprint}]
    bench.login()
    assert new.signed == []
    assert decode_certificate(builders.certificate_of(bench.login()))[0].ca_key == CA.blob


@pytest.mark.parametrize("fail", ["before", "after", "read"])
def test_a_key_whose_coming_cannot_be_recorded_is_not_compared_with(fail: str) -> None:
    bench = Bench()
    bench.store.fail = fail
    assert isinstance(bench.core.use_key(PretendKey("new")), Unavailable)
    assert bench.compared_with == OURS


def test_a_policy_that_pins_another_key_than_the_compared_one_is_refused() -> None:
    bench = Bench()
    with pytest.raises(BadFile) as caught:
        bench.core.use_policy(builders.policy(builders.POLICY.replace("{ca}", PretendKey("new").fingerprint)))
    assert caught.value.code == "policy_pins_another_key"


def test_sighup_takes_a_key_that_the_policy_names_and_no_other(tmp_path: Path, keyring: KeyRing) -> None:
    old, new = keyring("ed25519", "ca"), keyring("ecdsa256", "new-ca")
    key_file, policy_file, owner = tmp_path / "ca", tmp_path / "policy.toml", f"{os.geteuid()}:{os.getegid()}"

    def place(private: Path) -> None:
        key_file.unlink(missing_ok=True)
        key_file.write_bytes(private.read_bytes())
        key_file.chmod(0o400)

    place(old.private)
    policy_file.write_text(builders.policy_text(ca=old.fingerprint))
    environ = {
        "SIGNER_MODE": "shadow",
        "SIGNER_VAULT_ADDR": "http://127.0.0.1:9",
        "SIGNER_VAULT_TOKEN_FILE": "/token",
        "SIGNER_POLICY_FILE": str(policy_file),
        "SIGNER_CA_KEY_FILE": str(key_file),
        "SIGNER_CA_KEY_OWNER": owner,
    }
    bench = Bench(policy=builders.policy(policy_file.read_text()))
    bench.backend.use_key(load_ca_key(key_file, owner))
    settings = load_settings(environ)
    reloader = Reloader(bench.core, bench.backend, settings, FileSource(settings, None))
    place(new.private)
    reloader.start()
    taken = reloader.collect()
    assert taken is not None
    assert (taken.policy, taken.key) == (True, False)
    assert bench.store.bodies("ca.refused")[0]["code"] == "ca_key_fingerprint_differs"
    assert bench.compared_with.fingerprint == old.fingerprint
    policy_file.write_text(builders.policy_text(ca=new.fingerprint))
    reloader.start()
    taken = reloader.collect()
    assert taken is not None
    assert (taken.policy, taken.key) == (True, True)
    assert bench.compared_with.fingerprint == new.fingerprint
    assert isinstance(bench.backend.order, CertifyInPool)


# --- a comparison decides nothing ------------------------------------------------------------------------------------


def _raise(_ours: object, _vaults: object) -> list[Difference]:
    raise RuntimeError("a fault in the comparison")


FAULTS: dict[str, Callable[..., object]] = {
    "it raises": _raise,
    "it tells what no ledger can hold": lambda _ours, _vaults: [Difference("key_id", "\ud800", "x", "note", "why")],
    "it tells nonsense": lambda _ours, _vaults: [None],
    "it tells nothing that can be read": lambda _ours, _vaults: None,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_comparison_costs_nobody_the_certificate(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadow, "compare_certificates", FAULTS[fault])
    bench = Bench()
    reply = bench.login()
    assert builders.certificate_of(reply)
    assert bench.store.batches[-1] == ["certificate.issued"]
    assert bench.shadow.faults == {"llmops": 1}
    assert len(bench.faults) == 1, "it is in the log"
    assert not bench.shadow.compared
    assert not bench.shadow.differences


def test_a_key_of_ours_that_nothing_can_be_drafted_with_costs_nobody_the_certificate() -> None:
    bench = Bench()
    broken: Any = msgspec.structs.replace(OURS, blob="no bytes")
    bench.backend.order = replace(bench.backend.order, local_key=broken)
    assert builders.certificate_of(bench.login())
    assert bench.shadow.faults == {"llmops": 1}


# --- Vault says no ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", ["vault_refused", "vault_role_missing"])
def test_what_vault_refuses_and_policy_grants_is_a_difference(said: str) -> None:
    bench = Bench()
    error = SignerError(said, "Vault says no", "mend it")
    assert bench.finish_one(bench.send(), error) is error
    assert bench.told() == {"refused": ("granted", f"{said}: Vault says no", "error")}
    assert bench.store.bodies("shadow.difference")[0]["serial"] == ""
    assert bench.store.bodies("request.refused")[0]["code"] == said
    assert bench.shadow.differences == {("llmops", "refused"): 1}
    assert not bench.shadow.compared


def test_a_certificate_outside_its_grant_is_a_difference_that_names_the_field() -> None:
    bench = Bench()
    forward = bench.send()
    assert code(bench.finish_one(forward, made(forward, principals=("llmops", "root")))) == "vault_outside_grant"
    ((_, vaults, severity),) = bench.told().values()
    assert vaults.endswith("outside the grant: principals")
    assert severity == "error"


def test_a_vault_that_is_down_and_a_freeze_of_ours_are_no_difference() -> None:
    bench = Bench()
    bench.finish_one(bench.send(), DOWN)
    forward = bench.send()
    bench.ask(Freeze(builders.caller("operator"), "all", "drill"))
    assert code(bench.finish_one(forward, made(forward))) == "frozen"
    assert "shadow.difference" not in bench.store.kinds()
    assert not bench.shadow.differences


def test_no_token_is_in_what_is_recorded() -> None:
    bench = Bench()
    bench.login(extensions=())
    bench.finish_one(bench.send(), SignerError("vault_refused", "Vault says no", ""))
    assert builders.token("deploy-agent") not in f"{bench.store.entries}"


# --- repeats ---------------------------------------------------------------------------------------------------------


def test_a_constant_difference_is_two_events_an_hour_and_counted_at_every_login() -> None:
    bench = Bench()
    for _ in range(50):
        bench.login()
        bench.now += 70
        bench.core.tick()
    assert bench.shadow.differences == {("llmops", "key_id"): 50}
    assert bench.store.kinds().count("shadow.difference") == 1
    bench.now += HOUR
    bench.core.tick()
    (body,) = bench.store.bodies("shadow.repeated")
    expected = {"role": "llmops", "field": "key_id", "severity": "note", "count": 49, "since": NOW}
    assert body == expected
    assert bench.store.entries[-1].actor == "many"


def test_what_was_counted_reaches_the_ledger_at_the_end() -> None:
    bench = Bench()
    for _ in range(3):
        bench.login()
    bench.core.end()
    assert [body["count"] for body in bench.store.bodies("shadow.repeated")] == [2]
    assert bench.store.kinds()[-1] == "keeper.stopped"


def test_an_error_with_other_values_is_told_at_once_and_a_note_is_not() -> None:
    bench = Bench()
    bench.login(valid_before=NOW + 600)
    bench.login(valid_before=NOW + 600)
    bench.login(valid_before=NOW + 300)
    told = [(body["field"], body["vault"]) for body in bench.store.bodies("shadow.difference")]
    assert [vaults for name, vaults in told if name == "lifetime"] == ["10m30s", "5m30s"]
    assert [name for name, _ in told].count("key_id") == 1


@given(st.lists(st.tuples(st.sampled_from(["10m", "20m"]), st.booleans(), st.integers(0, 3 * HOUR)), max_size=60))
def test_no_difference_is_lost(noted: list[tuple[str, bool, int]]) -> None:
    folding, told = Differences(), []
    for value, is_error, at in sorted(noted, key=lambda item: item[2]):
        severity = "error" if is_error else "note"
        body: dict[str, object] = {"role": "r", "field": "f", "ours": "15m", "vault": value, "severity": severity}
        told += [*folding.note(Event("shadow.difference", "a", body), at), *folding.due(at)]
    told += folding.flush()
    counted = Counter[str]()
    for event in told:
        counted[str(event.body["severity"])] += int(str(event.body.get("count", 1)))
    assert counted == Counter("error" if is_error else "note" for _, is_error, _ in noted)


# --- the promises of mode vault, after each of many random steps -----------------------------------------------------


class ShadowEpisode(VaultEpisode):
    """As in mode vault, with a shadow beside."""

    def make_backend(self) -> Backend:
        return backend(OURS)

    def swap_policy(self) -> None:
        self.core.use_key(self.key)
        super().swap_policy()


def test_the_promises_of_mode_vault_hold_after_each_of_many_random_steps() -> None:
    seed = os.environ.get("SIGNER_RANDOM_SEED") or str(random.SystemRandom().randrange(2**32))
    print(f"repeat with SIGNER_RANDOM_SEED={seed}")
    kinds = set[str]()
    # The run is worth its name only if it went everywhere, which one episode of twenty does not.
    for number in range(10):
        episode = ShadowEpisode(f"{seed}/{number}", Memory())
        while episode.commands < 2_000:
            episode.step()
        episode.store.fail = ""
        episode.core.end()
        assert episode.key.signed == []
        kinds |= set(episode.store.kinds())
        if kinds >= {"certificate.issued", "shadow.difference", "shadow.repeated"}:
            return
    pytest.fail(f"never everywhere: {sorted(kinds)}")
