"""The image: built from the Containerfile, small, locked, without compilers and without anybody's secrets."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from signer import __version__
from tests.parts import missing
from tests.parts.container import API_ID, BASE_IMAGE, KEEPER_ID, Ended, Engine
from tests.parts.registry import Registry
from tests.parts.service import ROOT

pytestmark = [missing.needs_podman, pytest.mark.slow, pytest.mark.timeout(900)]

MEGABYTE = 1_000_000


def test_the_image_adds_at_most_120_megabytes_to_its_base(engine: Engine) -> None:
    added = (engine.facts(engine.image)["Size"] - engine.facts(BASE_IMAGE)["Size"]) / MEGABYTE
    print(f"{engine.built.strip()}, {added:.1f} MB on top of it")
    assert 20 < added <= 120


def test_audit_9_the_image_says_what_it_was_built_on(engine: Engine) -> None:
    base, labels = engine.facts(BASE_IMAGE), engine.facts(engine.image)["Labels"]
    assert labels["org.opencontainers.image.base.name"] == BASE_IMAGE
    assert labels["org.opencontainers.image.base.digest"] == base["Digest"]
    layers = base["RootFS"]["Layers"]
    assert engine.facts(engine.image)["RootFS"]["Layers"][: len(layers)] == layers


@pytest.mark.parametrize("base", ["docker.io/library/debian:bookworm-slim", "debian", f"debian@sha256:{'0' * 63}"])
def test_audit_9_a_base_of_a_registry_that_is_not_named_by_its_digest_is_refused(engine: Engine, base: str) -> None:
    done = engine.run(str(ROOT / "scripts" / "container" / "build"), "localhost/never", environ={"BASE": base})
    assert (done.status, done.out) == (2, "")
    assert "is not named by its digest" in done.err


@pytest.mark.long
@missing.needs_docker_registry
def test_audit_9_a_base_of_a_real_registry_is_what_its_digest_names_wherever_its_tag_goes(
    engine: Engine, tmp_path: Path
) -> None:
    """Before and after its tag names another image there, and when the registry gives other bytes for the digest."""
    label, built = "org.opencontainers.image.base", f"localhost/signer:on-a-registry-{os.getpid()}"
    with Registry(tmp_path) as registry:
        tag, digest = f"{registry.place}/debian:bookworm", registry.push(engine, BASE_IMAGE, "debian:bookworm")

        def build(base: str) -> Ended:
            script = str(ROOT / "scripts" / "container" / "build")
            return engine.run(script, built, environ={"BASE": base, **registry.environ}, timeout=500)

        alone = build(tag)
        assert (alone.status, f"BASE={registry.place}/debian@sha256:…" in alone.err) == (2, True)
        other = f"localhost/other:{os.getpid()}"
        (tmp_path / "Containerfile").write_text(f"FROM scratch\nLABEL number={os.getpid()}\n")
        engine.podman("build", "--quiet", "--tag", other, "--file", str(tmp_path / "Containerfile"), str(tmp_path))
        moved = registry.push(engine, other, "debian:bookworm")
        engine.podman("rmi", other)
        assert moved != digest
        try:
            for base in (f"{registry.place}/debian@{digest}", f"{tag}@{digest}"):
                done = build(base)
                assert done.status == 0, done.err
                facts, layers = engine.facts(built), engine.facts(BASE_IMAGE)["RootFS"]["Layers"]
                assert (facts["Labels"][f"{label}.name"], facts["Labels"][f"{label}.digest"]) == (base, digest)
                assert facts["RootFS"]["Layers"][: len(layers)] == layers
            assert build(tag).status == 2
            manifest = registry.manifest(moved)
            manifest.write_bytes(manifest.read_bytes() + b"\n")
            false = build(f"{registry.place}/debian@{moved}")
            assert (false.status != 0, "could not build" in false.err, "igest" in false.err) == (True, True, True)
        finally:
            engine.run("podman", "untag", BASE_IMAGE, f"{registry.place}/debian@{digest}")
            engine.run("podman", "rmi", built)


def test_it_holds_exactly_the_locked_packages(engine: Engine) -> None:
    listing = (
        "import importlib.metadata as m, json;"
        "print(json.dumps({d.name: d.version for d in m.distributions(path=[p for p in __import__('sys').path"
        " if p.startswith('/opt/signer')])}))"
    )
    found = {canonicalize_name(name): text for name, text in json.loads(python(engine, listing)).items()}
    assert "signer" in found
    locked = {
        canonicalize_name(name): version
        for name, version, marker in re.findall(
            r"^([\w.-]+)==(\S+)(.*)$", (ROOT / "scripts/requirements/run.lock").read_text(), re.MULTILINE
        )
        if "sys_platform == 'win32'" not in marker
    }
    assert found == {**locked, canonicalize_name("signer"): __version__}


def python(engine: Engine, code: str) -> str:
    return engine.in_image("/opt/signer/bin/python", "-c", code)


def test_http_is_read_in_c_and_the_loop_is_uvloops(engine: Engine) -> None:
    code = "import httptools.parser.parser as p, uvloop.loop as l; print(p.__file__[-3:], l.__file__[-3:])"
    assert python(engine, code).split() == [".so", ".so"]


def test_there_is_neither_compiler_nor_installer_nor_test_in_it(engine: Engine) -> None:
    names = ["gcc*", "cc", "c++*", "g++*", "clang*", "ld", "as", "make", "rustc", "cargo", "pip", "pip3*", "Python.h"]
    tests = [part for name in names for part in ("-o", "-name", name)][1:]
    looked = engine.in_image(
        "/usr/bin/find",
        "/usr",
        "/bin",
        "/opt",
        "/root",
        "/home",
        "/lib",
        "(",
        *tests,
        ")",
        "-not",
        "-path",
        "*/share/*",
    )
    assert looked == ""
    site = engine.in_image(
        "/usr/bin/find", "/opt/signer", "-name", "tests", "-o", "-name", "*.c", "-o", "-name", "*.pyx"
    )
    assert site == ""


def test_it_compiles_nothing_at_its_start(engine: Engine) -> None:
    bare = (
        "import importlib.util, pathlib;"
        "print([str(p) for p in pathlib.Path('/opt/signer/lib').rglob('*.py')"
        " if not pathlib.Path(importlib.util.cache_from_source(str(p))).exists()])"
    )
    assert python(engine, bare).strip() == "[]"


def test_its_two_users_have_fixed_numbers_and_nothing_else(engine: Engine) -> None:
    lines = engine.in_image("/usr/bin/getent", "passwd", "signer-keeper", "signer-api").splitlines()
    entries = [line.split(":") for line in lines]
    assert [(entry[0], entry[2], entry[3]) for entry in entries] == [
        ("signer-keeper", str(KEEPER_ID), str(KEEPER_ID)),
        ("signer-api", str(API_ID), str(API_ID)),
    ]
    assert {(entry[5], entry[6]) for entry in entries} == {("/nonexistent", "/usr/sbin/nologin")}


def test_nothing_of_ours_in_it_can_be_written_by_its_users(engine: Engine) -> None:
    loose = engine.in_image(
        "/usr/bin/find", "/opt/signer", "/etc/signer", "!", "-user", "root", "-o", "-perm", "/022", "-not", "-type", "l"
    )
    assert loose == ""


# --- secrets -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def layers(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image as podman saves it."""
    archive = tmp_path_factory.mktemp("image") / "image.tar"
    engine.podman("save", "--quiet", "--format", "docker-archive", "--output", str(archive), engine.image)
    return archive


def files(archive: Path, base_layers: int) -> Iterator[tuple[str, bytes]]:
    """Path and content of each file in each layer above the base, and of what is said about the image."""
    with tarfile.open(archive) as image:
        manifest = json.loads(_content(image, "manifest.json"))[0]
        yield "config", _content(image, manifest["Config"])
        for name in manifest["Layers"][base_layers:]:
            with tarfile.open(fileobj=io.BytesIO(_content(image, name))) as layer:
                for member in layer:
                    inner = layer.extractfile(member) if member.isreg() else None
                    yield member.name, b"" if inner is None else inner.read()


def _content(archive: tarfile.TarFile, name: str) -> bytes:
    opened = archive.extractfile(name)
    assert opened is not None, name
    return opened.read()


# A private key's first line alone stands in programs; with what follows it is a key.
_KEYS = re.compile(
    rb"-----BEGIN (?:OPENSSH|RSA|EC|ENCRYPTED)? ?PRIVATE KEY-----\r?\n[A-Za-z0-9+/=]{32}"
    rb"|\bhvs\.[A-Za-z0-9]{20}|\bsgn_[A-Za-z0-9_-]{40}"
)
_PLACES = re.compile(r"(?:^|/)(?:pip\.conf|\.netrc|\.pypirc|\.git|\.ssh|id_[a-z0-9]+|\.env|auth\.json|\.bash_history)$")


def test_no_layer_holds_a_secret(engine: Engine, layers: Path) -> None:
    base = len(engine.facts(BASE_IMAGE)["RootFS"]["Layers"])
    looked = {name: bool(_KEYS.search(content) or _PLACES.search(name)) for name, content in files(layers, base)}
    assert len(looked) > 1000  # and these are the right ones:
    assert any(name.endswith("site-packages/signer/ca/key.py") for name in looked)
    assert [name for name, is_secret in looked.items() if is_secret] == []


def test_the_search_for_secrets_would_see_one() -> None:
    assert _KEYS.search(b"x-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAEbm9uZQAA\n")
    assert _KEYS.search(b"token=hvs.CAESIJ0123456789abcdefghij")
    assert _PLACES.search("root/.netrc")


def test_neither_history_nor_environment_names_a_place_of_the_builder(engine: Engine) -> None:
    said = engine.podman("history", "--no-trunc", "--format", "{{.CreatedBy}}", engine.image)
    facts = engine.facts(engine.image)
    environment = facts["Config"]["Env"]
    assert {line.partition("=")[0] for line in environment} == {
        "PATH", "PYTHONDONTWRITEBYTECODE", "SIGNER_KEEPER_USER", "SIGNER_API_USER", "SIGNER_NOTICES_USER",
    }  # fmt: skip
    for text in (said, json.dumps(facts["Config"])):
        assert not re.search(r"https?://|--index|PIP_|proxy|/wheels", text, re.IGNORECASE)
        assert not re.search(r"token|secret|password", text, re.IGNORECASE)


def test_the_final_image_is_not_made_in_the_stage_with_the_installer(engine: Engine) -> None:
    text = (ROOT / "Containerfile").read_text()
    stages = re.split(r"^FROM ", text, flags=re.MULTILINE)[1:]
    assert [stage.splitlines()[0] for stage in stages] == ["${BASE} AS build", "${BASE}"]
    assert "python3-venv" in stages[0]
    assert "python3-venv" not in stages[1]
    assert not re.search(r"gcc|libc6-dev|python3-dev", text)
