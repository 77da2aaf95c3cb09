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


class QuotingDumper(yaml.SafeDumper):
    """Puts text that looks like a number in quotes, by the same rule."""


# YAML 1.1 wants a dot in every float; JSON, YAML 1.2 and people do not
for _yaml in (UniqueKeyLoader, QuotingDumper):
    _yaml.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


def read_yaml(path: Path, where: str | None = None) -> Any:
    """What a YAML or JSON file holds, as plain data.

    Args:
        where: names the file in errors, such as the option that gave it; its path if None.

    Raises:
        RecipeError: it cannot be read or is no YAML; says where.
    """
    where = where or str(path)
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=UniqueKeyLoader)
    except yaml.MarkedYAMLError as e:
        line = f":{e.problem_mark.line + 1}" if e.problem_mark else ""
        raise RecipeError(f"{where}{line}: not YAML: {e.problem}") from e
    except OSError as e:
        raise RecipeError(f"{where}: cannot be read: {e.strerror or e}") from e
    except (UnicodeDecodeError, yaml.YAMLError) as e:
        raise RecipeError(f"{where}: cannot be read: {' '.join(str(e).split())}") from e
    except RecursionError as e:
        raise RecipeError(f"{where}: cannot be read: it is nested too deeply") from e


def first_comment(path: Path) -> str:
    """What a file says of itself: its first line, if that is a comment; or nothing."""
    with path.open(encoding="utf-8") as file:
        line = file.readline()
    return line.lstrip("#").strip() if line.startswith("#") else ""
