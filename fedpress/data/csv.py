"""Reading a CSV file as text, and saying what it is where it is not what the settings say.

Everything is read as text: what a column holds is learned from public rows (`fedpress.data.columns`). Errors never
quote a row, for it may be private.
"""

from __future__ import annotations

import codecs
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv

from fedpress.data.settings import DataSettings
from fedpress.errors import DataError

NO_VALUE = ["", "?", "NA", "N/A", "NaN", "nan", "null", "NULL", "None"]
DELIMITERS = {",": ",", ";": ";", "\t": "\\t", "|": "|"}
"""Each delimiter, and how it is written in TOML."""
HEAD = 1 << 16
FOREIGN = (
    (b"PK\x03\x04", "a zip or Excel file", "save it as CSV"),
    (b"\xd0\xcf\x11\xe0", "an old Excel file", "save it as CSV"),
    (b"PAR1", "a parquet file", 'set source = "parquet"'),
    (b"\x1f\x8b", "packed with gzip", "unpack it"),
)
"""First bytes of files that are often given by mistake, what they are, and what helps."""

_REMOVE = "remove it, so that the names of the columns come first"
BEGINNINGS = {
    "sep=": ("its first line tells Excel the delimiter", _REMOVE),
    "#": ("its first line is a comment", _REMOVE),
    "<": ("this is HTML or XML, not CSV", "save the table as CSV"),
    "{": ("this is JSON, not CSV", "save it as CSV"),
    "[": ("this is JSON, not CSV", "save it as CSV"),
}
"""How text begins that cannot be read as it is, what it is, and what helps."""


def read(path: Path, settings: DataSettings) -> Any:
    """Returns a `pyarrow.Table` whose columns are all text; cells without a value are null.

    Raises:
        DataError: if it cannot be read so, saying what the file looks like.
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
    encoding = settings.encoding or _declared(head)
    try:
        return _read(path, settings.delimiter, encoding, newlines=False)
    except (UnicodeError, pa.ArrowException, OSError) as error:
        first = error
    try:  # a quoted cell may go over several lines; reading such files is slower
        return _read(path, settings.delimiter, encoding, newlines=True)
    except (UnicodeError, pa.ArrowException, OSError):
        pass
    _refuse_encoding(path, encoding)
    line = head.decode(encoding, "replace").splitlines()
    for beginning, (problem, cure) in BEGINNINGS.items():
        if line and line[0].removeprefix("\ufeff").startswith(beginning):
            raise DataError(problem, place=f"'{path}'", cure=cure)
    refuse_other_delimiter(settings, line[:1], path)
    raise DataError(
        f"not a readable CSV file ({_brief(first)})", place=f"'{path}'", cure="correct or remove it"
    ) from first


def _read(path: Path, delimiter: str, encoding: str, *, newlines: bool) -> Any:
    reading = pyarrow.csv.ReadOptions(encoding=encoding)
    parsing = pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=newlines)
    with pyarrow.csv.open_csv(path, read_options=reading, parse_options=parsing) as reader:
        names = reader.schema.names
    as_text = pyarrow.csv.ConvertOptions(
        null_values=NO_VALUE,
        strings_can_be_null=True,
        column_types={name: pa.string() for name in names},
    )
    return pyarrow.csv.read_csv(
        path, read_options=reading, parse_options=parsing, convert_options=as_text
    )


def _declared(head: bytes) -> str:
    """Returns the encoding that the first bytes of a file declare; UTF-8 if they declare none."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    return "utf-8"


def _refuse_encoding(path: Path, encoding: str) -> None:
    """Says which encoding the file seems to have, if it is not `encoding`."""
    data = path.read_bytes()
    try:
        data.decode(encoding)
    except UnicodeError:
        pass
    else:
        return
    place, why = f"'{path}'", f"not {encoding.upper()}"
    if data.count(0) > len(data) // 4:
        even, odd = data[::2].count(0), data[1::2].count(0)
        raise DataError(
            why,
            place=place,
            cure=(
                "it looks like UTF-16: add encoding = "
                f'"utf-16-{("be" if even > odd else "le")}" to [data]'
            ),
        )
    if any(byte < 32 and byte not in b"\t\n\v\f\r\x1a\x1b" for byte in data[:HEAD]):
        raise DataError(
            f"{why} and no text at all", place=place, cure="give a CSV file, saved as UTF-8"
        )
    if _is_other_script(data):
        raise DataError(
            f"{why}, and of another script than Latin",
            place=place,
            cure=(
                'add its encoding to [data], such as encoding = "cp1251" (Cyrillic), "gb18030" '
                '(Chinese), "shift_jis" (Japanese) or "euc-kr" (Korean), or save it as UTF-8'
            ),
        )
    # Text that is not UTF-8 is mostly of Western Windows programs; 0x80 to 0x9f are letters there, not in Latin-1.
    likely = "cp1252" if re.search(rb"[\x80-\x9f]", data) else "latin-1"
    raise DataError(
        why,
        place=place,
        cure=(f'it looks like {likely}: add encoding = "{likely}" to [data], or save it as UTF-8'),
    )


def _is_other_script(data: bytes) -> bool:
    """Whether bytes above 127 mostly stand together: in Latin script they are single letters within words."""
    runs = re.findall(rb"[\x80-\xff]+", data)
    return 2 * sum(len(run) for run in runs if len(run) > 2) > sum(map(len, runs))


def refuse_other_delimiter(
    settings: DataSettings, header: list[str], path: Path | None = None
) -> None:
    """Says which delimiter the header of a file seems to have, if it is not that of the settings."""
    if len(header) != 1:
        return
    if header[0].startswith("sep="):
        problem, cure = BEGINNINGS["sep="]
        raise DataError(problem, place=f"'{path or settings.path}'", cure=cure)
    counts = {mark: header[0].count(mark) for mark in DELIMITERS if mark != settings.delimiter}
    likely = max(counts, key=lambda mark: counts[mark])
    if counts[likely] > header[0].count(settings.delimiter):
        raise DataError(
            f"its header is divided by '{DELIMITERS[likely]}'",
            place=f"'{path or settings.path}'",
            cure=f'add delimiter = "{DELIMITERS[likely]}" to [data]',
        )


def _brief(error: BaseException) -> str:
    """Returns what is wrong without the text of the row in which it is."""
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    found = re.search(r"(Row #\d+: )?Expected \d+ columns, got \d+", said)
    if found:
        return found[0]
    return (
        said.partition(": ")[0].rstrip(". ")
        if isinstance(error, pa.ArrowException)
        else "it cannot be decoded"
    )
