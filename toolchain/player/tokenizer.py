"""The text encoder's tokenizer: a prompt to the ids and the mask that the encoder takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from toolchain.errors import CheckpointError


@dataclass(frozen=True)
class Tokens:
    """A tokenized prompt, padded: ``ids`` and ``mask`` (1 real, 0 padding), both ``[L]``."""

    ids: tuple[int, ...]
    mask: tuple[int, ...]
    truncated: bool
    """The prompt was longer than L and its end is not among ``ids``."""

    @property
    def count(self) -> int:
        """Number of real tokens, the end mark included."""
        return sum(self.mask)


class T5Tokenizer:
    """A sentencepiece model as T5 uses it: the end mark after every prompt, padding after that.

    Args:
        model: path of ``spiece.model``.

    Raises:
        CheckpointError: the file cannot be read, is no sentencepiece model, or lacks end mark or padding.
    """

    def __init__(self, model: Path) -> None:
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model.read_bytes())
        except OSError as e:
            raise CheckpointError(f"cannot read the tokenizer '{model}': {e.strerror}") from e
        except RuntimeError as e:
            raise CheckpointError(f"'{model}' is not a sentencepiece model") from e
        self.end: int = self._pieces.eos_id()
        self.padding: int = self._pieces.pad_id()
        if self.end < 0 or self.padding < 0:
            raise CheckpointError(f"'{model}' has no token for the end of a text or none for padding, as T5's have")

    def __call__(self, text: str, length: int) -> Tokens:
        """``text``, cleaned already, as ``length`` tokens.

        Raises:
            ValueError: ``length`` is less than 1.
        """
        if length < 1:
            raise ValueError(f"a prompt cannot have {length} tokens; the end mark alone is one")
        pieces: list[int] = self._pieces.encode(text)
        kept = (*pieces[: length - 1], self.end)
        missing = length - len(kept)
        return Tokens(
            kept + (self.padding,) * missing, (1,) * len(kept) + (0,) * missing, truncated=len(pieces) > length - 1
        )
