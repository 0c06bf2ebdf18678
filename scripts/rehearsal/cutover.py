"""`scripts/rehearse-cutover`: one throwaway platform goes the whole way, in front of your eyes."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

from scripts.rehearsal.narrator import Narrator, Unexpected
from tests.parts import missing
from tests.parts.container import Engine
from tests.parts.platform import CUTOVER_PHRASE, DECOMMISSION_PHRASE, Platform, make_memory, remove_memory

SOAK = "10s"
TTL, MAX_TTL = "10s", "15s"
HOST = "edge1"


class Ended(BaseException):
    """A signal asked us to end; like KeyboardInterrupt it is no error."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Missing(Exception):
    """This machine lacks something."""


def main(words: Sequence[str] | None = None) -> int:
    asked = read_arguments(words)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    began = time.monotonic()
    try:
        with ExitStack() as running:
            Rehearsal(*prepare(running)).tell(asked.evidence, began)
    except Ended as ended:
        print("\nrehearse-cutover: interrupted; everything it started and wrote is gone again", file=sys.stderr)
        return 128 + ended.number
    except Missing as error:
        print(f"rehearse-cutover: error: {error}", file=sys.stderr)
        return 1
    except (Unexpected, TimeoutError) as error:
        print(f"rehearse-cutover: error: {error}; everything is gone again", file=sys.stderr)
        return 1
    print(f"\nContainers, sshd's, keys and folders are gone again; {time.monotonic() - began:.0f} s in all.")
    return 0


def read_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/rehearse-cutover",
        description="From Vault to the local CA, back, over again, and Vault's removal, on a throwaway platform.",
    )
    parser.add_argument("--evidence", type=Path, metavar="DIR", help="copy the evidence of each run there")
    asked = parser.parse_args(words)
    if asked.evidence is not None:
        asked.evidence = asked.evidence.absolute()
        if asked.evidence.exists():
            parser.error(f"{asked.evidence} exists")
    return asked


def _end(number: int, _frame: FrameType | None) -> None:
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)  # what was started is to be ended in peace
    raise Ended(number)


def prepare(running: ExitStack) -> tuple[Platform, Narrator]:
    """The platform in mode vault; raises `Missing`."""
    print("A rehearsal: a platform moves from Vault to the local CA, back, over again, and then loses its Vault.")
    print("Everything in it is real, on loopback, and thrown away at the end. First it is put up:", flush=True)
    if reason := missing.podman() or missing.podman_compose() or missing.bao() or missing.sshd():
        raise Missing(reason)
    folder = Path(tempfile.mkdtemp(prefix="signer-rehearsal-", dir="/tmp"))
    running.callback(shutil.rmtree, folder, ignore_errors=True)
    folder.chmod(0o755)
    engine = Engine(folder / "engine")
    if reason := engine.make_base():
        raise Missing(f"no base image: {reason}")
    running.callback(engine.forget)
    engine.build()
    print(f"  {engine.built.strip()}", flush=True)
    memory = Path("/run") / folder.name
    running.callback(remove_memory, memory)
    make_memory(memory)
    platform = running.enter_context(Platform(engine, folder / "platform", memory, ttl=TTL, max_ttl=MAX_TTL))
    platform.write_config(decommission__soak=SOAK)
    client = platform.service.client_environment("deploy-agent")
    narrator = Narrator(platform.folder, platform.environment() | client)
    running.callback(narrator.end_child)
    print(f"  OpenBao with raft storage in a container: {platform.bao.address}, role llmops, {TTL} certificates")
    print(f"  the service in another one, as overlays/safe-session.yaml has it: {platform.service.address}")
    print(f"  two hosts, {' and '.join(platform.targets)}: an sshd each, which trust Vault's CA and ours")
    print(f"  our CA key, rendered to {platform.key_file}: root's, 0400", flush=True)
    return platform, narrator


class Rehearsal:
    """The whole way, one method a section."""

    def __init__(self, platform: Platform, narrator: Narrator) -> None:
        self.platform = platform
        self.narrator = narrator

    def tell(self, evidence: Path | None, began: float) -> None:
        """All of it; copies the evidence to `evidence` at the end."""
        for section in (
            self.today, self.plan, self.wrong_phrase, self.a_host_is_missing, self.move, self.move_back,
            self.move_again, self.too_early, self.remove_vault, self.look_back,
        ):  # fmt: skip
            section()
        if evidence is not None:
            shutil.copytree(self.platform.evidence_dir, evidence)
            print(f"\nThe evidence of each run is in {evidence}; look at an evidence.html of it.")
        seconds = self.narrator.seconds
        print(
            f"\nCutover {seconds['cutover']:.1f} s, rollback {seconds['rollback']:.1f} s,"
            f" removal of Vault {seconds['decommission']:.1f} s; {time.monotonic() - began:.0f} s until here."
        )

    def _log_in(self, host: str = "rs2000") -> None:
        self.narrator.run("safe-session", "-v", "ssh", "-F", "ssh_config", host, "echo", "this is", host)

    def _signed_by(self) -> None:
        self.narrator.run("sh", "-c", "curl -s $SAFE_SESSION_ADDR/readyz")

    def _plan(self, operation: str = "cutover", *, ends: int = 0, quiet: bool = True) -> None:
        words = ("signer", operation, "plan", "--config", "cutover.toml", "--out", f"{operation}.json")
        self.narrator.run(*words, ends=ends, quiet=quiet)

    def _apply(self, operation: str, phrase: str, *, ends: int = 0, what: str = "") -> None:
        self.narrator.run("signer", operation, "apply", f"{operation}.json", "--approve", phrase, ends=ends, what=what)

    def today(self) -> None:
        self.narrator.section("The platform as it is today: Vault signs")
        self.narrator.say(
            """safe-session asks our service for a certificate; our service checks it against policy.toml, has Vault
            sign it, holds what comes back against what it granted, and records it."""
        )
        self._log_in()

    def plan(self) -> None:
        self.narrator.section("The plan")
        self.narrator.say(
            """A plan reads and changes nothing. All that it depends on is under one digest: compose files, policy.toml,
            the role in Vault, CA keys, hosts. It is applied as it was printed, or not at all."""
        )
        self._plan(quiet=False)

    def wrong_phrase(self) -> None:
        self.narrator.section("Nobody applies it by accident")
        self.narrator.say(
            """The phrase that removes Vault approves no cutover, and none is taken from the environment. Each attempt
            is recorded, without what was typed. Exit status 3: refused, nothing was changed."""
        )
        self._apply("cutover", DECOMMISSION_PHRASE, ends=3)
        self.narrator.run(
            "env", f"SIGNER_APPROVE={CUTOVER_PHRASE}", "signer", "cutover", "apply", "cutover.json", ends=3
        )

    def a_host_is_missing(self) -> None:
        self.narrator.section("It fails, and rolls back by itself")
        self.narrator.say(
            f"""cutover.toml no longer says where {HOST} has its file of CAs. The plan of before is refused now (exit
            status 4), as cutover.toml is another. With a new one step 3 finds that the sshd of each host accepts our
            CA. But {HOST} loses it while compose brings the service up: the login after the change fails, and all is
            put back."""
        )
        self.platform.untrust_at_up(HOST)
        self._configure(**{f"smoke_{HOST}__trusted_ca_file": None})
        self._apply("cutover", CUTOVER_PHRASE, ends=4)
        self._plan()
        self._apply("cutover", CUTOVER_PHRASE, ends=1)
        self._log_in(HOST)

    def _configure(self, **changes: object) -> None:
        self.platform.write_config(decommission__soak=SOAK, **changes)

    def move(self) -> None:
        self.narrator.section("The cutover")
        self.narrator.say(f"{HOST} gets the line of our CA again. A new plan, the phrase of its runbook, and:")
        self.platform.trust(HOST)
        self._configure()
        self._plan()
        self._apply("cutover", CUTOVER_PHRASE, what="cutover")
        self.narrator.say("Who logs in notices nothing. The local CA has signed this:")
        self._log_in()
        self.narrator.run("signer", "cutover", "status", "--config", "cutover.toml")

    def move_back(self) -> None:
        self.narrator.section("Back to Vault, by hand")
        self.narrator.say("At any later time, as long as there is a Vault, one command leads back:")
        reason = "rehearsed: we can always go back"
        self.narrator.run(
            "signer", "cutover", "rollback", "--config", "cutover.toml", "--reason", reason, what="rollback"
        )
        self._log_in()

    def move_again(self) -> None:
        self.narrator.section("And over again")
        self._plan()
        self._apply("cutover", CUTOVER_PHRASE)

    def too_early(self) -> None:
        self.narrator.section("Vault is to go, but not yet")
        self.narrator.say(
            f"""Before anything is destroyed, everything that speaks against it is told; here the soak time, {SOAK}
            instead of the usual 72h, and certificates of Vault that are still good. With such a blocker there is no
            plan that could be approved."""
        )
        self._plan("decommission", ends=1, quiet=False)

    def remove_vault(self) -> None:
        self.narrator.section("The soak time is over")
        self.narrator.say(f"It is now: {SOAK} are soon over.")
        time.sleep(11)
        self._plan("decommission", quiet=False)
        self.narrator.say("The phrase of the cutover does not open this:")
        self._apply("decommission", CUTOVER_PHRASE, ends=3)
        self._apply("decommission", DECOMMISSION_PHRASE, what="decommission")

    def look_back(self) -> None:
        self.narrator.section("Afterwards")
        self.narrator.say("OpenBao is stopped, people log in, and there is no way back:")
        self._log_in(HOST)
        self.narrator.run("signer", "cutover", "rollback", "--config", "cutover.toml", "--reason", "no way", ends=1)
        self.narrator.say("What was done, by whom and why, can be checked file by file, and against the ledger:")
        for run in sorted(self.platform.evidence_dir.glob("*-*/SHA256SUMS")):
            self.narrator.run("signer", "evidence", "verify", f"evidence/{run.parent.name}", "--config", "cutover.toml")


if __name__ == "__main__":
    sys.exit(main())
