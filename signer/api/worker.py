"""gunicorn's threaded worker, made patient: a client that sends slowly waits in the poller, not in a thread."""

from __future__ import annotations

from gunicorn.workers.gthread import ThreadWorker


class PatientWorker(ThreadWorker):  # type: ignore[misc]
    """A thread is given to a connection only when a whole request has arrived."""
