"""Base of a pass's options: what recipes, manifests and texts say of a pass, with the version of their meaning."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer, model_validator


class PassConfig(BaseModel):
    """Base of a pass's options: frozen and strict, so that its JSON is both cache key and record.

    Where an option is a tuple or a list, one element alone is taken for a list of it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    current_version: ClassVar[int] = 1
    """Version of the options that this class knows; raise it when an option gets another name or meaning."""
    version: int = 1
    """Always ``current_version``; written only where it is not 1."""

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> Self:
        """Options as a recipe has them, of any version so far; without ``version`` they are of version 1.

        Raises:
            ValueError: the options are of a version that this class does not know.
            ValidationError: an option is wrong.
        """
        version = options.get("version", 1)
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise ValueError(f"version: expected a whole number of 1 or more, got {version!r}")
        if version > cls.current_version:
            raise ValueError(
                f"options are of version {version}, this sora-compile knows {cls.current_version}; update it"
            )
        own = {k: v for k, v in options.items() if k != "version"}
        return cls.model_validate(own if version == cls.current_version else cls.migrate(own, version))

    @classmethod
    def migrate(cls, options: dict[str, Any], version: int) -> dict[str, Any]:
        """Options of an older ``version`` as today's; what the version did not have is left as it is.

        Raises:
            ValueError: these options have no meaning any more; says what to use instead.
        """
        return options

    def written(self, *, defaults: bool = False, short: bool = False) -> dict[str, Any]:
        """The options as plain data that :meth:`read` takes.

        Args:
            defaults: also those that are as by default (save None, which stands for nothing).
            short: one element instead of a list of one.
        """
        chosen = self.model_dump(mode="json", exclude_defaults=True)
        if defaults:
            every = self.model_dump(mode="json")
            chosen = {k: v for k, v in every.items() if v is not None or k in chosen}
        return {k: self._short(k, v) if short else v for k, v in chosen.items()}

    def _short(self, key: str, value: Any) -> Any:
        one = value[0] if isinstance(value, list) and len(value) == 1 else None
        if one is None or isinstance(one, list) or _several(type(self).model_fields[key].annotation) is None:
            return value
        return one

    @model_validator(mode="before")
    @classmethod
    def _prepared(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        prepared = {"version": cls.current_version, **data}
        if prepared["version"] != cls.current_version:
            raise ValueError(f"version: {prepared['version']!r} is not {cls.current_version}; read() takes others too")
        for key, field in cls.model_fields.items():
            several = _several(field.annotation)
            if several is None or prepared.get(key) is None:
                continue
            value = prepared[key]
            prepared[key] = several(value if isinstance(value, (list, tuple)) else [value])
        return prepared

    @model_serializer(mode="wrap")
    def _without_the_first_version(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = handler(self)
        return {k: v for k, v in data.items() if k != "version" or v != 1}


def _several(annotation: Any) -> type[list[Any]] | type[tuple[Any, ...]] | None:
    """``list`` or ``tuple``, where an option is that (or None) and nothing else."""
    origin, parts = get_origin(annotation) or annotation, get_args(annotation)
    if origin is Annotated:
        return _several(parts[0])
    if origin in (Union, UnionType):
        found = [_several(p) for p in parts if p is not NoneType]
        return found[0] if len(found) == 1 else None
    return origin if origin in (list, tuple) else None
