"""Keys and words of a recipe that are called otherwise now: old recipes are read, and told the new word."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, PrivateAttr, model_validator

from fedpress.errors import SettingError


@dataclass(frozen=True)
class Renamed:
    """One old word: `key = old` of a table is `now_key = now` today.

    Of several rows with one old word the first says how it is read; all say what is written back as the old word. With
    a `now` of None the key is left out today.
    """

    key: str
    old: Any
    now_key: str
    now: Any

    @property
    def sentence(self) -> str:
        """What a person is told, with what to write instead."""
        if self.now is None:
            return (
                f"{self.key} = {_toml(self.old)} is still read, but says nothing now; leave it out"
            )
        now = f"{self.now_key} = {_toml(self.now)}"
        return f"{self.key} = {_toml(self.old)} is still read, but is called {now} now; write that"


def new_words(
    table: Mapping[str, Any], rows: tuple[Renamed, ...]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Returns `table` with today's words, and a sentence for each old one in it.

    Raises:
        SettingError: if a table says the same by both words, and differently.

    >>> row = Renamed("sum", "secure", "aggregator", "secure")
    >>> new_words({"sum": "secure"}, (row,))[0]
    {'aggregator': 'secure'}
    """
    out, said = dict(table), []
    for row in rows:
        if row.key not in out or out[row.key] != row.old:
            continue
        out.pop(row.key)
        said.append(row.sentence)
        if row.now is None:
            continue
        if out.get(row.now_key, row.now) not in (row.now, {"kind": row.now}):
            raise SettingError(
                f"{row.key} = {_toml(row.old)} and {row.now_key} = {_toml(out[row.now_key])} contradict each other",
                place=row.key,
                cure=f"leave out {row.key}, which is the older word",
            )
        out[row.now_key] = row.now
    return out, tuple(said)


def old_words(table: Mapping[str, Any], rows: tuple[Renamed, ...]) -> dict[str, Any]:
    """Returns `table`, settings as JSON, with the old words: run folders know what they hang on by those.

    >>> row = Renamed("sum", "secure", "aggregator", "secure")
    >>> old_words({"aggregator": {"kind": "secure"}}, (row,))
    {'sum': 'secure'}
    """
    out, written = dict(table), set[str]()
    for row in rows:
        if row.key not in written and out.get(row.now_key) in (row.now, {"kind": row.now}):
            out.pop(row.now_key, None)
            out[row.key] = row.old
            written.add(row.key)
    return out


class ReadsOldWords(BaseModel):
    """Settings that still read the old words in `renamed`; `warnings` are sentences about those that were read."""

    renamed: ClassVar[tuple[Renamed, ...]] = ()
    _warnings: tuple[str, ...] = PrivateAttr(())

    @model_validator(mode="wrap")
    @classmethod
    def _read(cls, value: Any, validate: Callable[[Any], Any]) -> Any:
        if not isinstance(value, Mapping):
            return validate(value)
        table, said = new_words(value, cls.renamed)
        made = validate(table)
        made._warnings = said
        return made

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a person should be told about old words, also in the tables inside."""
        inner = [getattr(self, name) for name in type(self).model_fields]
        found = [line for one in inner if isinstance(one, ReadsOldWords) for line in one.warnings]
        return (*self._warnings, *found)


def _toml(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
