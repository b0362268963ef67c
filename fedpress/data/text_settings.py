"""The table `text` of `[data]`: how texts become sequences of tokens."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class TextSettings(BaseModel, frozen=True, extra="forbid"):
    """What a token is, and how many a sequence has."""

    tokens: Literal["characters", "words"] = Field(
        default="characters", description="a token is a character, or a word or punctuation mark"
    )
    length: int = Field(
        default=80, ge=1, le=1_000_000, description="tokens of a sequence, which is an example"
    )
    vocabulary: int | None = Field(
        default=None,
        ge=1,
        description="most tokens in the vocabulary: the most frequent ones; by default all",
    )
