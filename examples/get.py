"""Gets the data of an example from its official source.

    python examples/get.py heart_disease --out data
    python examples/get.py --list

The folder `data/heart_disease` is then what the example's page gives to `--data`. A download that
breaks off goes on where it stopped. Where the source publishes a checksum (MD5, or a commit of git)
the file is compared with it; elsewhere columns and numbers of rows are counted. What was checked is
printed.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedpress.data.download import fetch
from fedpress.errors import DataError

UCI = "https://archive.ics.uci.edu/static/public"
HOSPITALS = {"cleveland": 303, "hungarian": 294, "switzerland": 123, "va": 200}
"""Hospital -> number of its patients."""
FINDINGS = "age,sex,cp,trestbps,chol,fbs,restecg,thalach,exang,oldpeak,slope,ca,thal,target"
CUSTOMERS = 30_000
CUSTOMER = (
    *("ID", "LIMIT_BAL", "SEX", "EDUCATION", "MARRIAGE", "AGE"),
    *(f"PAY_{month}" for month in (0, 2, 3, 4, 5, 6)),
    *(f"BILL_AMT{month}" for month in range(1, 7)),
    *(f"PAY_AMT{month}" for month in range(1, 7)),
    "default.payment.next.month",
)
"""Columns of the credit cards, which the source calls ID, X1 to X23 and Y."""
STATIONS, HOURS = 12, 420_768
"""Stations of the air quality, and their rows together."""
WALKS = "25bcf905596d44bdb689e4c26d6cc6caff8956a3"
"""Commit of the recordings of phones and watches, tag v1.0.0-r1."""
WALKS_TREE = "fe704b98af3c5615776e552be1d1a50bed87798d"
"""Git's checksum of the folder DATA in that commit: its names and the contents of its files."""
DEVICES = {"sp": "smartphone", "sw": "smartwatch"}
"""End of a recording's name -> its device."""
TRIED = "s05_01_sp"
"""A recording of a person whom the example tests on, for `fedpress predict`."""


@dataclass(frozen=True)
class Source:
    """Where a data set comes from.

    Attributes:
        url: address of one file.
        page: where a person reads about it.
        licence: who made it, and what one may do with it.
        finish: writes what the example reads; takes the downloaded file and the folder, and returns
            what it has checked.
        md5: checksum that the source publishes, or None.
    """

    url: str
    page: str
    licence: str
    finish: Callable[[Path, Path], str]
    md5: str | None = None


def heart_disease(archive: Path, folder: Path) -> str:
    """Writes `processed.HOSPITAL.data` with a line of column names."""
    found = dict(members(archive, "processed.", ".data"))
    for hospital, patients in HOSPITALS.items():
        name = f"processed.{hospital}.data"
        if name not in found:
            raise changed(archive, f"there is no {name}")
        rows = [row for row in csv.reader(io.StringIO(found[name].decode("utf-8"))) if row]
        require(archive, len(rows) == patients, f"{name} has {len(rows)} rows, not {patients}")
        width = FINDINGS.count(",") + 1
        require(archive, all(len(row) == width for row in rows), f"{name} has not {width} columns")
        lines = [FINDINGS, *(",".join(row) for row in rows)]
        (folder / name).write_text("\n".join(lines) + "\n", "utf-8")
    return f"{sum(HOSPITALS.values())} rows of {width} columns"


def credit_default(table: Path, folder: Path) -> str:
    """Writes `UCI_Credit_Card.csv` with the columns' own names."""
    with open(table, encoding="utf-8-sig", newline="") as file:
        head, *rows = csv.reader(file)
    require(table, len(head) == len(CUSTOMER), f"it has {len(head)} columns, not {len(CUSTOMER)}")
    require(table, len(rows) == CUSTOMERS, f"it has {len(rows)} rows, not {CUSTOMERS}")
    labels = {row[-1] for row in rows}
    require(table, labels == {"0", "1"}, "its last column is not 0 or 1")
    with open(folder / "UCI_Credit_Card.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([CUSTOMER, *rows])
    return f"{len(rows):,} rows of {len(head)} columns, and labels 0 and 1"


def air_quality(archive: Path, folder: Path) -> str:
    """Writes the files of all stations as one table, `beijing.parquet`."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    options = pyarrow.csv.ConvertOptions(null_values=["NA"], strings_can_be_null=True)
    tables = [
        pyarrow.csv.read_csv(io.BytesIO(content), convert_options=options)
        for _, content in members(archive, "PRSA_Data_", ".csv")
    ]
    count = len(tables)
    require(archive, count == STATIONS, f"it has files of {count} stations, not {STATIONS}")
    table = pa.concat_tables(tables, promote_options="permissive")
    needed = {"year", "month", "day", "hour", "PM2.5", "TEMP", "PRES", "DEWP", "WSPM", "station"}
    missing = sorted(needed - {*table.column_names})
    require(archive, not missing, f"it has no column {', '.join(missing)}")
    require(archive, len(table) == HOURS, f"it has {len(table)} rows, not {HOURS}")
    pyarrow.parquet.write_table(table, folder / "beijing.parquet")
    return f"{len(table):,} rows of {count} stations, and the names of the columns"


def phone_watch_har(archive: Path, folder: Path) -> str:
    """Writes all recordings as one table, `har.parquet`, and one of them as `s05_01_sp.csv`."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    files = {}
    with zipfile.ZipFile(archive) as opened:
        for path in opened.namelist():
            inside = path.partition("/DATA/")[2]
            if inside and not inside.endswith("/"):
                files[inside] = opened.read(path)
    found = git_tree(files)
    require(archive, found == WALKS_TREE, f"its folder DATA is {found}, not {WALKS_TREE}")
    tables = {}
    for path in sorted(path for path in files if "/" in path):
        name = Path(path).stem
        person, recording, device = name.split("_")
        table = pyarrow.csv.read_csv(io.BytesIO(files[path]))
        count = table.num_rows
        columns = {
            "subject": pa.array([person] * count).dictionary_encode(),
            "execution": pa.array([int(recording)] * count),
            "device": pa.array([DEVICES[device]] * count).dictionary_encode(),
        }
        names = [*columns, *table.column_names]
        tables[name] = pa.table([*columns.values(), *table.columns], names)
    table = pa.concat_tables(tables.values()).unify_dictionaries()
    pyarrow.parquet.write_table(table, folder / "har.parquet")
    pyarrow.csv.write_csv(tables[TRIED], folder / f"{TRIED}.csv")
    return f"git's checksum of {len(tables)} recordings, {table.num_rows:,} rows"


def as_it_is(file: Path, folder: Path) -> str:
    """Keeps the downloaded file."""
    file.rename(folder / file.name)
    return "the checksum"


SOURCES = {
    "heart_disease": Source(
        f"{UCI}/45/heart+disease.zip",
        "https://archive.ics.uci.edu/dataset/45/heart+disease",
        "Janosi et al. 1988, CC BY 4.0",
        heart_disease,
    ),
    "pneumonia_mnist": Source(
        "https://zenodo.org/record/6496656/files/pneumoniamnist.npz?download=1",
        "https://medmnist.com",
        "MedMNIST v2 (Yang et al. 2023), CC BY 4.0",
        as_it_is,
        md5="28209eda62fecd6e6a2d98b1501bb15f",
    ),
    "credit_default": Source(
        f"{UCI}/350/data.csv",
        "https://archive.ics.uci.edu/dataset/350/default+of+credit+card+clients",
        "Yeh and Lien 2009, CC BY 4.0",
        credit_default,
    ),
    "air_quality": Source(
        f"{UCI}/501/beijing+multi+site+air+quality+data.zip",
        "https://archive.ics.uci.edu/dataset/501/beijing+multi+site+air+quality+data",
        "Chen 2017, CC BY 4.0",
        air_quality,
    ),
    "phone_watch_har": Source(
        f"https://github.com/GeoTecINIT/sp-sw-har-dataset/archive/{WALKS}.zip",
        "https://doi.org/10.1016/j.dib.2023.109809",
        "Matey-Sanz, Casteleyn and Granell 2023, CC BY 4.0",
        phone_watch_har,
    ),
    "tiny_shakespeare": Source(
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "https://github.com/karpathy/char-rnn",
        "William Shakespeare, public domain",
        as_it_is,
        md5="6fb458f1232090904fb40fe944165e91",
    ),
}
"""Name of a folder -> its source."""


def members(archive: Path | io.BytesIO, begin: str, end: str) -> Iterator[tuple[str, bytes]]:
    """Yields name and content of the files in a zip, and in the zips inside it, by their names."""
    with zipfile.ZipFile(archive) as opened:
        for path in sorted(opened.namelist()):
            name = path.rsplit("/", 1)[-1]
            if name.endswith(".zip"):
                yield from members(io.BytesIO(opened.read(path)), begin, end)
            elif name.startswith(begin) and name.endswith(end):
                yield name, opened.read(path)


def git_tree(files: Mapping[str, bytes]) -> str:
    """Returns the name that git gives a folder: the SHA-1 of its files, read from within.

    GitHub packs an archive anew when it is asked, so the archive itself has no lasting checksum.

    Args:
        files: path inside the folder, such as "s01/s01_01_sp.csv", -> content. All are plain files.

    >>> git_tree({})
    '4b825dc642cb6eb9a060e54bf8d69288fbee4904'
    """
    folders: dict[str, dict[str, bytes]] = {}
    entries = []
    for path, content in files.items():
        name, slash, inside = path.partition("/")
        if slash:
            folders.setdefault(name, {})[inside] = content
        else:
            # 100644 is a file that nobody executes.
            entries.append((name, "100644", git_object("blob", content)))
    for name, inside_files in folders.items():
        entries.append((name, "40000", git_tree(inside_files)))
    # Git sorts a folder as if its name ended with a slash.
    entries.sort(key=lambda entry: entry[0] + "/" * (entry[1] == "40000"))
    lines = [f"{mode} {name}\0".encode() + bytes.fromhex(id) for name, mode, id in entries]
    return git_object("tree", b"".join(lines))


def git_object(kind: str, content: bytes) -> str:
    """Returns the SHA-1 by which git calls a file ("blob") or a folder ("tree")."""
    head = f"{kind} {len(content)}\0".encode()
    return hashlib.sha1(head + content, usedforsecurity=False).hexdigest()


def require(file: Path, holds: bool, problem: str) -> None:
    """Refuses a file that is not what the example expects."""
    if not holds:
        raise changed(file, problem)


def changed(file: Path, problem: str) -> DataError:
    """Returns the error for a file that is not what the example expects."""
    cure = "the source has changed: get the data from its page, and make the file by hand"
    return DataError(problem, place=f"'{file}'", cure=cure)


def get(name: str, out: Path) -> str:
    """Downloads a data set into the folder `out/name`; returns what was checked.

    Raises:
        DataError: if it cannot be downloaded, or is not what the example expects.
    """
    source, folder = SOURCES[name], out / name
    file = folder / source.url.rsplit("/", 1)[-1].partition("?")[0]
    downloaded = folder / "download" / file.name
    fetch(source.url, downloaded, md5=source.md5, progress=show)
    try:
        checked = source.finish(downloaded, folder)
    except zipfile.BadZipFile as error:
        raise DataError(
            f"it is no zip archive ({error})", place=f"'{downloaded}'", cure="delete it, try again"
        ) from error
    downloaded.unlink(missing_ok=True)
    downloaded.parent.rmdir()
    return checked


def show(what: str, done: int, total: int | None) -> None:
    """Writes how far a download is over the last line of the terminal."""
    of_all = f" of {total / 1e6:.1f}" if total else ""
    print(f"\r{what}: {done / 1e6:.1f}{of_all} MB", end="", file=sys.stderr, flush=True)
    if done == total:
        print(file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """Gets one data set; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", choices=sorted(SOURCES))
    parser.add_argument("--out", type=Path, default=Path("data"), help="by default: data")
    parser.add_argument("--list", action="store_true", help="lists the data sets")
    given = parser.parse_args(arguments)
    if given.list or given.name is None:
        for name, source in SOURCES.items():
            print(f"{name}: {source.licence}; {source.page}")
        return 0
    try:
        checked = get(given.name, given.out)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    source = SOURCES[given.name]
    print(f"{given.out / given.name}: checked {checked}; {source.licence}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
