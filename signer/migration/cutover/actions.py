"""The actions of a cutover and a rollback: calls of compose, Vault and the service, and logins."""

from __future__ import annotations

import json
import shlex
import threading
import time
from collections.abc import Mapping
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

from signer.api_client import ApiClient, Readiness
from signer.errors import BadFile, SignerError, Unavailable
from signer.files import read_secret_word
from signer.migration.boot import boot_file, is_recorded, record_boot
from signer.migration.compose import Compose, shown
from signer.migration.config import CutoverFile
from signer.migration.cutover.preconditions import check_files, preflight_environment, preflight_line
from signer.migration.evidence.after import planned_in
from signer.migration.observe import Observed, digests_of, observe_service
from signer.migration.parity import SAMPLES, USUAL_KIND, check_parity, make_samples, throwaway_key
from signer.migration.plan import Observation, StepFailed
from signer.migration.run import Run
from signer.migration.smoke import (
    CONNECT_WITHIN,
    certificate_fields,
    offer_certificate,
    on_each,
    read_trusted_cas,
    smoke,
    smoke_refusal,
)
from signer.migration.trial import trial
from signer.model import Role, RunOutcome
from signer.policy.decide import Policy
from signer.policy.file import load_policy
from signer.subprocesses import run
from signer.vault.admin import VaultAdmin

PREFLIGHT_WITHIN: Final = 60.0  # seconds
READY_WITHIN: Final = 12.0  # seconds for the service to be ready after compose has started it
_LOOK_EVERY: Final = 0.05  # seconds between two polls of `Pause`
Backend = Literal["vault", "local"]


class Pause(threading.Thread):
    """Measures the longest time without a ready service, at 20 polls a second.

    `since`, in monotonic seconds, is when it was last ready, if it has not been since: a start that failed and the way
    back are one pause for a client.
    """

    def __init__(self, address: str, token_file: Path, since: float | None = None) -> None:
        super().__init__(name="pause", daemon=True)
        self._api = ApiClient(address, token_file)
        self._ended = threading.Event()
        self._longest = 0.0
        self._last, self._is_ready = since, since is None

    def run(self) -> None:
        last = time.monotonic() if self._last is None else self._last
        has_ended = False
        with closing(self._api):
            while not has_ended:
                has_ended = self._ended.wait(_LOOK_EVERY)  # then one more poll, to end a pause that is over
                self._is_ready = self._looks_ready()
                if self._is_ready:
                    now = time.monotonic()
                    self._longest, last = max(self._longest, now - last - _LOOK_EVERY), now
                self._last = last

    def _looks_ready(self) -> bool:
        try:
            return self._api.ready(within=1).ready
        except SignerError:
            return False

    @property
    def unanswered_since(self) -> float | None:
        """When the service was last ready, None if it is: for the `Pause` after this one, once this has stopped."""
        return None if self._is_ready else self._last

    def stop(self) -> float:
        """Seconds, to a tenth; a pause that has not ended is not counted."""
        self._ended.set()
        self.join(2)
        return round(max(self._longest, 0.0), 1)


class CutoverActions:
    """The actions of the steps on the platform of `file`, whose service answers to `api`.

    A plan only needs the object; a run calls `begin` before its first action. Each action raises `SignerError` if it
    fails or its check fails.
    """

    _run: Run

    def __init__(self, file: CutoverFile, api: ApiClient) -> None:
        self._file = file
        self._api = api
        self._compose = Compose(file.compose)
        self._pause: Pause | None = None
        self._unanswered_since: float | None = None

    def begin(self, run: Run) -> None:
        """Keeps observations as evidence of `run`, without the tokens in use."""
        self._run = run
        run.look = self._look
        guard = run.evidence.guard
        guard.never(read_secret_word(self._file.signer.token_file, "signer.token_file"))
        guard.never(read_secret_word(self._file.vault.token_file, "vault.token_file", is_vaults=True))

    @property
    def _policy(self) -> Policy:
        return load_policy(self._file.signer.policy_file, "signer.policy_file")

    def preflight(self) -> Observation:
        """Runs the host's preflight script; raises `StepFailed` unless it reports ready."""
        environment = {
            **self._compose.unmarked_environment,
            **preflight_environment(self._file, self._policy),
        }
        ended = run(preflight_line(self._file), environment=environment, within=PREFLIGHT_WITHIN)
        try:
            report: dict[str, Any] = json.loads(ended.out)
            summary, checks = str(report["summary"]), list(report["checks"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise StepFailed(
                "preflight_unreadable",
                f"the preflight ended with status {ended.status} and no result",
                f"run it by hand: {shlex.join(preflight_line(self._file))}",
                {"said": self._run.evidence.guard.clean(shown(ended))},
            ) from None
        self._run.evidence.write_json("preflight.json", report)
        if ended.status != 0 or report.get("ready") is not True:
            bad = [check for check in checks if check.get("status") == "FAIL"]
            first = bad[0] if bad else {}
            raise StepFailed(
                "preflight_not_ready",
                f"{summary}: {', '.join(str(check.get('code')) for check in bad)}",
                str(first.get("next") or "see preflight.json in the evidence"),
            )
        warnings = [str(check.get("code")) for check in checks if check.get("status") == "warn"]
        return Observation(f"{summary} ({', '.join(warnings)})" if warnings else summary)

    def parity(self) -> Observation:
        """Compares roles, then real certificates of Vault and of the local CA, which signs in its own trial."""
        file = self._file
        with (
            trial(file.compose, image=self._planned_image()) as tried,
            self._vault() as vault,
            tried.client(file.signer.token_file, self._planned_ca()) as api,
        ):
            as_logins, usual = sample_body(self._policy.roles[file.signer.role]), [""]

            def sign(role: str, body: Mapping[str, Any]) -> str:
                made = str(api.sign(role, body)["certificate"])
                is_usual = str(body["public_key"]).startswith(f"{USUAL_KIND} ")
                if role == file.signer.role and is_usual and {**as_logins, "public_key": body["public_key"]} == body:
                    usual.append(made)
                return made

            report = check_parity(self._policy, vault, file.vault.mount, sign, file.vault.roles, SAMPLES)
            self._run.evidence.write_text("parity-ledger.jsonl", tried.export_ledger())
            self._run.evidence.write_json("sample.json", {"certificate": usual[-1]})
        self._run.evidence.write_json("parity.json", report.as_json())
        if not report.is_parity:
            raise BadFile(
                "parity_differs",
                f"the local CA differs from Vault: {report.summary}",
                "bring policy.toml and Vault's roles together: signer cutover parity",
                tuple(f"{one.field}: {one.why} (ours {one.ours}, Vault's {one.vaults})" for one in report.errors),
            )
        return Observation(report.summary)

    def trust(self) -> Observation:
        """Has each host's sshd say whether it accepts certificates of the new CA for the login user.

        It is offered a sample certificate of step 2, which has no private key. A role that binds certificates to the
        caller has none that fits: then the hosts' CA files are read over logins.
        """
        policy, signer = self._policy, self._file.signer
        if policy.roles[signer.role].source_address == "caller":
            observe = partial(read_trusted_cas, signer=signer, ca_fingerprint=policy.ca.fingerprint)
        else:
            observe = partial(offer_certificate, certificate=self._sample(), signer=signer)
        return self._run.keep_logs("trust", lambda: on_each(self._file.smoke, observe), required=False)

    def _sample(self) -> str:
        """A sample certificate of step 2; of another trial if none is left, as in a run that is resumed late."""
        line = str((self._run.evidence.read_json("sample.json") or {}).get("certificate", ""))
        if line and certificate_fields(line).valid_before > time.time() + CONNECT_WITHIN:
            return line
        file, policy = self._file, self._policy
        with trial(file.compose) as tried, tried.client(file.signer.token_file, self._planned_ca()) as api:
            line = str(api.sign(file.signer.role, sample_body(policy.roles[file.signer.role]))["certificate"])
            self._run.evidence.write_text("sample-ledger.jsonl", tried.export_ledger())
        self._run.evidence.write_json("sample.json", {"certificate": line})
        return line

    def vault_signs(self) -> Observation:
        """Checks that Vault signs for throwaway keys, with the operator's token and through a trial in mode vault."""
        role = self._file.signer.role
        with self._vault() as vault:
            vault.check_ready()
            vaults_ca = vault.ca_public_key(self._file.vault.mount).fingerprint
            vault.sign(self._file.vault.mount, role, {"public_key": throwaway_key(USUAL_KIND)})
        with (
            trial(self._file.compose, with_overlay=False, mode="vault") as tried,
            tried.client(self._file.signer.token_file, vaults_ca) as api,
        ):
            body = {"public_key": throwaway_key(USUAL_KIND), "reason": "check that Vault can sign"}
            made = api.sign(role, body)
            self._run.evidence.write_text("trial-ledger.jsonl", tried.export_ledger())
        return Observation(f"Vault signs for role {role}", {"serial": made["serial"], "ca": made["ca_fingerprint"]})

    def record_state(self) -> Observation:
        """Records the current state, so that the evidence alone is enough to restore it.

        It is the last step before a change, so it compares the files with the plan again.
        """
        plan = self._run.evidence.read_json("plan.json")  # None for a rollback
        if plan is not None:
            check_files(self._file, plan["inputs"])
        found = self._compose.running()
        try:
            ready = self._api.ready()
        except Unavailable as error:  # an interrupted run may have left no service, which a rollback fixes
            ready = Readiness(False, code=error.code)
        facts = {
            "mode": ready.mode,
            "ca": ready.ca_fingerprint,
            "policy": ready.policy,
            **observe_service(self._file, self._api, self._compose).as_json(),
        }
        self._run.versions = {**self._compose.versions(), "vault": self._vault_version()}
        now = f"mode {ready.mode}" if ready.ready else f"not ready: {ready.code}"
        return Observation(f"{now}, container {found.id[:12] if found else 'none'}", facts)

    def up(self, *, with_overlay: bool) -> Observation:
        """Runs compose up, keeps its output, and records what a reboot starts.

        Measures the pause of the service from here until `ready`.
        """
        self._end_pause()
        self._pause = Pause(self._file.signer.address, self._file.signer.token_file, self._unanswered_since)
        self._pause.start()
        try:
            done = self._compose.up(with_overlay)
        except BaseException:
            self._end_pause()  # only another `up` may start the service
            raise
        command = self._compose.up_line(with_overlay)
        facts = {"command": command, "seconds": round(done.seconds, 3), "said": shown(done)}
        took = f"compose took {done.seconds:.1f} s"
        try:
            record_boot(boot_file(self._file.evidence_dir), self._compose, with_overlay=with_overlay)
        except SignerError as error:
            if with_overlay:
                raise
            took += f"; {error.text}"  # back is back
        if found := self._differences(with_overlay):
            if with_overlay:
                raise StepFailed(
                    "container_differs",
                    f"the container is not what the compose files say: {found[0]}",
                    "see what compose reads besides these files (extends, env_file, .env), then plan again",
                    {"differences": found, **facts},
                )
            # Back is back: Vault signs again, in the container that the base file makes.
            return Observation(f"{took}; the container differs: {found[0]}", {"differences": found, **facts})
        return Observation(took, facts)

    def _differences(self, with_overlay: bool) -> list[str]:
        """What the running container has otherwise than its files, its image and the plan say."""
        found = self._compose.running()
        if found is None:
            return ["there is no container"]
        image = self._planned_image() if with_overlay else ""
        return self._compose.container_differences(found.id, with_overlay=with_overlay, image=image)

    def _planned_image(self) -> str:
        """The image that the plan of this run names; empty for a rollback, which has no plan."""
        plan = self._run.evidence.read_json("plan.json")
        return "" if plan is None else str(plan["inputs"]["compose"]["image"])

    def _planned_ca(self) -> str:
        """The CA that the plan of this run pins; that of policy.toml for a rollback, which has no plan."""
        plan = self._run.evidence.read_json("plan.json")
        return self._policy.ca.fingerprint if plan is None else str(plan["then"]["ca"])

    def is_up(self, *, with_overlay: bool) -> bool:
        """True if the service runs in the mode of these files, as they say, and a reboot starts it so.

        Mode `shadow` matches neither.
        """
        found = self._compose.running()
        is_up = found is not None and found.is_running and found.mode == ("local" if with_overlay else "vault")
        is_up = is_up and is_recorded(boot_file(self._file.evidence_dir), self._compose, with_overlay=with_overlay)
        return is_up and not (with_overlay and self._differences(with_overlay))

    def ready(self, backend: Backend) -> Observation:
        """Waits until the service is ready in that mode and signs with that CA."""
        ca = self._policy.ca.fingerprint if backend == "local" else None
        try:
            found = self._api.wait_ready(backend, ca, READY_WITHIN)
        finally:
            pause = self._end_pause()
        facts = {"policy": found.policy, "pause_seconds": pause}
        measured = "" if pause is None else f", no answer for {pause:.1f} s"
        return Observation(f"mode {found.mode}, CA {found.ca_fingerprint}{measured}", facts)

    def _end_pause(self) -> float | None:
        """Seconds without an answer, None if no pause was measured."""
        pause, self._pause = self._pause, None
        if pause is None:
            return None
        seconds, self._unanswered_since = pause.stop(), pause.unanswered_since
        return seconds

    def smoke(self, backend: Backend) -> Observation:
        """A real login to every target with a certificate of that backend."""
        ca = self._policy.ca.fingerprint if backend == "local" else self._api.ready().ca_fingerprint
        return self._run.keep_logs(
            f"smoke-{backend}",
            lambda: smoke(self._file, self._api.certificate, backend=backend, ca_fingerprint=ca),
            required=False,
        )

    def refuse(self) -> Observation:
        """A principal outside the policy gets no certificate."""
        allowed = {name for role in self._policy.roles.values() for name in role.principals}
        return smoke_refusal(self._api.sign, self._file.signer.role, allowed)

    def seal(self) -> Observation:
        return self._run.conclude(RunOutcome.APPLIED)

    def _look(self) -> tuple[Mapping[str, Any], Observed]:
        """What the plan of this run, or for a rollback the base file and Vault, want in force; and what is."""
        plan = self._run.evidence.read_json("plan.json")
        if plan is None:
            planned = self._planned_back()
        else:
            principals = plan["inputs"]["policy"]["roles"][self._file.signer.role]
            planned = {**planned_in(plan), "principals": list(principals)}
        return planned, observe_service(self._file, self._api, self._compose)

    def _planned_back(self) -> dict[str, Any]:
        """What policy.toml, the base file and Vault want in force after a rollback, as far as they can be read."""
        file, planned = self._file, {"ready": True, "mode": "vault"}
        files = digests_of(file.compose.base)
        planned |= {"compose_files": files, "starts_at_boot": list(files)}
        with suppress(SignerError):
            policy = self._policy
            planned |= {"policy": policy.digest, "principals": list(policy.roles[file.signer.role].principals)}
        with suppress(SignerError):
            planned["image"] = self._compose.image_id()
        with suppress(SignerError), self._vault() as vault:
            planned["ca"] = vault.ca_public_key(file.vault.mount).fingerprint
        return planned

    def _vault(self) -> VaultAdmin:
        vault = self._file.vault
        return VaultAdmin(vault.address, vault.token_file, vault.ca_file)

    def _vault_version(self) -> str:
        try:
            with self._vault() as vault:
                return str(vault.call("GET", "sys/health").get("version", "unknown"))[:60]
        except SignerError:
            return "unknown"


def sample_body(role: Role) -> dict[str, Any]:
    """A request as logins make it, for a key without a private half."""
    first = next(make_samples(role, 1), None)
    return {"public_key": throwaway_key(USUAL_KIND), **({} if first is None else first.asked)}
