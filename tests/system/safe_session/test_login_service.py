"""safe-session against every kind of service: whatever is wrong, it says so by its status, and nothing was run."""

from __future__ import annotations

import json
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from signer.api_client import ApiClient
from signer.errors import BadSettings
from tests.parts.keys import Key, KeyRing
from tests.parts.standin import (
    TOKEN,
    Asked,
    Client,
    Signer,
    Standin,
    http,
    problem,
)


def run_marked(client: Client, address: str, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Runs a command that leaves a mark; a login that failed must not have left it, nor an agent or a folder."""
    mark = client.folder / "ran"
    done = client.run(address, *words, "exec", "--", "touch", str(mark), **more)
    assert mark.exists() == (done.returncode == 0)
    assert client.left_behind() == []
    return done


def test_a_request_says_who_asks_and_for_what(client: Client, ca: Key) -> None:
    with Standin(Signer(client.folder, ca)) as api:
        done = run_marked(client, api.address, "--role", "db/x y", "--principal", "llmops", "--ttl", "5m")
    assert (done.returncode, done.stderr) == (0, "")
    (asked,) = api.asked
    assert asked.line == "POST /api/sign/db%2Fx%20y HTTP/1.1"
    assert asked.headers["authorization"] == f"Bearer {TOKEN}"
    assert asked.headers["content-type"] == "application/json"
    assert (asked.body["principals"], asked.body["ttl"]) == (["llmops"], "5m")


def test_the_service_may_listen_on_a_socket(client: Client, ca: Key) -> None:
    with Standin(Signer(client.folder, ca), unix=client.folder / "api") as api:
        assert run_marked(client, api.address).returncode == 0


def test_a_refusal_is_shown_in_the_services_words(client: Client) -> None:
    text, hint = "role llmops does not allow principal root", "it allows llmops\x1b[2J"
    with Standin(lambda _: problem(403, text, hint)) as api:
        done = run_marked(client, api.address, "--principal", "root")
    assert done.returncode == 77
    assert done.stderr == f"safe-session: error: {text}\nsafe-session: hint: it allows llmops [2J\n"
    assert done.stdout == ""
    assert len(api.asked) == 1


@pytest.mark.parametrize(
    "answer,said",
    [
        (http(502, b"<html>Bad Gateway</html>", kind="text/html"), "not a signing service's: status 502"),
        (http(200, b"<html>It works!</html>", kind="text/html"), "not a signing service's: status 200"),
        (http(201, {}), "no certificate in it"),
        (b"SSH-2.0-OpenSSH_9.2p1\r\n", "not HTTP"),
        (b"HTTP/1.0 201 X\r\nContent-Length: 500\r\n\r\n{", "1 of 500 bytes"),
        (http(201, b" " * 200_000), "more than 64 KiB"),
        (http(201, {"certificate": "ssh-ed25519-cert-v01@openssh.com AAAA", "expires_in": 9}), "cannot be read"),
    ],
    ids=["html error", "html", "empty", "ssh", "truncated", "oversize", "broken certificate"],
)
def test_an_answer_that_is_not_ours_runs_nothing(client: Client, answer: bytes, said: str) -> None:
    with Standin(lambda _: answer) as api:
        done = run_marked(client, api.address)
    assert done.returncode == 69
    assert said in done.stderr
    assert "safe-session: hint: check SAFE_SESSION_ADDR" in done.stderr
    assert len(api.asked) == 1


def test_an_endless_answer_is_broken_off(client: Client) -> None:
    with Standin(lambda _: b"HTTP/1.0 201 X\r\n\r\n" + b" " * 30_000_000) as api:
        done = run_marked(client, api.address)
    assert (done.returncode, api.broken_off) == (69, 1)
    assert "more than 64 KiB" in done.stderr


@pytest.mark.parametrize("wrong", ["key", "host", "kind", "over"])
def test_a_certificate_that_is_not_for_us_runs_nothing(client: Client, keyring: KeyRing, ca: Key, wrong: str) -> None:
    signer = Signer(client.folder, ca)
    if wrong == "key":
        signer.key = keyring("ed25519").public_line
    elif wrong == "kind":
        signer.key = keyring("ecdsa256").public_line
    elif wrong == "host":
        signer.host = True
    else:
        signer.expires_in = 0
    with Standin(signer) as api:
        done = run_marked(client, api.address)
    assert done.returncode == 69
    assert "the service sent an unusable certificate" in done.stderr


def test_a_service_that_is_down_is_named_with_its_setting(client: Client) -> None:
    started = time.monotonic()
    done = run_marked(client, "http://127.0.0.1:1")
    assert done.returncode == 69
    assert "cannot reach the signing service at http://127.0.0.1:1: connection refused" in done.stderr
    assert "SAFE_SESSION_ADDR" in done.stderr
    assert 2 < time.monotonic() - started < 30


def test_a_service_that_restarts_loses_no_login(client: Client, ca: Key) -> None:
    """Refused connections for 1.5 s, as while gunicorn restarts."""
    api = Standin(Signer(client.folder, ca))
    process = client.start(api.address, "exec", "--", "true")
    time.sleep(1.5)
    with api:
        assert process.communicate(timeout=20)[1] == ""
    assert process.returncode == 0


def test_a_keeper_that_restarts_loses_no_login(client: Client, ca: Key) -> None:
    signer = Signer(client.folder, ca)
    first: list[float] = []  # when it was asked first: how long the client needs to start is another matter

    def answer(asked: Asked) -> bytes:
        first.append(time.monotonic())
        is_back = time.monotonic() > first[0] + 2
        return signer(asked) if is_back else problem(503, "no keeper", "", "Retry-After: 1")

    with Standin(answer) as api:
        done = run_marked(client, api.address)
    assert (done.returncode, done.stderr) == (0, "")
    assert 2 <= len(api.asked) <= 4


def test_a_connection_that_breaks_before_the_answer_is_tried_again(client: Client, ca: Key) -> None:
    signer = Signer(client.folder, ca)
    with Standin(lambda asked: b"" if len(api.asked) == 1 else signer(asked)) as api:
        assert run_marked(client, api.address).returncode == 0
    assert len(api.asked) == 2


def test_a_service_too_busy_for_newcomers_is_asked_again(client: Client, ca: Key) -> None:
    signer, busy = Signer(client.folder, ca), problem(429, "busy", "", "Retry-After: 1", code="edge_busy")
    with Standin(lambda asked: busy if len(api.asked) == 1 else signer(asked)) as api:
        assert run_marked(client, api.address).returncode == 0
    assert len(api.asked) == 2


def test_a_limit_of_the_role_is_final(client: Client) -> None:
    limit = problem(429, 'not "edge_busy", but a limit', "", "Retry-After: 1", code="rate_limited")
    with Standin(lambda _: limit) as api:
        assert run_marked(client, api.address).returncode == 75
    assert len(api.asked) == 1


@pytest.mark.parametrize("header", [[], ["Retry-After: 60"], ["Retry-After: soon"]], ids=["none", "long", "garbage"])
def test_a_503_that_does_not_pass_soon_is_final(client: Client, header: list[str]) -> None:
    with Standin(lambda _: problem(503, "the disk is full", "", *header)) as api:
        started = time.monotonic()
        done = run_marked(client, api.address)
    assert (done.returncode, done.stderr) == (69, "safe-session: error: the disk is full\n")
    assert len(api.asked) == 1
    assert time.monotonic() - started < 30


def test_waiting_for_a_503_to_pass_has_an_end(client: Client) -> None:
    with Standin(lambda _: problem(503, "no keeper", "", "Retry-After: 0")) as api:
        started = time.monotonic()
        done = run_marked(client, api.address)
    assert (done.returncode, done.stderr) == (69, "safe-session: error: no keeper\n")
    assert len(api.asked) <= 4
    assert time.monotonic() - started < 30


def test_a_service_that_says_nothing_or_drips_is_given_up(client: Client) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        stop = threading.Event()

        def drip() -> None:
            link, _ = listener.accept()
            with link:
                while not stop.wait(0.5):
                    try:
                        link.sendall(b"H")
                    except OSError:
                        return

        thread = threading.Thread(target=drip)
        thread.start()
        started = time.monotonic()
        done = run_marked(client, f"http://127.0.0.1:{listener.getsockname()[1]}")
        stop.set()
        thread.join()
    assert done.returncode == 69
    assert "did not answer within 10 seconds" in done.stderr
    assert 9 < time.monotonic() - started < 60


def test_a_token_does_not_leave_the_machine_over_plain_http(client: Client) -> None:
    done = run_marked(client, "http://192.0.2.1:8222")
    assert done.returncode == 78
    assert "plain http to 192.0.2.1, which would send the token in the clear" in done.stderr
    assert "https://" in done.stderr


@pytest.fixture
def tls(client: Client) -> Path:
    """A self-signed certificate for localhost, with its key, in one file."""
    path = client.folder / "tls.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", path, "-out", f"{path}.crt"],
        check=True, capture_output=True,
    )  # fmt: skip
    path.write_text(path.read_text() + Path(f"{path}.crt").read_text())
    return path


@pytest.mark.parametrize("trusted", [True, False])
def test_https_is_used_when_the_certificate_is_trusted(client: Client, ca: Key, tls: Path, trusted: bool) -> None:
    signer = Signer(client.folder, ca)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls)
    api = Standin(signer)
    api.wrap = context
    port = api.address.rpartition(":")[2]
    with api:
        more = {"SSL_CERT_FILE": f"{tls}.crt"} if trusted else {"SSL_CERT_FILE": "/dev/null"}
        done = run_marked(client, f"https://localhost:{port}", **more)
    assert done.returncode == (0 if trusted else 69), done.stderr
    assert len(api.asked) == trusted
    if not trusted:
        assert "no trusted connection to https://localhost" in done.stderr
        assert "SSL_CERT_FILE" in done.stderr


@pytest.mark.parametrize("words", [["ssh"], ["login", "h"], ["exec", "--"], ["--ttl", "x", "ssh", "h"]], ids=" ".join)
def test_a_usage_error_is_status_64_and_asks_nothing(client: Client, words: list[str]) -> None:
    with Standin(lambda _: b"") as api:
        done = client.run(api.address, *words)
    assert (done.returncode, done.stdout, api.asked) == (64, "", [])
    assert done.stderr.startswith("safe-session: error: ")
    assert "\nsafe-session: hint: " in done.stderr


@pytest.mark.parametrize("how", ["https to http", "http to https"])
def test_a_wrong_scheme_is_said_at_once(client: Client, tls: Path, how: str) -> None:
    api = Standin(lambda _: problem(404, "no such path"))
    right, wrong = how.split(" to ")[::-1]
    if right == "https":
        api.wrap = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        api.wrap.load_cert_chain(tls)
    place = api.address.removeprefix("http://")
    with api:
        done = run_marked(client, f"{wrong}://{place}")
    assert done.returncode == 78
    assert done.stderr == (
        f"safe-session: error: SAFE_SESSION_ADDR has the wrong scheme: the service at {place} speaks {right}, not"
        f" {wrong}\nsafe-session: hint: set it to {right}://{place}\n"
    )
    # Nothing is tried twice, and what asks for the scheme holds no token.
    assert [asked for asked in api.asked if "authorization" in asked.headers] == []


@pytest.mark.parametrize("how", ["https to http", "http to https"])
def test_a_wrong_scheme_is_said_by_the_operators_commands_too(client: Client, tls: Path, how: str) -> None:
    api = Standin(lambda _: problem(404, "no such path"))
    right, wrong = how.split(" to ")[::-1]
    if right == "https":
        api.wrap = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        api.wrap.load_cert_chain(tls)
    place = api.address.removeprefix("http://")
    with api, ApiClient(f"{wrong}://{place}", client.token_file) as operator, pytest.raises(BadSettings) as caught:
        operator.head()
    assert caught.value.text == (
        f"signer.address has the wrong scheme: the service at {place} speaks {right}, not {wrong}"
    )
    assert caught.value.hint == f"set it to {right}://{place}"


def test_a_page_for_plain_http_on_a_port_of_https_is_no_wrong_scheme_by_itself(client: Client) -> None:
    with Standin(lambda _: http(400, b"<html>Bad Request</html>", kind="text/html")) as api:
        done = run_marked(client, api.address)
    assert done.returncode == 69
    assert "not a signing service's: status 400" in done.stderr


def test_wait_waits_for_a_service_that_is_away_and_says_so_once(client: Client, ca: Key) -> None:
    """4.5 s are more than the retries that are made without --wait."""
    api = Standin(Signer(client.folder, ca))
    process = client.start(api.address, "--wait", "60s", "--json", "exec", "--", "true")
    assert process.stderr is not None
    line = process.stderr.readline()  # of the first attempt
    time.sleep(4.5)
    with api:
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "", "")
    assert json.loads(line)["state"] == "note"
    assert json.loads(line)["text"].endswith("connection refused; trying again for 60 s")


def test_wait_ends(client: Client) -> None:
    started = time.monotonic()
    done = run_marked(client, "http://127.0.0.1:1", "--wait", "4s")
    assert done.returncode == 69
    assert time.monotonic() - started > 3.5


def test_a_503_is_waited_for_without_a_time_of_its_own(client: Client, ca: Key) -> None:
    signer = Signer(client.folder, ca)
    with Standin(lambda asked: signer(asked) if len(api.asked) > 1 else problem(503, "the disk is full")) as api:
        assert run_marked(client, api.address, "--wait", "30s").returncode == 0
    assert len(api.asked) == 2


def test_two_minutes_are_asked_for_and_the_roles_default_where_they_are_too_much(client: Client, ca: Key) -> None:
    signer = Signer(client.folder, ca)
    refusal = problem(403, "ttl is above the role's maximum", code="ttl_above_max")
    with Standin(lambda asked: refusal if "ttl" in asked.body else signer(asked)) as api:
        done = client.run(api.address, "exec", "--", "ssh", "-V", SAFE_SESSION_ROLE="short")
        refused = client.run(api.address, "--ttl", "2m", "exec", "--", "ssh", "-V")
    assert (done.returncode, refused.returncode) == (0, 77)
    assert [asked.body.get("ttl") for asked in api.asked] == [120, None, "2m"]


@pytest.mark.parametrize("verb", [["ssh", "h"], ["exec", "--", "true"]], ids=" ".join)
def test_json_is_the_one_line_that_says_why_nothing_was_run(client: Client, verb: list[str]) -> None:
    limit = problem(429, "too many at once", "", "Retry-After: 7", code="too_many_live")
    with Standin(lambda _: limit) as api:
        done = client.run(api.address, "--json", *verb)
    assert (done.returncode, done.stderr) == (75, "")
    assert json.loads(done.stdout) == {
        "state": "limited", "code": "too_many_live", "text": "too many at once", "hint": "try again in 7 s",
        "retry_after_s": 7, "may_retry": True, "exit_status": 75,
    }  # fmt: skip


@pytest.mark.parametrize(
    "words,status,code",
    [
        (["--json", "ssh"], 64, "usage"),
        (["exec", "--bogus", "--json"], 64, "usage"),
        (["--json", "exec", "--", "no-such-command-here"], 127, "no_command"),
        (["--json", "exec", "--", "/dev/null"], 126, "no_command"),
    ],
    ids=["usage", "json after it", "no command", "not executable"],
)
def test_every_error_before_the_command_is_json(
    client: Client, ca: Key, words: list[str], status: int, code: str
) -> None:
    with Standin(Signer(client.folder, ca)) as api:
        done = client.run(api.address, *words)
    assert (done.returncode, done.stderr) == (status, "")
    assert (json.loads(done.stdout)["exit_status"], json.loads(done.stdout)["code"]) == (status, code)


def test_json_leaves_stdout_to_a_command_that_runs(client: Client, ca: Key) -> None:
    with Standin(Signer(client.folder, ca)) as api:
        done = client.run(api.address, "-v", "--json", "exec", "--", "sh", "-c", "echo out; exit 2")
    assert (done.returncode, done.stdout) == (2, "out\n")
    said = json.loads(done.stderr)
    assert (said["state"], said["serial"], said["role"], said["lifetime_s"]) == ("issued", "4711", "llmops", 900)


def test_an_error_of_ours_is_no_status_of_a_command(client: Client, ca: Key) -> None:
    (client.folder / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'signer.safe_session' in sys.orig_argv:\n"
        "    import signer.safe_session.keypair as keypair\n"
        "    keypair.make_key = None\n"
    )
    path = f"{client.folder}:{client.environment('')['PYTHONPATH']}"
    with Standin(Signer(client.folder, ca)) as api:
        done = run_marked(client, api.address, PYTHONPATH=path)
    assert done.returncode == 70
    assert re.match(r"safe-session: error: internal error, TypeError in [a-z]+\.py:\d+\n", done.stderr)
    assert "Traceback" not in done.stderr


def test_help_that_cannot_be_written_is_status_74(client: Client) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "signer.safe_session", "--help"],
            env=client.environment(""), stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert done.returncode == 74
    assert "the result cannot be written: no space left on device" in done.stderr


def test_a_command_that_does_not_exist_costs_no_certificate(client: Client) -> None:
    with Standin(lambda _: b"") as api:
        done = client.run(api.address, "exec", "--", "no-such-command-here")
    assert (done.returncode, api.asked) == (127, [])
    assert done.stderr.startswith("safe-session: error: no such command: no-such-command-here\n")


def test_a_token_file_for_all_to_read_asks_nothing(client: Client) -> None:
    client.token_file.chmod(0o644)
    with Standin(lambda _: b"") as api:
        done = run_marked(client, api.address)
    assert (done.returncode, api.asked) == (78, [])
    assert "is accessible to other users" in done.stderr


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["ssh", "--help"], ["--version"]], ids=" ".join)
def test_help_and_version_need_no_settings(client: Client, words: list[str]) -> None:
    done = client.run("nonsense", *words, SAFE_SESSION_TOKEN_FILE="", SAFE_SESSION_ROLE="")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("safe-session " if words == ["--version"] else "usage: safe-session")


def test_without_ssh_agent_the_package_is_named(client: Client, ca: Key) -> None:
    with Standin(Signer(client.folder, ca)) as api:
        done = client.run(api.address, "exec", "--", "/bin/true", PATH="/nowhere")
    assert (done.returncode, api.asked, client.left_behind()) == (69, [], [])
    assert "cannot start ssh-agent: no such file or directory" in done.stderr
    assert "openssh-client" in done.stderr
