"""Compose files as text: what compose merges of them, and every file that it reads.

`podman-compose config` leaves `extends` and `env_file` as they stand, so the merged form alone does not say what `up`
starts. Imports no command; `compose.py` runs them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import yaml

from signer.errors import BadFile
from signer.files import read_bounded
from signer.ledger.chain import canonical_json

MAX_BYTES: Final = 4 * 1024 * 1024  # bytes of a file that compose reads
ABSENT: Final = "absent"  # in the place of a digest: a file that compose reads if it exists
_MAX_FILES: Final = 200


class _Loader(yaml.SafeLoader):
    """Reads `!reset` and `!override` of compose as the values below them."""


def _untagged(loader: _Loader, _suffix: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    assert isinstance(node, yaml.ScalarNode), "YAML has three kinds of nodes"  # noqa: S101
    return loader.construct_scalar(node)


_Loader.add_multi_constructor("!", _untagged)


def parse_compose(text: str | bytes, name: str) -> dict[str, Any]:
    """The content of a compose file, or of what compose merges; raises `BadFile` (`compose_file_malformed`)."""
    try:
        found = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, RecursionError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise BadFile("compose_file_malformed", f"{name} is not a compose file", "see `podman-compose config`")
    return found


def services_of(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The services by name; one that is not a table is empty."""
    services = content.get("services")
    tables = services if isinstance(services, dict) else {}
    return {str(name): table if isinstance(table, dict) else {} for name, table in tables.items()}


def digest_of(value: object) -> str:
    """`sha256:` and the hash of a parsed value's canonical JSON (RFC 8785)."""
    return "sha256:" + sha256(canonical_json(_plain(value)).encode()).hexdigest()


def _plain(value: object) -> Any:
    """The value with text in the place of every scalar, another one for each type: RFC 8785 cannot hold all."""
    if isinstance(value, Mapping):
        return {ascii(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return f"={value}" if isinstance(value, str) else f"{type(value).__name__}={value!r}"


def digests_read(base: Path, overlay: Path, merged: Mapping[str, Any]) -> dict[str, str]:
    """Every file that compose reads besides `base` and `overlay`: the hex SHA-256 of its content, or `ABSENT`.

    Those are `.env` beside the base and in `/`, where compose is started, and the files that `include`, `extends`,
    `env_file` and `label_file` name, in these files and in the `merged` form. Raises `BadFile`.
    """
    found: dict[str, str] = {}
    pending = [(base, True), (overlay, True), (base.parent / ".env", False), (Path("/.env"), False)]
    pending += _named_in(merged, base.parent, base.parent)
    while pending:
        path, is_compose = pending.pop()
        if str(path) in found:
            continue
        if len(found) >= _MAX_FILES:
            raise BadFile("compose_file_malformed", f"compose reads more than {_MAX_FILES} files", "name fewer")
        content = _content(path)
        found[str(path)] = ABSENT if content is None else sha256(content).hexdigest()
        if is_compose and content is not None:
            pending += _named_in(parse_compose(content, str(path)), path.parent, base.parent)
    return {path: digest for path, digest in sorted(found.items()) if path not in (str(base), str(overlay))}


def _content(path: Path) -> bytes | None:
    try:
        content = read_bounded(path, MAX_BYTES, follow_links=True)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise BadFile("compose_file_malformed", f"{path} cannot be read: {error.strerror}", "see its mode") from None
    if len(content) > MAX_BYTES:
        raise BadFile("compose_file_malformed", f"{path} is larger than {MAX_BYTES} bytes", "name another file")
    return content


def _named_in(content: Mapping[str, Any], beside: Path, project: Path) -> Iterator[tuple[Path, bool]]:
    """The files that a compose file names, and whether each is a compose file itself.

    A relative path is looked for beside the file and beside the base, as compose commands differ in that.
    """
    for text, is_compose in _names_in(content):
        if "$" in text:
            raise BadFile(
                "compose_file_malformed",
                "a compose file names another by a variable",
                "write its path",
            )
        for folder in dict.fromkeys((beside, project)):
            yield folder / Path(text).expanduser(), is_compose


def _names_in(content: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    for one in _listed(content.get("include")):
        table = one if isinstance(one, dict) else {"path": one}
        yield from ((path, True) for path in _texts(table.get("path")))
        yield from ((path, False) for path in _texts(table.get("env_file")))
    for service in services_of(content).values():
        extends = service.get("extends")
        if isinstance(extends, dict):
            yield from ((path, True) for path in _texts(extends.get("file")))
        for key in ("env_file", "label_file"):
            for one in _listed(service.get(key)):
                yield from ((path, False) for path in _texts(one.get("path") if isinstance(one, dict) else one))


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _texts(value: object) -> list[str]:
    return [one for one in _listed(value) if isinstance(one, str) and one]
