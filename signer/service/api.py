"""The api's process: gunicorn's arbiter, which starts the workers of `signer.api.edge` on sockets of its parent.

It reads the TLS certificate and key; workers inherit what it read. At SIGHUP it reads them again, and starts new
workers if it found another good pair.
"""

from __future__ import annotations

import logging
import os
import socket
import ssl
import time
from collections.abc import Iterable
from typing import Any, Final

from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter

from signer.api.asgi import Api, create_app
from signer.api.edge import MAX_CONNECTIONS, EdgeWorker
from signer.errors import BadSettings
from signer.hardening import become, forbid_dumps, release_memory
from signer.service.listeners import BACKLOG, adopt_listeners, bind_listeners, check_listeners
from signer.service.scheduling import own_shares, stay_on, take_short_turns
from signer.service.supervisor import Supervisor, adopt_channel
from signer.service.tls import TlsPair, check_not_ended, load_tls_pair
from signer.settings import Settings
from signer.units import timestamp

log = logging.getLogger("signer.api")

GUNICORN_TIMEOUT: Final = 30  # seconds without a sign of life after which a worker is killed
STOPS_WITHIN: Final = 2  # seconds for a worker to end after SIGTERM
IDLE_SECONDS: Final = 75  # for which a connection waits for its next request


class _Application(BaseApplication):  # type: ignore[misc]
    """gunicorn's configuration; no file, argument or environment variable changes it. Raises `BadSettings`."""

    def __init__(self, settings: Settings, listeners: list[socket.socket], supervisor: Supervisor) -> None:
        self._settings = settings
        self.supervisor = supervisor
        self._tls = self._load_tls()
        if self._tls is not None and self._tls.not_after <= time.time():
            log.warning("the TLS certificate expired on %s", timestamp(self._tls.not_after))
        self._options: dict[str, Any] = {
            "bind": [f"fd://{listener.detach()}" for listener in listeners],
            "backlog": BACKLOG,
            "control_socket_disable": True,
            "forwarder_headers": "",
            "graceful_timeout": STOPS_WITHIN,
            "keepalive": IDLE_SECONDS,
            "loglevel": "warning",
            "preload_app": True,
            "proc_name": "signer-api",
            "threads": settings.threads,
            "timeout": GUNICORN_TIMEOUT,
            "worker_class": EdgeWorker,
            "worker_connections": MAX_CONNECTIONS,
            "worker_tmp_dir": _memory_dir(),
            "workers": settings.workers,
        }
        super().__init__()

    def load_config(self) -> None:
        """Called by gunicorn for its configuration."""
        for name, value in self._options.items():
            self.cfg.set(name, value)

    def load(self) -> Api:
        """Called by gunicorn for the application."""
        return create_app(self._settings)

    # --- TLS ----------------------------------------------------------------------------------------------------

    @property
    def tls(self) -> ssl.SSLContext | None:
        """What a worker serves with that starts now; None without TLS."""
        return None if self._tls is None else self._tls.context

    def _load_tls(self) -> TlsPair | None:
        certificate, key = self._settings.tls_cert_file, self._settings.tls_key_file
        return None if certificate is None or key is None else load_tls_pair(certificate, key)

    def renew_tls(self) -> dict[str, object]:
        """Reads certificate and key again and keeps the current ones if the new ones are not good; the report."""
        current = self._tls
        if current is None:
            return {}
        try:
            new = self._load_tls()
            assert new is not None, "the settings do not change"  # noqa: S101
            if new.chain != current.chain:
                check_not_ended(new, int(time.time()))
        except BadSettings as error:
            log.error("%s (%s); the current TLS certificate stays in use", error.text, error.code)  # noqa: TRY400
            return {"error": error.as_json(), "kept": current.fingerprint}
        if new.chain == current.chain:
            return {"changed": False, **_facts(current)}
        self._tls = new
        log.warning("the TLS certificate is another one, valid until %s", timestamp(new.not_after))
        return {"changed": True, "from": current.fingerprint, **_facts(new)}


def _facts(pair: TlsPair) -> dict[str, object]:
    return {"fingerprint": pair.fingerprint, "subject": pair.subject, "expires": timestamp(pair.not_after)}


class _ApiArbiter(Arbiter):  # type: ignore[misc]
    """gunicorn's arbiter with a reload that reads certificates only, and that survives a failed fork."""

    _newest_outdated = 0  # the age of the newest worker that has a former TLS certificate
    _is_short = False

    def setup(self, app: _Application) -> None:
        """Called once, before the first worker: workers share what the start made, as nothing touches it again."""
        super().setup(app)
        release_memory()

    def reload(self) -> None:
        """Called at SIGHUP."""
        began = time.monotonic()
        report = self.app.renew_tls()
        if report.get("changed"):
            self._newest_outdated = self.worker_age
            self.manage_workers()
        self.app.supervisor.reloaded(began, report)

    def manage_workers(self) -> None:
        """Called about once a second: new workers for those that ended or are outdated, before the latter end."""
        self.app.supervisor.alive()
        current = sum(worker.age > self._newest_outdated for worker in self.WORKERS.values())
        for _ in range(self.num_workers - current):
            self.spawn_worker()
        super().manage_workers()

    def spawn_worker(self) -> int | None:
        """Starts a worker; a shortage that may pass is logged once, and the next call tries again."""
        try:
            pid: int = super().spawn_worker()
        except OSError as error:
            if not self._is_short:
                log.error("a worker could not be started: %s; trying again", error.strerror)  # noqa: TRY400
            self._is_short = True
            return None
        self._is_short = False
        return pid


def run_api(settings: Settings, descriptors: Iterable[int], channel_number: int | None = None) -> None:
    """Serves until SIGTERM or SIGINT; raises `SignerError` if it cannot start.

    It listens on the sockets of its parent, or binds SIGNER_LISTEN itself if there are none. `channel_number` is the
    descriptor of a launcher's channel.
    """
    supervisor = Supervisor(adopt_channel(channel_number), os.environ)
    listeners = adopt_listeners(descriptors, os.environ) or bind_listeners(settings)
    for name in ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"):  # gunicorn would take the sockets a second time
        os.environ.pop(name, None)
    check_listeners(listeners, settings)
    if os.geteuid() == 0 and settings.api_user is not None:
        become(settings.api_user)
    forbid_dumps()
    os.chdir("/")
    stay_on(own_shares(settings.workers).others)
    take_short_turns()
    arbiter = _ApiArbiter(_Application(settings, listeners, supervisor))
    arbiter.systemd = True  # the sockets are not its own: it unlinks none of them
    arbiter.run()


def _memory_dir() -> str:
    """A directory in memory for gunicorn's heartbeat files, if there is one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else "/tmp"  # noqa: S108 - gunicorn makes and unlinks them itself
