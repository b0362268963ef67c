"""Reads renamed keys and values of old recipes, with a warning that names the new ones.

A recipe is the TOML file that describes a run. Example: `sum = "secure"` is now
`aggregator = "secure"`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, PrivateAttr, model_validator

from fedpress.errors import SettingError


@dataclass(frozen=True)
class Renamed:
    """A renamed setting: `key = old` of a table was replaced by `now_key = now`.

    If `now` is None, the old setting has no effect any more and is dropped. Several objects may
    have the same old setting: then `with_new_keys` uses the new setting of the first of them, and
    `with_old_keys` turns any of their new settings back into the old setting.
    """

    key: str
    old: Any
    now_key: str
    now: Any

    @property
    def sentence(self) -> str:
        """The text of the warning; it says what to write instead."""
        old = f"{self.key} = {_toml(self.old)}"
        if self.now is None:
            return f"{old} is still read, but has no effect any more; leave it out"
        now = f"{self.now_key} = {_toml(self.now)}"
        return f"{old} is still read, but is called {now} now; write that"


def with_new_keys(
    table: Mapping[str, Any], rows: tuple[Renamed, ...]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Returns `table` with the new settings, and a warning for each old setting that it had.

    Raises:
        SettingError: if `table` has both the old setting and the new key, and they contradict.

    >>> row = Renamed("sum", "secure", "aggregator", "secure")
    >>> with_new_keys({"sum": "secure"}, (row,))[0]
    {'aggregator': 'secure'}
    """
    out, warnings = dict(table), []
    for row in rows:
        if row.key not in out or out[row.key] != row.old:
            continue
        out.pop(row.key)
        warnings.append(row.sentence)
        if row.now is None:
            continue
        # Both keys may be given if they mean the same. {"kind": "mean"} means the same as "mean".
        if out.get(row.now_key, row.now) not in (row.now, {"kind": row.now}):
            new = f"{row.now_key} = {_toml(out[row.now_key])}"
            raise SettingError(
                f"{row.key} = {_toml(row.old)} and {new} contradict each other",
                place=row.key,
                cure=f"leave out {row.key}, which is the older key",
            )
        out[row.now_key] = row.now
    return out, tuple(warnings)


def with_old_keys(table: Mapping[str, Any], rows: tuple[Renamed, ...]) -> dict[str, Any]:
    """Returns `table` (settings in JSON types) with the old keys and values.

    A run finds its finished stages (such as "train") by a hash of their settings. The hash is
    computed from the old keys, so that runs of an older version can be resumed. Older versions
    always wrote a setting that has no effect any more (`now` is None), so it is put back if `table`
    does not have `now_key`.

    >>> row = Renamed("sum", "secure", "aggregator", "secure")
    >>> with_old_keys({"aggregator": {"kind": "secure"}}, (row,))
    {'sum': 'secure'}
    """
    out, written = dict(table), set[str]()
    for row in rows:
        # A setting with options is a table with a `kind`, such as {kind = "secure"}. Without
        # options it may be the plain word, "secure".
        if row.key not in written and out.get(row.now_key) in (row.now, {"kind": row.now}):
            out.pop(row.now_key, None)
            out[row.key] = row.old
            written.add(row.key)
    return out


class ReadsOldKeys(BaseModel):
    """Base class of settings that also accept old keys and values, listed in `renamed`.

    The property `warnings` says which old keys and values were read.
    """

    renamed: ClassVar[tuple[Renamed, ...]] = ()
    _warnings: tuple[str, ...] = PrivateAttr(())

    @model_validator(mode="wrap")
    @classmethod
    def _read(cls, value: Any, validate: Callable[[Any], Any]) -> Any:
        # Settings objects need no reading, and `validate` refuses values of other types.
        if not isinstance(value, Mapping):
            return validate(value)
        table, said = with_new_keys(value, cls.renamed)
        made = validate(table)
        made._warnings = said
        return made

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings about old keys and values that were read, also in nested settings."""
        found = list(self._warnings)
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, ReadsOldKeys):
                found.extend(value.warnings)
        return tuple(found)


def _toml(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
