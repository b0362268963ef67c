"""Files as other programs write them are read, or told for what they are with a cure that works."""

import tomllib

import pyarrow as pa
import pytest

from fedpress.data import DataSettings, csv, load
from fedpress.data.cells import cast_text
from fedpress.errors import DataError

ROWS = 80


def text(delimiter=",", decimal=".", end="\n", quote="", site="köln") -> str:
    head = delimiter.join(f"{quote}{name}{quote}" for name in ("a", "b", "site", "y"))
    lines = [head]
    for i in range(ROWS):
        number = f"{i / 8:.3f}".replace(".", decimal)
        lines.append(
            delimiter.join([number, str(i), site if i % 4 == 0 else f"s{i % 4}", str(1 + i % 2)])
        )
    return end.join(lines) + end


def read(path, **keys):
    keys = {
        "source": "csv",
        "path": path,
        "client_column": "site",
        "label_column": "y",
        "public_share": 0.3,
        **keys,
    }
    return load(DataSettings(**keys), 0)


def cured(path, message: str):
    """Refuses the file with `message`, then follows the cure that stands in it and reads the file."""
    keys = {}
    for _ in range(3):
        with pytest.raises(DataError, match=message) as caught:
            read(path, **keys)
        line = str(caught.value).partition("add ")[2].partition(" to [data]")[0]
        keys |= tomllib.loads(line)
        try:
            return read(path, **keys)
        except DataError as error:
            message = str(error)[:20].replace("(", ".").replace(")", ".")
    raise AssertionError(keys)


def same(data, path) -> bool:
    plain = path.with_name("plain.csv")
    plain.write_text(text(), "utf-8")
    other = read(plain)
    return data.class_names == other.class_names and all(
        data.clients[name].x.equal(other.clients[name].x) for name in other.clients
    )


@pytest.mark.parametrize("how", [{"end": "\r\n"}, {"quote": '"'}, {"end": "\r"}])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_byte_order_marks_quotes_and_line_ends_of_other_systems_are_read(tmp_path, how, encoding):
    path = tmp_path / "t.csv"
    path.write_bytes(text(**how).encode(encoding))
    assert same(read(path), path)


@pytest.mark.parametrize(
    ("encoding", "site", "message"),
    [
        ("latin-1", "köln", "not UTF-8; it looks like latin-1"),
        ("cp1252", "k€ln", "not UTF-8; it looks like cp1252"),
        ("utf-16-le", "köln", "not UTF-8; it looks like UTF-16"),
        ("utf-16-be", "köln", "not UTF-8; it looks like UTF-16"),
    ],
)
def test_other_encodings_are_told_and_read_by_the_cure(tmp_path, encoding, site, message):
    path = tmp_path / "t.csv"
    path.write_bytes(text(site=site).encode(encoding))
    assert site in cured(path, message).clients


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_other_delimiters_are_told_and_read_by_the_cure(tmp_path, delimiter):
    path = tmp_path / "t.csv"
    path.write_text(text(delimiter), "utf-8")
    assert same(cured(path, "its columns seem to be separated by"), path)


def test_decimal_commas_are_told_and_read_by_the_cure(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(text(";", ","), "utf-8")
    assert same(cured(path, "its columns seem to be separated by ';'"), path)
    with pytest.raises(
        DataError, match="feature column 'a': its numbers have decimal commas; add decimal"
    ):
        read(path, delimiter=";")
    assert read(path, delimiter=";", decimal=",").example_shape == (2,)


def test_thousands_are_divided_by_points_where_decimals_have_commas(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a;y\n" + "1.234,5;0\n2,5;1\n" * 20)
    data = read(path, client_column=None, delimiter=";", decimal=",", num_clients=2)
    assert set(data.public.x.flatten().tolist()) == {1234.5, 2.5}


@pytest.mark.parametrize("cell", ["02.07.2019", "12.50", "1.2345", "1.234.5"])
def test_a_point_that_divides_no_thousands_makes_no_number(cell):
    texts = pa.chunked_array([[cell, "1.234.567,5", "-1.234", "2,5", "7", None]])
    read = cast_text(texts, pa.float64(), ",").to_pylist()
    assert read == [None, 1234567.5, -1234.0, 2.5, 7.0, None]


def test_cells_over_several_lines_are_read(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,job,y\n" + '1,"x\nz",0\n2,w,1\n' * 20)
    assert read(path, client_column=None, num_clients=2).example_shape == (3,)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04" + bytes(100), "this is a zip or Excel file, not CSV; save it as CSV"),
        (b"PAR1" + bytes(100), 'this is a parquet file, not CSV; set source = "parquet"'),
        (b"\x1f\x8b" + bytes(100), "this is a gzip file, not CSV; unpack it"),
        (bytes(range(256)) * 4, "not UTF-8, and it is no text"),
        (b"", r"not a readable CSV file \(Empty CSV file\)"),
        (b"a,site,y\n", "there are no rows"),
        (b"a,a,site,y\n1,2,s,0\n", "two columns are named 'a'"),
    ],
)
def test_files_that_are_no_csv_are_named(tmp_path, content, message):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "t.csv")


def test_an_error_in_a_row_does_not_quote_the_row(tmp_path):
    (tmp_path / "t.csv").write_text(text(site="x") + "1,2,x,rare-disease,1\n")
    with pytest.raises(
        DataError, match=r"not a readable CSV file \(.*Expected 4 columns, got 5\)"
    ) as caught:
        read(tmp_path / "t.csv")
    assert "rare" not in str(caught.value)


def test_an_unknown_encoding_is_refused():
    with pytest.raises(ValueError, match="no encoding 'latin-x'; common ones are"):
        DataSettings(source="csv", path="t.csv", encoding="latin-x")


@pytest.mark.parametrize(
    ("encoding", "word"),
    [("cp1251", "повар"), ("gb18030", "厨师医生"), ("shift_jis", "料理人"), ("euc-kr", "요리사")],
)
def test_other_scripts_are_not_taken_for_latin(tmp_path, encoding, word):
    """Latin-1 reads any bytes: to name it would turn these words into others, silently."""
    (tmp_path / "a.csv").write_bytes(("job,ill\n" + f"{word},0\nb,1\n" * 20).encode(encoding))
    with pytest.raises(
        DataError, match="not UTF-8, and the script does not seem to be Latin"
    ) as caught:
        load(DataSettings(source="csv", path=tmp_path / "a.csv", label_column="ill"), 0)
    assert f'"{encoding}"' in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sep=;\na;b\n1;2\n", "its first line tells Excel the delimiter; remove it"),
        ("# of 2024\na,ill\n1,2\n", "its first line is a comment; remove it"),
        ('<!DOCTYPE html>\n<p>a, b</p>\n<p>"a", b, c</p>', "this is HTML or XML, not CSV"),
        ('[{"a": 1, "ill": 0},\n{"a": 2}]', "this is JSON, not CSV"),
        (
            'a,ill\n"1,234",0\n"2,345",1\n',
            "its numbers have decimal commas; write decimal points, or remove commas",
        ),
    ],
)
def test_what_cannot_be_read_is_told_with_a_cure(tmp_path, text, message):
    head, _, rows = text.partition("\n")
    (tmp_path / "a.csv").write_text(
        f"{head}\n{rows}" if "1,234" not in text else f"{head}\n{rows * 20}"
    )
    with pytest.raises(DataError, match=message):
        load(
            DataSettings(
                source="csv", path=tmp_path / "a.csv", label_column="ill", public_share=0.5
            ),
            0,
        )


def test_a_letter_that_lies_across_two_blocks_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(csv, "BLOCK", 5)
    path = tmp_path / "a.csv"
    path.write_text("ort,zahl\nKöln,1\nMünchen,2\n", encoding="utf-8")
    assert csv.encoding_of(path) is None
    path.write_text("ort,zahl\nKöln,1\nMünchen,2\n", encoding="latin-1")
    assert csv.encoding_of(path) == "latin-1"
