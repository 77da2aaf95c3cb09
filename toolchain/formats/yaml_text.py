"""YAML as recipes and all files beside them have it: a key given twice is an error, and 1e-3 is a number."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from toolchain.errors import RecipeError


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

    def get_single_node(self) -> Any:
        """The document, if what its aliases stand for is not far more than what is written."""
        node = super().get_single_node()
        _expanded(node, {})
        return node


MOST_NODES = 100_000
"""Of a document with aliases written out: recipes have hundreds, and whoever reads one walks over all."""


def _expanded(node: yaml.Node | None, known: dict[yaml.Node, int]) -> int:
    """Number of nodes with aliases written out; ``known`` has 0 for nodes that are being counted."""
    if node is None or isinstance(node, yaml.ScalarNode):
        return 1
    if node not in known:
        known[node] = 0
        parts = [p for pair in node.value for p in pair] if isinstance(node, yaml.MappingNode) else node.value
        known[node] = 1 + sum(_expanded(part, known) for part in parts)
    if not 0 < known[node] <= MOST_NODES:
        what = "is within itself" if not known[node] else f"stands for more than {MOST_NODES} values"
        raise yaml.constructor.ConstructorError(None, None, f"a part {what}", node.start_mark)
    return known[node]


class QuotingDumper(yaml.SafeDumper):
    """Puts text that looks like a number in quotes, by the same rule."""


# YAML 1.1 wants a dot in every float; JSON, YAML 1.2 and people do not
for _yaml in (UniqueKeyLoader, QuotingDumper):
    _yaml.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


def load_yaml(text: str) -> Any:
    """What a text says, as plain data.

    Raises:
        YAMLError: it is no YAML, nested too deeply, or has a number or a date that is none.
    """
    try:
        return yaml.load(text, Loader=UniqueKeyLoader)
    except RecursionError as e:
        raise yaml.YAMLError("it is nested too deeply") from e
    except (ValueError, OverflowError, TypeError, AttributeError) as e:  # of what looks like a number, a date, a merge
        raise yaml.YAMLError(f"a value is not what it looks like: {e}") from e


def read_yaml(path: Path, where: str | None = None) -> Any:
    """What a YAML or JSON file holds, as plain data.

    Args:
        where: names the file in errors, such as the option that gave it; its path if None.

    Raises:
        RecipeError: it cannot be read or is no YAML; says where.
    """
    where = where or str(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as e:
        raise RecipeError(f"{where}: cannot be read: {e.strerror or e}") from e
    except UnicodeDecodeError as e:
        raise RecipeError(f"{where}: cannot be read: {' '.join(str(e).split())}") from e
    try:
        return load_yaml(text)
    except yaml.MarkedYAMLError as e:
        line = f":{e.problem_mark.line + 1}" if e.problem_mark else ""
        raise RecipeError(f"{where}{line}: not YAML: {e.problem}") from e
    except yaml.YAMLError as e:
        raise RecipeError(f"{where}: cannot be read: {' '.join(str(e).split())}") from e


def first_comment(path: Path) -> str:
    """What a file says of itself: its first line, if that is a comment; or nothing."""
    with path.open(encoding="utf-8") as file:
        line = file.readline()
    return line.lstrip("#").strip() if line.startswith("#") else ""
