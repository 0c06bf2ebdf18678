"""YAML as compose files of this repository are read: every scalar is its text, and nothing is hidden."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

_PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "str")}


class _StrictLoader(yaml.BaseLoader):
    """Refuses what lets a reader see another value than an engine: tags (`!reset`), merge keys and keys twice."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if node.tag not in _PLAIN_TAGS:
            raise yaml.constructor.ConstructorError(problem=f"tag {node.tag}", problem_mark=node.start_mark)
        return super().construct_object(node, deep=deep)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if key == "<<" or keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(problem=f"key {key}", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep=deep)


def parse_yaml(text: str) -> Any:
    """Maps, lists and texts: `true` is "true", an empty value is "". Raises `yaml.YAMLError`."""
    return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a BaseLoader makes no objects
