"""The table `series` of `[data]`: how rows that follow each other become windows and forecasts."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, Field, model_validator

from fedpress.errors import Argument, SettingError

Steps = Annotated[int, Field(ge=1, le=1_000_000)]
"""A number of rows."""
DATE_COLUMNS = ("year", "month", "day", "hour", "minute", "second")
"""Names of columns that together are a date, in the order in which `order_column` lists them."""


class SeriesSettings(BaseModel, frozen=True, extra="forbid"):
    """Rows of one client and of equal values in `by` are a series; windows never leave a series."""

    window: Steps = Field(1, description="rows of an example; more than one give [columns, rows]")
    stride: Steps | None = Field(
        None, description="rows between the beginnings of two windows; by default window"
    )
    by: tuple[str, ...] = Field(
        (),
        description="columns that tell series apart, such as a device; the client always does",
    )
    order_column: str | tuple[str, ...] | None = Field(
        None,
        description="column of dates or numbers by which a series is sorted, or the list year, "
        "month, day, hour, ...; by default the order of the file",
    )
    ties: Literal["error", "keep"] = Field(
        "error",
        description="two rows of a series with the same date are an error, or keep the order of "
        "the file",
    )
    max_gap: float | None = Field(
        None,
        gt=0,
        description="a longer gap in order_column ends a series; in seconds, or in the numbers of "
        "the column",
    )
    label: Literal["majority", "last"] = Field(
        "majority",
        description="label of a window: that of most of its rows, or of its last row; numbers take "
        "the last",
    )
    horizon: tuple[Steps, ...] = Field(
        (),
        description="forecasts: the targets are the values of label_column so many rows after the "
        "window",
    )
    lags: tuple[Steps, ...] = Field(
        (), description="adds the values of label_column so many rows before each row as inputs"
    )
    calendar: tuple[Literal["hour", "weekday", "month"], ...] = Field(
        (), description="adds sine and cosine of these parts of the date as inputs"
    )

    @property
    def step(self) -> int:
        """Rows between the beginnings of two windows."""
        return self.stride or self.window

    @property
    def before(self) -> int:
        """Rows before a window that its inputs need."""
        return max(self.lags, default=0)

    @property
    def after(self) -> int:
        """Rows after a window that its targets need."""
        return max(self.horizon, default=0)

    @property
    def reach(self) -> int:
        """Rows that a window, its lags and its targets take together."""
        return self.before + self.window + self.after

    @property
    def order_columns(self) -> tuple[str, ...]:
        """The columns that give the order; empty: the order of the file."""
        column = self.order_column
        if column is None:
            return ()
        return (column,) if isinstance(column, str) else column

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for key in ("by", "horizon", "lags", "calendar", "order_column"):
            values = self.order_columns if key == "order_column" else getattr(self, key)
            if len(set(values)) < len(values):
                raise SettingError(
                    f"{list(values)} has a value twice", place=key, cure="list every value once"
                )
        for key in ("max_gap", "calendar"):
            if getattr(self, key) and self.order_column is None:
                raise SettingError(
                    "it needs dates",
                    place=key,
                    cure=("give ", Argument("order_column", "COLUMN")),
                )
        listed = self.order_columns
        if len(listed) > 1 and listed != DATE_COLUMNS[: len(listed)]:
            raise SettingError(
                f"{list(listed)} is no date",
                place="order_column",
                cure=f"name one column, or the first ones of {', '.join(DATE_COLUMNS)}",
            )
        return self
