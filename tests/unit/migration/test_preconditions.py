"""What a cutover depends on is read whole, or the reading says why not; a service that is down may be a run's doing."""

from __future__ import annotations

from pathlib import Path

import pytest

from signer.api_client import Readiness
from signer.errors import SignerError, Unavailable
from signer.migration.config import CutoverFile, parse_cutover_file
from signer.migration.cutover.preconditions import check_movable, preflight_environment, read_preconditions
from signer.vault.role import DEFAULTS
from tests.parts.builders import POLICY, policy, policy_text, public_key, token
from tests.parts.cutover_file import GOOD


class Vault:
    """Has the role."""

    def __enter__(self) -> Vault:
        return self

    def __exit__(self, *exc_info: object) -> None:
        return

    def role(self, _mount: str, name: str) -> dict[str, object]:
        return {**DEFAULTS, "name": name}

    def ca_public_key(self, _mount: str) -> object:
        return public_key()


class Composed:
    """Merges whatever it is given."""

    def config_digest(self, *, with_overlay: bool) -> str:
        return str(with_overlay)

    def content(self, *, with_overlay: bool) -> dict[str, object]:
        return {"services": {"safe-session-api": {}, "vault": {"image": f"vault {with_overlay}"}}}

    def image_id(self, *, with_overlay: bool) -> str:
        return f"image {with_overlay}"


class Service:
    """Says `ready`, or does not answer."""

    def __init__(self) -> None:
        self.says: Readiness | None = None

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Nothing is open."""

    def ready(self) -> Readiness:
        if self.says is None:
            raise Unavailable("service_down", "nobody answers", "start it")
        return self.says


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    """What answers, with all else in order."""
    found = Service()
    for name, part in {"VaultAdmin": Vault(), "Compose": Composed(), "ApiClient": found}.items():
        monkeypatch.setattr(f"signer.migration.cutover.preconditions.{name}", lambda *_, part=part: part)
    return found


def a_file(folder: Path, policy: str = POLICY, identity: str = "operator") -> CutoverFile:
    """Every file that cutover.toml names, in `folder`."""
    text = GOOD.replace("[preflight]\n", '[preflight]\nallow_list = "/opt/signer/overlays/allow-list.txt"\n')
    for path in sorted({part for part in text.split('"') if part.startswith("/")}, reverse=True):
        text = text.replace(f'"{path}"', f'"{folder}/{Path(path).name}"')
        (folder / Path(path).name).write_text("")
    for name in ("safe-session.yaml", "safe-session-local-ca.yaml"):
        (folder / name).write_text("services: {}\n")
    (folder / "policy.toml").write_text(policy_text(policy))
    (folder / "token").write_text(token(identity))
    (folder / "token").chmod(0o400)
    return parse_cutover_file(text.encode())


def test_a_plan_needs_a_service_that_answers(service: Service, tmp_path: Path) -> None:
    with pytest.raises(Unavailable) as refused:
        read_preconditions(a_file(tmp_path), tmp_path / "cutover.toml")
    assert refused.value.code == "service_down"
    assert service.says is None


def test_a_run_that_was_cut_off_may_have_left_none(service: Service, tmp_path: Path) -> None:
    file = a_file(tmp_path)
    down = read_preconditions(file, tmp_path / "cutover.toml", may_be_down=True)
    service.says = Readiness(True, "vault", "SHA256:x", "d")
    assert down.inputs == read_preconditions(file, tmp_path / "cutover.toml").inputs
    assert down.now.ready is False


@pytest.mark.parametrize(
    "change, identity, code",
    [
        (("", ""), "second", "operator_unknown"),
        (('"operate"', '"freeze"'), "operator", "operator_lacks_right"),
        (('"ledger.read", ', ""), "operator", "operator_lacks_right"),
        (('groups = ["operators"]\nroles = ["llmops"]', 'groups = ["operators"]'), "operator", "operator_lacks_role"),
        (("", ""), "deploy-agent", "operator_lacks_right"),
    ],
)
def test_the_operator_must_be_able_to_prove_and_to_record_it(
    service: Service, tmp_path: Path, change: tuple[str, str], identity: str, code: str
) -> None:
    service.says = Readiness(True, "vault", "SHA256:x", "d")
    policy = POLICY.replace('"approve", "freeze"', '"approve"').replace(*change)
    with pytest.raises(SignerError) as refused:
        read_preconditions(a_file(tmp_path, policy, identity), tmp_path / "cutover.toml")
    assert refused.value.code == code


@pytest.mark.parametrize(
    "says, code",
    [
        (Readiness(False, code="vault_sealed"), "service_not_ready"),
        (Readiness(True, "local", "SHA256:x", "d"), "already_local"),
        (Readiness(True, "vault", "SHA256:x", "another"), "policy_not_in_force"),
    ],
)
def test_one_moves_from_a_service_that_is_ready_with_that_policy(
    service: Service, tmp_path: Path, says: Readiness, code: str
) -> None:
    service.says = says
    found = read_preconditions(a_file(tmp_path), tmp_path / "cutover.toml")
    with pytest.raises(SignerError) as refused:
        check_movable(found)
    assert refused.value.code == code


def test_from_mode_vault_and_from_mode_shadow_alike(service: Service, tmp_path: Path) -> None:
    file = a_file(tmp_path)
    for mode in ("vault", "shadow"):
        service.says = Readiness(True, mode, "SHA256:x", "")
        digest = read_preconditions(file, tmp_path / "cutover.toml").inputs.policy.digest
        service.says = Readiness(True, mode, "SHA256:x", digest)
        found = read_preconditions(file, tmp_path / "cutover.toml")
        check_movable(found)
        assert found.now.mode == mode


def test_audit_4e3_the_preflight_is_asked_about_the_login_that_the_cutover_proves(tmp_path: Path) -> None:
    """The account of the smoke logins, and the principals that the role gives by default."""
    file, rules = parse_cutover_file(GOOD.encode()), policy()
    found = preflight_environment(file, rules)
    assert found["SAFE_SESSION_LOGIN_USER"] == "llmops"
    assert found["SAFE_SESSION_PRINCIPALS"] == ",".join(rules.roles[file.signer.role].default_principals)
    assert found["SAFE_SESSION_CA_FINGERPRINT"] == rules.ca.fingerprint
    two = '\n[[smoke]]\nname = "two"\nhost = "two.example"\nuser = "deploy"\nknown_hosts = "/root/known"\n'
    several = parse_cutover_file((GOOD + two).encode())
    assert "SAFE_SESSION_LOGIN_USER" not in preflight_environment(several, rules)
