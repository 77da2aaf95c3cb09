"""YAML as recipes have it: a key given twice is an error, and 1e-3 is a number, when read and when written."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a key given twice is an error, not the last one's victory, and 1e-3 is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a name", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class QuotingDumper(yaml.SafeDumper):
    """Puts text that looks like a number in quotes, by the same rule."""


# YAML 1.1 wants a dot in every float; JSON, YAML 1.2 and people do not
for _yaml in (UniqueKeyLoader, QuotingDumper):
    _yaml.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))
