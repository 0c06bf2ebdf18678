"""What the keeper knows of itself: the gauges of `/metrics`, and the reply to `signer status`. Reads only memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from prometheus_client.core import GaugeMetricFamily, Metric

from signer import __version__
from signer.authority.core import StateOverview
from signer.authority.queries import freeze_row, last_ends, token_end
from signer.errors import SignerError
from signer.ledger.marks import COSIGNED, VERIFIED, Mark, is_late
from signer.policy.decide import Policy
from signer.policy.tokens import ENDS_SOON
from signer.protocol import replies
from signer.service.hosts_seen import Fetch
from signer.service.publisher import ListState
from signer.units import timestamp

MAX_ROWS: Final = 500  # of each list in the reply, which is one message


@dataclass(frozen=True, slots=True)
class Overview:
    """The keeper at one time; times are in seconds since 1970. `state` is None while the ledger cannot be read."""

    now: float
    started: float
    policy_since: float
    key_since: float
    connections: int
    mode: str
    policy: Policy
    state: StateOverview | None
    ledger_bytes: int
    publisher: str  # fingerprint of the publishing key
    published: ListState
    fetches: tuple[Fetch, ...] = ()
    warnings: tuple[str, ...] = ()  # what should not stay as it is
    verified: Mark | None = None
    cosigned: Mark | None = None

    def gauges(self) -> Iterator[Metric]:
        """The gauges; those of certificates, freezes and events are missing while the ledger cannot be read."""
        for name, text, value in (
            ("signer_key_age_seconds", "since the CA key was loaded", self.now - self.key_since),
            ("signer_policy_age_seconds", "since the policy in force was loaded", self.now - self.policy_since),
            ("signer_connections", "connections to the keeper", self.connections),
            ("signer_ledger_bytes", "size of the ledger's file and its log", self.ledger_bytes),
        ):
            yield GaugeMetricFamily(name, text, value=value)
        yield from self._list_gauges()
        if self.cosigned is not None:
            text = "when enough witnesses last cosigned a checkpoint of the ledger, in seconds since 1970"
            yield GaugeMetricFamily("signer_ledger_cosigned_timestamp_seconds", text, value=self.cosigned.time)
        if self.state is not None:
            for name, text, value in (
                ("signer_ledger_events", "events in the ledger", self.state.head.seq),
                ("signer_freezes", "freezes in force", len(self.state.freezes)),
                ("signer_requests_open", "requests that wait for humans, or to be claimed", self.state.requests),
                ("signer_incidents_open", "incidents opened by break-glass and not closed", self.state.incidents),
                ("signer_incidents_overdue", "of them, open for too long", self.state.overdue),
            ):
                yield GaugeMetricFamily(name, text, value=value)
            live = {role: self.state.live.get(role, 0) for role in sorted(self.policy.roles)}
            yield _by_label("signer_live_certificates", "certificates that are valid now", "role", live)
        text = "when the last token of an identity ends, in seconds since 1970"
        ends = dict(sorted(last_ends(self.policy).items()))
        yield _by_label("signer_token_expires_timestamp_seconds", text, "identity", ends)

    def _list_gauges(self) -> Iterator[Metric]:
        """The revocation list; version and age are missing before the first one is published."""
        published = self.published
        if published.version is not None:
            yield GaugeMetricFamily("signer_list_version", "revocation list that is published", value=published.version)
            text = "since the published revocation list was last known to be current"
            yield GaugeMetricFamily("signer_list_age_seconds", text, value=max(self.now - published.as_of, 0))
        text = "0 while the published revocation list lacks something that was revoked"
        for name, about, value in (
            ("signer_list_current", text, int(published.is_current)),
            ("signer_hosts", "hosts that have fetched the revocation list in the last day", len(self.fetches)),
            ("signer_hosts_current", "of them, those that have the newest version", self._count_current()),
        ):
            yield GaugeMetricFamily(name, about, value=value)

    def _count_current(self) -> int:
        return sum(fetch.version == self.published.newest for fetch in self.fetches)

    def status(self, ca_fingerprint: str | None, fault: SignerError | None) -> replies.Status:
        """The reply to `signer status`."""
        tokens = sorted(self.policy.tokens.values(), key=lambda token: (token.expires, token.identity, token.sha256))
        state = self.state
        return replies.Status(
            version=__version__,
            mode=self.mode,
            time=timestamp(int(self.now)),
            started=timestamp(int(self.started)),
            ca_fingerprint=ca_fingerprint,
            key_since=timestamp(int(self.key_since)),
            policy=self.policy.digest,
            policy_since=timestamp(int(self.policy_since)),
            fault=replies.Error(code=fault.code, text=fault.text, hint=fault.hint, facts={})
            if fault is not None
            else None,
            ledger=self._ledger(state) if state is not None else None,
            requests=state.requests if state is not None else 0,
            incidents=state.incidents if state is not None else 0,
            incidents_overdue=state.overdue if state is not None else 0,
            warnings=list(self.warnings),
            live=[
                replies.LiveCertificates(role=role, count=count)
                for role, count in sorted(state.live.items() if state is not None else ())
                if count
            ][:MAX_ROWS],
            freezes=[
                freeze_row(scope, freeze).model_copy(update={"until": freeze.until and timestamp(freeze.until)})
                for scope, freeze in sorted(state.freezes.items() if state is not None else ())
            ][:MAX_ROWS],
            tokens=[token_end(token) for token in tokens if token.expires <= self.now + ENDS_SOON][:MAX_ROWS],
            revocation_list=replies.ListStatus(
                version=self.published.version,
                as_of=_as_of(self.published),
                wanted=self.published.wanted,
                behind=self.published.is_behind,
                publisher=self.publisher,
                hosts=len(self.fetches),
                hosts_current=self._count_current(),
            ),
        )

    def _ledger(self, state: StateOverview) -> replies.LedgerState:
        head = state.head
        at = timestamp(head.time_ms // 1000) if head.seq else None
        return replies.LedgerState(
            events=head.seq,
            head=head.hash,
            time=at,
            bytes=self.ledger_bytes,
            verified=self._mark_row(VERIFIED, self.verified),
            cosigned=self._mark_row(COSIGNED, self.cosigned),
        )

    def _mark_row(self, name: str, mark: Mark | None) -> replies.MarkRow | None:
        if mark is None:
            return None
        return replies.MarkRow(events=mark.seq, since=timestamp(mark.time), late=is_late(name, mark, int(self.now)))


def _by_label(name: str, text: str, label: str, values: Mapping[str, float]) -> GaugeMetricFamily:
    """A gauge for each value of a label."""
    family = GaugeMetricFamily(name, text, labels=[label])
    for of, value in values.items():
        family.add_metric([of], value)
    return family


def _as_of(published: ListState) -> str | None:
    return None if published.version is None else timestamp(published.as_of)


def hosts_reply(published: ListState, fetches: Sequence[Fetch]) -> replies.Hosts:
    """The reply to `GET /api/hosts`."""
    rows = [
        replies.HostRow(
            name=fetch.host,
            version=fetch.version,
            seen=timestamp(fetch.at),
            current=fetch.version == published.newest,
        )
        for fetch in fetches
    ]
    return replies.Hosts(version=published.version, wanted=published.wanted, as_of=_as_of(published), hosts=rows)
