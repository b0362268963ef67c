"""The `[data]` table of a recipe: the source of rows, and how they are divided among clients."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, JsonValue, model_validator

from fedpress import tasks
from fedpress.data.audio_settings import AudioSettings
from fedpress.data.column_types import WORDS, ColumnType, checked_type
from fedpress.data.partition import Partition
from fedpress.data.reading import Reading
from fedpress.data.series_settings import SeriesSettings
from fedpress.data.text_settings import TextSettings
from fedpress.errors import Argument, FedpressError, SettingError, suggestion

BUILT_IN = (
    "digits",
    "cifar10",
    "csv",
    "parquet",
    "arrow",
    "sql",
    "huggingface",
    "numpy",
    "folders",
    "audio",
    "text",
)
"""Names of the sources that need no function of the user."""
TABLE_SOURCES = ("csv", "parquet", "arrow", "sql", "huggingface")
"""Sources that are tables with named columns."""
NEED_PATH = ("csv", "parquet", "arrow", "huggingface", "numpy", "folders", "audio", "text")
"""Sources that read the file or folder `path`."""
SQLITE = "sqlite:///"
"""Beginning of the address of an SQLite file; the rest is a path."""
Share = Annotated[float, Field(ge=0, lt=1)]
"""Type of a share of rows: at least 0 and below 1."""


def _known_source(source: object) -> object:
    if isinstance(source, str) and source not in BUILT_IN and ":" not in source:
        raise SettingError(
            f"no source '{source}' (known: {', '.join(BUILT_IN)})",
            cure=suggestion(
                source, BUILT_IN, "name one of them or your own 'package.module:function'"
            ),
        )
    return source


def _known_encoding(name: str) -> str:
    try:
        # Encodings have many spellings ("utf8", "UTF-8"), so the name is tried here.
        "".encode(name)
    except (LookupError, ValueError) as error:
        raise SettingError(
            f"no encoding {name!r}", cure="common ones are utf-8, utf-16, latin-1 and cp1252"
        ) from error
    return name


def _known_task(given: str | dict[str, JsonValue]) -> str | dict[str, JsonValue]:
    try:
        tasks.check_settings(given)
    except FedpressError as error:
        raise SettingError.of(error) from error
    return given


def _no_address(path: Any) -> Any:
    """Refuses an address, which may hold a password, so no error may quote it as a file's name."""
    if isinstance(path, str) and "://" in path:
        raise SettingError(
            "it is an address, and path is a file or folder of this machine",
            cure="give a database as address = ...; download any other file first",
        )
    return path


def _with_home(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise SettingError(
            f"no home folder is known for '{path.parts[0]}'", cure="write the whole path"
        ) from error


def _without_password(address: str) -> str:
    """Refuses a password: the recipe is copied into the run folder, which others may read."""
    found = re.search(r"://[^/@]*?:([^/@]+)@", address)
    if found and not found[1].startswith("$"):
        raise SettingError(
            "it holds a password, which would be written into the run folder",
            cure="put it into an environment variable, and write $NAME in its place",
        )
    return address


def _as_words(values: object) -> object:
    """Turns integers and booleans into words, so that `classes = [0, 1]` needs no quotes."""
    # Not a list: left to pydantic, whose own error says what was expected.
    if not isinstance(values, list | tuple):
        return values
    return [str(value) if isinstance(value, int) else value for value in values]


def _all_different(names: tuple[str, ...]) -> tuple[str, ...]:
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise SettingError(f"'{twice[0]}' is listed twice", cure="list every name once")
    return names


Names = Annotated[
    tuple[str, ...], BeforeValidator(_as_words), AfterValidator(_all_different), Field(min_length=1)
]
"""A list of different words; integers and booleans may be written without quotes."""


class DataSettings(BaseModel, frozen=True, extra="forbid"):
    """Which rows are private to which client, which are public, and which are for testing.

    A natural client is the client that the data itself names for a row, such as a hospital. The
    rows are split in this order:

    1. Rows of `public_clients` become public.
    2. The test set is the rows of `test_clients`, or the source's own test set, or a share
       `test_share` of the remaining rows.
    3. A share `public_share` of the remaining rows becomes public.
    4. The partition divides the remaining rows among the clients.
    5. If neither `public_clients` nor `public_share` is given, rows without a client become public.
       With the partition "natural" such rows are not used.
    6. The validation set is taken from the public rows.
    """

    source: Annotated[str, BeforeValidator(_known_source)] = Field(
        description="digits, cifar10, csv, parquet, arrow, sql, huggingface, numpy, folders "
        "(client/label/image), audio (client/label/sound.wav), text, or "
        "package.module:function"
    )
    path: Annotated[Path, BeforeValidator(_no_address), AfterValidator(_with_home)] | None = Field(
        None,
        description="file or folder; a name with * stands for several files; without a path "
        "cifar10 is downloaded",
    )
    address: Annotated[str, AfterValidator(_without_password)] | None = Field(
        None,
        description="address of a database (sql), such as sqlite:///FILE.db, or that of another "
        "database as SQLAlchemy writes it; $NAME is an environment variable",
    )
    query: str | None = Field(
        None, min_length=1, description="the SELECT whose result is the table (sql)"
    )
    table: str | None = Field(
        None,
        min_length=1,
        description="name of the table, in the place of query (sql); the split to read "
        "(huggingface), by default train, with test as the test set",
    )
    # For machines without a network, where a clear error is better than a timeout.
    download: bool = Field(
        True,
        description="whether a missing built-in data set may be downloaded into the cache folder",
    )
    partition: Partition | None = Field(
        None,
        description="iid, quantity, dirichlet, shards or natural; by default natural if the data "
        "names clients, else iid",
    )
    num_clients: int | None = Field(
        default=None, ge=1, description="number of clients; by default 10, or every natural client"
    )
    examples_per_client: int | None = Field(
        default=None, ge=1, description="private rows of each client; by default all rows are dealt"
    )
    # A fifth is usual; fewer rows would give the metrics a large standard error.
    test_share: Share = Field(
        0.2,
        description="share of each natural client's rows for the test set, if the source has no "
        "test set of its own",
    )
    test_clients: tuple[str, ...] = Field(
        (), description="natural clients whose rows are the test set, in the place of test_share"
    )
    # None and 0 differ: with 0 no row becomes public, not even rows without a client.
    public_share: Share | None = Field(
        None, description="share of each natural client's rows that is declared public"
    )
    public_clients: tuple[str, ...] = Field(
        (), description="natural clients whose rows are all declared public"
    )
    # Only a federation can teach these: what a public data set does not show.
    public_lacks: Names | tuple[()] = Field(
        (),
        description="classes that the public part lacks: rows of them that no client has are not "
        "used; for a table with classes = [...]",
    )
    # From the public part: choices that are made on private rows would cost privacy.
    validation: Annotated[int, Field(ge=0)] | Share = Field(
        0.1,
        description="number of public rows for validation, or their share of the public part "
        "(below 1)",
    )
    client_column: str | None = Field(
        None,
        description="the column that names the natural client of a row of a table or array; with "
        "'file', each of several files is a client",
    )
    label_column: str | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        "label",
        description="the column of a table to be predicted: whole numbers or words, or numbers "
        "for a regression; a list for several",
    )
    task: Annotated[str | dict[str, JsonValue], AfterValidator(_known_task)] | None = Field(
        None,
        description=f"what is learned: {', '.join(tasks.TASKS)}, or a table with options; by "
        "default it follows from the targets",
    )
    class_weights: Literal["balanced"] | tuple[float, ...] | None = Field(
        None,
        description="how much each class counts in the loss: a list, or balanced (computed "
        "from the public part alone); by default all alike",
    )
    feature_columns: tuple[str, ...] | None = Field(
        None,
        description="the columns to predict from; by default all others; a single column of images "
        "is decoded, one of lists of numbers becomes an array",
    )
    drop_columns: tuple[str, ...] = Field((), description="columns to leave out of the features")
    types: dict[str, Annotated[str, AfterValidator(checked_type)]] = Field(
        {},
        description='how columns are understood, such as { zip = "integer id" }: number, word, '
        "integer id, date (or date %d.%m.%Y) or image; by default as they look",
    )
    delimiter: str = Field(
        default=",",
        min_length=1,
        max_length=1,
        description="the character between the columns of a CSV file",
    )
    decimal: Literal[".", ","] = Field(
        ".", description="decimal separator of the numbers in a CSV file"
    )
    encoding: Annotated[str, AfterValidator(_known_encoding)] | None = Field(
        None,
        description="encoding of a CSV file, such as latin-1; by default UTF-8, or UTF-16 with a "
        "byte order mark",
    )
    stream: bool | None = Field(
        None,
        description="read csv, parquet and arrow files in batches and keep the inputs on disk; by "
        "default if the files have more than an eighth of the memory of this machine",
    )
    # An error by default, since both other ways change what the model learns.
    missing: Literal["error", "drop", "mean"] = Field(
        "error",
        description="a missing feature is an error, drops its row, or is filled with the mean of "
        "the public rows",
    )
    classes: Names | None = Field(
        None,
        description="names of all classes, in the order of their numbers; by default those of the "
        "public part; not for sources with classes of their own",
    )
    words: dict[str, Names] = Field(
        {},
        description='the words that a column may have, such as { job = ["cook", "nurse"] }; by '
        "default those of the public part",
    )
    # By default none: a list of words may reveal that a private row with a rare word exists.
    public_words: tuple[str, ...] = Field(
        (),
        description="columns whose list of words is no secret, so that it is taken from private "
        "rows too; with the label column, all labels become classes",
    )
    # Private rows may have labels that no public row has, and these must not become classes.
    unknown: Literal["drop", "other"] | None = Field(
        None,
        description="a private row whose label or word is on no list: drop leaves it out, other "
        "adds a class or an input; by default unknown classes are left out and unknown words "
        "are zeros",
    )
    statistics: Literal["public", "private"] = Field(
        "public",
        description="where mean, std, the values of missing cells and the vocabulary of texts come "
        "from: public (the public rows), or private (noised sums over the clients' rows, which a "
        "stage `statistics` asks for)",
    )
    series: SeriesSettings | None = Field(
        None,
        description="rows of a table that follow each other in time: windows, forecasts, lags, "
        "calendar",
    )
    text: TextSettings = Field(
        TextSettings(),
        description="how a text becomes sequences of tokens (text)",
    )
    audio: AudioSettings = Field(
        AudioSettings(),
        description="how a recording becomes a log-mel spectrogram (audio)",
    )
    image_size: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="height and width to which images are resized; without it all images must "
        "have the same size",
    )
    mean: tuple[float, ...] = Field(
        (), description="mean of each channel or feature; by default that of the public part"
    )
    std: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (),
        description="standard deviation of each channel or feature; by default that of the "
        "public part",
    )

    @property
    def reads_table(self) -> bool:
        """Whether the source is a table with named columns."""
        return self.source in TABLE_SOURCES

    @property
    def label_columns(self) -> tuple[str, ...]:
        """The columns to be predicted."""
        column = self.label_column
        return (column,) if isinstance(column, str) else column

    @property
    def reading(self) -> Reading:
        """How other machines read their own tables as this recipe does."""
        # Types of the inputs are in the preparation.
        own = {name: given for name, given in self.types.items() if name in self.label_columns}
        kept = self.model_dump(include=set(Reading.model_fields) - {"types"})
        return Reading.model_validate({**kept, "types": own})

    def type_of(self, column: str) -> ColumnType | None:
        """Returns the type that the recipe gives to a column; None if it gives none."""
        given = self.types.get(column)
        return None if given is None else ColumnType.of(given)

    @model_validator(mode="after")
    def _types_fit(self) -> Self:
        if self.types and not self.reads_table:
            raise SettingError(
                f"source '{self.source}' is no table", place="types", cure="leave types out"
            )
        for name, given in self.types.items():
            if given in WORDS:
                continue
            if name in self.words or name in self.public_words:
                key = "words" if name in self.words else "public_words"
                raise SettingError(
                    f"column '{name}' is of the type {given}, which has no words",
                    place=key,
                    cure="leave it out of one of the two",
                )
            # The task says what targets are. Forecasts may use the column as an input, too.
            is_input = self.series is not None and bool(self.series.horizon)
            if name in self.label_columns and not is_input:
                raise SettingError(
                    f"column '{name}' is predicted, so the task says what it holds",
                    place="types",
                    cure=("leave it out, and set ", Argument("task", "regression"), " for numbers"),
                )
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if len(self.mean) != len(self.std):
            raise SettingError(
                f"{len(self.mean)} values of mean but {len(self.std)} of std",
                place="mean",
                cure="give as many of each",
            )
        # Otherwise it is unclear whether the share is taken of all rows or of the other clients'
        # rows.
        if self.public_clients and self.public_share is not None:
            raise SettingError(
                "public_clients is given, too",
                place="public_share",
                cure="leave one of the two out",
            )
        both = set(self.public_clients) & set(self.test_clients)
        # The same rows would be trained on and tested on.
        if both:
            raise SettingError(
                f"client '{min(both)}' is in public_clients, too",
                place="test_clients",
                cure="leave it in one of the two",
            )
        # "3,5" would be read as two cells.
        if self.decimal == self.delimiter:
            raise SettingError(
                f"delimiter is '{self.delimiter}', too",
                place="decimal",
                cure=("give ", Argument("delimiter", ";"), " or what separates the columns"),
            )
        if self.path is None and self.source in NEED_PATH:
            raise SettingError(
                f"source '{self.source}' needs a path",
                place="path",
                cure=("give ", Argument("path", "PATH")),
            )
        return self

    @model_validator(mode="after")
    def _statistics_fit(self) -> Self:
        if self.statistics == "public":
            return self
        for key, wrong in (("mean", bool(self.mean)), ("series", self.series is not None)):
            if wrong:
                raise SettingError(
                    f"{key} is given, too", place="statistics", cure=f"leave {key} or this out"
                )
        if self.source == "text":
            self._check_private_vocabulary()
        elif not self.reads_table:
            raise SettingError(
                f"private statistics are for columns of a table, and '{self.source}' is none",
                place="statistics",
                cure="leave it out, and give mean and std",
            )
        return self

    def _check_private_vocabulary(self) -> None:
        """Refuses settings of texts that a query for their vocabulary does not allow."""
        if self.text.vocabulary is None:
            raise SettingError(
                "a private query finds the most frequent tokens, and nothing says how many",
                place="text.vocabulary",
                cure=("give ", Argument("text.vocabulary", 60), ", or leave statistics out"),
            )
        if self.unknown == "drop":
            raise SettingError(
                "a sequence with a rare token would be left out, after the noise was planned for it",
                place="unknown",
                cure="leave it out",
            )

    @model_validator(mode="after")
    def _database_fits(self) -> Self:
        given = {key: getattr(self, key) for key in ("address", "query", "table")}
        if self.source != "sql":
            for key, value in given.items():
                if value is not None and (key, self.source) != ("table", "huggingface"):
                    raise SettingError(
                        f"source '{self.source}' is no database", place=key, cure="leave it out"
                    )
            return self
        if (self.path is None) == (self.address is None):
            raise SettingError(
                "a database needs either path or address",
                place="address",
                cure=("give ", Argument("address", "sqlite:///FILE.db")),
            )
        if (self.query is None) == (self.table is None):
            raise SettingError(
                "a database needs either query or table",
                place="query",
                cure=("give ", Argument("query", "SELECT * FROM NAME")),
            )
        return self

    @model_validator(mode="after")
    def _series_fits(self) -> Self:
        if self.series is None:
            return self
        if not self.reads_table:
            raise SettingError(
                f"source '{self.source}' is no table", place="series", cure="leave series out"
            )
        if self.series.horizon:
            kind = tasks.kind_of(self.task or "forecast")
            if tasks.find(kind).targets != "numbers":
                raise SettingError(
                    f"a forecast predicts numbers, but the task is {kind}",
                    place="series.horizon",
                    cure=("set ", Argument("task", "forecast")),
                )
        return self

    @model_validator(mode="after")
    def _classes_fit(self) -> Self:
        if self.classes is not None and len(self.classes) < 2:
            raise SettingError(
                "a classification needs at least two classes, got one",
                place="classes",
                cure="list at least two",
            )
        # A task of the user's own is not imported here; `tasks.make` finds what does not fit.
        if self.task is None or tasks.is_own(tasks.kind_of(self.task)):
            return self
        if self.classes is not None:
            kind = tasks.kind_of(self.task)
            if tasks.find(kind).targets != "classes":
                raise SettingError(
                    f"the task {kind} has none", place="classes", cure="leave classes out"
                )
        if self.class_weights is not None:
            kind = tasks.kind_of(self.task)
            if not tasks.find(kind).weighs_classes:
                raise SettingError.of(tasks.no_classes_error(kind), place="class_weights")
        return self
