"""What a check of the kit looked at, and how it says what is broken."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Report:
    """What was checked of one pass or target, and what could not be, with the reason."""

    subject: str
    checked: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    @contextlib.contextmanager
    def part(self, what: str) -> Iterator[None]:
        """Note a part as checked once its body ends.

        Raises:
            AssertionError: whatever the body raised; names the subject and the part.
        """
        try:
            yield
        except Exception as e:
            said = " ".join(str(e).split()) if isinstance(e, AssertionError) else f"{type(e).__name__}: {e}"
            raise AssertionError(f"{self.subject}: {what}: {said}") from e
        if what not in self.checked:
            self.checked.append(what)

    def skip(self, what: str, reason: object) -> None:
        """Note a part that cannot be checked here."""
        self.skipped.setdefault(what, " ".join(str(reason).split()))


def require(condition: object, said: str) -> None:
    """Raise AssertionError unless ``condition`` holds; unlike ``assert``, also under ``python -O``."""
    if not condition:
        raise AssertionError(said)


def require_refusal(error: Exception, *named: str) -> None:
    """Hold a refusal to what users are promised: one line, and in it the names that it is about.

    Raises:
        AssertionError: it has more than one line, or lacks a name.
    """
    text = str(error)
    require(len(text.splitlines()) == 1, f"the refusal is not one line: {text!r}")
    for name in named:
        require(name in text, f"the refusal does not name '{name}': {text!r}")
