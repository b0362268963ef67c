"""Reads a CSV file as text columns; errors say what the file seems to be instead, such as UTF-16.

The types of the columns are found later, from public rows (`fedpress.data.columns`). Errors never
quote a row, because it may be private.
"""

from __future__ import annotations

import codecs
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv

from fedpress.data.settings import DataSettings
from fedpress.errors import DataError, first_line

# Texts that stand for a missing cell.
NO_VALUE = ["", "?", "NA", "N/A", "NaN", "nan", "null", "NULL", "None"]
# Usual delimiters, and how they are written in TOML.
DELIMITERS = {",": ",", ";": ";", "\t": "\\t", "|": "|"}
# The kind of a file is recognised from this many bytes at its start.
HEAD = 1 << 16
FOREIGN = (
    (b"PK\x03\x04", "a zip or Excel file", "save it as CSV"),
    (b"\xd0\xcf\x11\xe0", "an old Excel file", "save it as CSV"),
    (b"PAR1", "a parquet file", 'set source = "parquet"'),
    (b"\x1f\x8b", "a gzip file", "unpack it"),
)
"""First bytes of files that are often given by mistake, what such a file is, and the cure."""

_REMOVE = "remove it, so that the names of the columns come first"
BEGINNINGS = {
    "sep=": ("its first line tells Excel the delimiter", _REMOVE),
    "#": ("its first line is a comment", _REMOVE),
    "<": ("this is HTML or XML, not CSV", "save the table as CSV"),
    "{": ("this is JSON, not CSV", "save it as CSV"),
    "[": ("this is JSON, not CSV", "save it as CSV"),
}
"""First characters of text that is no plain CSV, what such a file is, and the cure."""


def read_csv(path: Path, settings: DataSettings) -> Any:
    """Returns a `pyarrow.Table` of text columns; missing cells are null.

    Raises:
        DataError: if the file cannot be read. The error says what the file seems to be.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD)
    except OSError as error:
        raise DataError(
            f"cannot be read ({error.strerror})",
            place=f"'{path}'",
            cure="check the path and its permissions",
        ) from error
    for start, what, cure in FOREIGN:
        if head.startswith(start):
            raise DataError(f"this is {what}, not CSV", place=f"'{path}'", cure=cure)
    encoding = settings.encoding or declared_encoding(head)
    try:
        return _parse(path, settings.delimiter, encoding, newlines=False)
    except (UnicodeError, pa.ArrowException, OSError) as error:
        first = error
    # A quoted cell may contain line breaks. Allowing them makes reading slower, so this is
    # tried second.
    try:
        return _parse(path, settings.delimiter, encoding, newlines=True)
    except (UnicodeError, pa.ArrowException, OSError):
        pass
    _refuse_encoding(path, encoding)
    lines = head.decode(encoding, "replace").splitlines()
    for beginning, (problem, cure) in BEGINNINGS.items():
        if lines and lines[0].removeprefix("\ufeff").startswith(beginning):
            raise DataError(problem, place=f"'{path}'", cure=cure)
    refuse_other_delimiter(settings, lines[:1], path)
    raise DataError(
        f"not a readable CSV file ({brief(first)})", place=f"'{path}'", cure="correct or remove it"
    ) from first


def delimiter_of(path: Path, usual: str = ",", encoding: str | None = None) -> str:
    """Returns the character that separates the columns in the header of a file.

    Args:
        path: the file; if it cannot be read, `usual` is returned.
        usual: the delimiter to expect. Another one is returned only if the header lacks this one.
        encoding: encoding of the file; None: UTF-8, or UTF-16 with a byte order mark.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD)
    except OSError:
        return usual
    lines = head.decode(encoding or declared_encoding(head), "replace").splitlines()
    header = lines[0] if lines else ""
    if usual in header:
        return usual
    likely = max(DELIMITERS, key=header.count)
    return likely if likely in header else usual


BLOCK = 1 << 24
"""Bytes of a file that are decoded at once to find its encoding."""


def encoding_of(path: Path) -> str | None:
    """Returns the likely encoding of a file, such as "cp1252"; None if it is read without one.

    Raises:
        DataError: if the encoding cannot be told, or the file is no text.
    """
    try:
        with path.open("rb") as file:
            head = file.read(BLOCK)
            if any(head.startswith(start) for start, _, _ in FOREIGN):
                return None  # reading the table says why
            # By blocks, since the file may be larger than memory.
            decoder = codecs.getincrementaldecoder(declared_encoding(head))()
            for block in itertools.chain([head], iter(lambda: file.read(BLOCK), b"")):
                decoder.decode(block)
            decoder.decode(b"", final=True)
    except OSError:
        return None  # likewise
    except UnicodeError:
        return _likely_encoding(path, path.read_bytes(), "utf-8")
    return None


def open_csv(path: Path, settings: DataSettings, columns: Sequence[str] | None = None) -> Any:
    """Returns a reader of batches of text columns, a `pyarrow.csv.CSVStreamingReader`.

    Cells may not contain line breaks.

    Args:
        path: the file.
        settings: delimiter and encoding of the file.
        columns: the columns to read, if the file has them; None: all.

    Raises:
        pyarrow.ArrowException, UnicodeError: if the file cannot be read; also while reading.
        OSError: if there is no such file.
    """
    with open(path, "rb") as file:
        head = file.read(HEAD)
    encoding = settings.encoding or declared_encoding(head)
    options = _options(path, settings.delimiter, encoding, newlines=False)
    if columns is not None:
        converting = options["convert_options"]
        converting.include_columns = [name for name in columns if name in converting.column_types]
    return pyarrow.csv.open_csv(path, **options)


def _parse(path: Path, delimiter: str, encoding: str, *, newlines: bool) -> Any:
    return pyarrow.csv.read_csv(path, **_options(path, delimiter, encoding, newlines=newlines))


def _options(path: Path, delimiter: str, encoding: str, *, newlines: bool) -> dict[str, Any]:
    """Returns pyarrow's options for reading every column as text."""
    reading = pyarrow.csv.ReadOptions(encoding=encoding)
    parsing = pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=newlines)
    # The names are read first, to declare every column as text: pyarrow would guess types from all
    # rows, private ones too.
    with pyarrow.csv.open_csv(path, read_options=reading, parse_options=parsing) as reader:
        names = reader.schema.names
    as_text = pyarrow.csv.ConvertOptions(
        null_values=NO_VALUE,
        strings_can_be_null=True,
        column_types={name: pa.string() for name in names},
    )
    return {"read_options": reading, "parse_options": parsing, "convert_options": as_text}


def declared_encoding(head: bytes) -> str:
    """Returns the encoding that a byte order mark declares; UTF-8 if there is none."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    return "utf-8"


def _refuse_encoding(path: Path, encoding: str) -> None:
    """Raises a DataError that names the likely encoding if the file has another than `encoding`."""
    data = path.read_bytes()
    try:
        data.decode(encoding)
    except UnicodeError:
        pass
    else:
        return
    likely = _likely_encoding(path, data, encoding)
    name = "UTF-16" if likely.startswith("utf-16") else likely
    raise DataError(
        f"not {encoding.upper()}",
        place=f"'{path}'",
        cure=f'it looks like {name}: add encoding = "{likely}" to [data], or save it as UTF-8',
    )


def _likely_encoding(path: Path, data: bytes, encoding: str) -> str:
    """Returns the likely encoding of bytes that are not of `encoding`.

    Raises:
        DataError: if it cannot be told, or `data` is no text.
    """
    place, why = f"'{path}'", f"not {encoding.upper()}"
    # In UTF-16 one byte of every Latin character is 0: the first byte in big-endian order, else the
    # second.
    if data.count(0) > len(data) // 4:
        order = "be" if data[::2].count(0) > data[1::2].count(0) else "le"
        return f"utf-16-{order}"
    if any(byte < 32 and byte not in b"\t\n\v\f\r\x1a\x1b" for byte in data[:HEAD]):
        raise DataError(
            f"{why}, and it is no text",
            place=place,
            cure="give a CSV file, saved as UTF-8",
        )
    if _is_other_script(data):
        raise DataError(
            f"{why}, and the script does not seem to be Latin",
            place=place,
            cure=(
                'add its encoding to [data], such as encoding = "cp1251" (Cyrillic), "gb18030" '
                '(Chinese), "shift_jis" (Japanese) or "euc-kr" (Korean), or save it as UTF-8'
            ),
        )
    # Most other files come from Western Windows programs, in cp1252. cp1252 has characters at 0x80
    # to 0x9f, where Latin-1 has only control codes.
    return "cp1252" if re.search(rb"[\x80-\x9f]", data) else "latin-1"


def _is_other_script(data: bytes) -> bool:
    """Returns whether the text seems to be Cyrillic, Chinese or another script than Latin.

    The text is taken for another script if most bytes above 127 are in runs of three or more. In
    Latin scripts such bytes are single accented letters between plain letters.
    """
    runs = re.findall(rb"[\x80-\xff]+", data)
    in_long_runs = sum(len(run) for run in runs if len(run) > 2)
    return 2 * in_long_runs > sum(map(len, runs))


def refuse_other_delimiter(
    settings: DataSettings, header: list[str], path: Path | None = None
) -> None:
    """Refuses a header that was read as one column because the delimiter is wrong.

    Args:
        settings: the `[data]` table of the recipe.
        header: the column names; if there are several, the delimiter is taken to be right.
        path: the file, for the error; None: `settings.path`.

    Raises:
        DataError: if the header seems to have another delimiter, which the error names; or if it is
            the line `sep=` that tells Excel the delimiter.
    """
    if len(header) != 1:
        return
    if header[0].startswith("sep="):
        problem, cure = BEGINNINGS["sep="]
        raise DataError(problem, place=f"'{path or settings.path}'", cure=cure)
    counts = {}
    for mark in DELIMITERS:
        if mark != settings.delimiter:
            counts[mark] = header[0].count(mark)
    likely = max(counts, key=lambda mark: counts[mark])
    if counts[likely] > header[0].count(settings.delimiter):
        raise DataError(
            f"its columns seem to be separated by '{DELIMITERS[likely]}'",
            place=f"'{path or settings.path}'",
            cure=f'add delimiter = "{DELIMITERS[likely]}" to [data]',
        )


def brief(error: BaseException) -> str:
    """Returns the reason of an error of pyarrow, without the text of a row, which may be private."""
    message = first_line(error)
    found = re.search(r"(Row #\d+: )?Expected \d+ columns, got \d+", message)
    if found:
        return found[0]
    if isinstance(error, pa.ArrowException):
        return message.partition(": ")[0].rstrip(". ")
    return "it cannot be decoded"
