"""The api's process: gunicorn's arbiter, which starts the workers of `signer.api.edge` on sockets of its parent."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from typing import Any, Final

from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter

from signer.api.asgi import Api, create_app
from signer.api.edge import MAX_CONNECTIONS, EdgeWorker
from signer.hardening import become, forbid_dumps
from signer.service.listeners import BACKLOG, adopt_listeners, bind_listeners, check_listeners
from signer.settings import Settings

GUNICORN_TIMEOUT: Final = 30  # seconds without a sign of life after which a worker is killed
STOPS_WITHIN: Final = 2  # seconds for a worker to end after SIGTERM
IDLE_SECONDS: Final = 75  # for which a connection waits for its next request


class _Application(BaseApplication):  # type: ignore[misc]
    """gunicorn's configuration; no file, argument or environment variable changes it."""

    def __init__(self, settings: Settings, listeners: list[socket.socket]) -> None:
        self._settings = settings
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
        if settings.tls_cert_file is not None and settings.tls_key_file is not None:
            self._options |= {"certfile": str(settings.tls_cert_file), "keyfile": str(settings.tls_key_file)}
        super().__init__()

    def load_config(self) -> None:
        """Called by gunicorn for its configuration."""
        for name, value in self._options.items():
            self.cfg.set(name, value)

    def load(self) -> Api:
        """Called by gunicorn for the application."""
        return create_app(self._settings)


def run_api(settings: Settings, descriptors: Iterable[int]) -> None:
    """Serves until SIGTERM or SIGINT; raises `SignerError` if it cannot start.

    It listens on the sockets of its parent, or binds SIGNER_LISTEN itself if there are none.
    """
    listeners = adopt_listeners(descriptors, os.environ) or bind_listeners(settings)
    for name in ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"):  # gunicorn would take the sockets a second time
        os.environ.pop(name, None)
    check_listeners(listeners, settings)
    if os.geteuid() == 0 and settings.api_user is not None:
        become(settings.api_user)
    forbid_dumps()
    os.chdir("/")
    arbiter = Arbiter(_Application(settings, listeners))
    arbiter.systemd = True  # the sockets are not its own: it unlinks none of them
    arbiter.run()


def _memory_dir() -> str:
    """A directory in memory for gunicorn's heartbeat files, if there is one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else "/tmp"  # noqa: S108 - gunicorn makes and unlinks them itself
