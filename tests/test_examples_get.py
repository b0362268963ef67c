"""The script that gets the examples' data, against a server of this machine with made files."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pyarrow.parquet as parquet
import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "get.py"
PATIENT = "63.0,1.0,1.0,145.0,233.0,1.0,2.0,150.0,0.0,2.3,3.0,?,6.0,0"
HOUR = "1,2013,3,1,{hour},NA,4,4,7,300,77,-0.7,1023,-18.8,0,NNW,4.4,{station}"
HOURS = "No,year,month,day,hour,PM2.5,PM10,SO2,NO2,CO,O3,TEMP,PRES,DEWP,RAIN,wd,WSPM,station"


class Quiet(SimpleHTTPRequestHandler):
    """Serves the files of a folder."""

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def get(monkeypatch) -> ModuleType:
    """The script, for data sets of a few rows."""
    spec = importlib.util.spec_from_file_location("get_examples", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "HOSPITALS", {"cleveland": 2, "va": 1})
    monkeypatch.setattr(script, "CUSTOMERS", 2)
    monkeypatch.setattr(script, "HOURS", 24)
    return script


@pytest.fixture
def site(tmp_path, get) -> Iterator[Path]:
    """A folder that is served; the script finds all its files there."""
    folder = tmp_path / "site"
    folder.mkdir()
    handler = partial(Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        threading.Thread(target=served.serve_forever, args=(0.01,), daemon=True).start()
        address = f"http://127.0.0.1:{served.server_port}"
        for name, source in get.SOURCES.items():
            file = source.url.rsplit("/", 1)[-1]
            get.SOURCES[name] = replace(source, url=f"{address}/{file}")
        yield folder
        served.shutdown()


def packed(files: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return made.getvalue()


def test_the_files_of_the_hospitals_get_column_names(get, site, tmp_path, capsys):
    files = {"processed.cleveland.data": 2, "processed.va.data": 1, "cleveland.data": 9}
    content = {name: f"{PATIENT}\n".encode() * rows for name, rows in files.items()}
    (site / "heart+disease.zip").write_bytes(packed(content))
    assert get.main(["heart_disease", "--out", str(tmp_path / "data")]) == 0
    folder = tmp_path / "data" / "heart_disease"
    assert sorted(each.name for each in folder.iterdir()) == sorted(files)[1:]
    lines = (folder / "processed.cleveland.data").read_text().splitlines()
    assert lines[0].startswith("age,sex,cp")
    assert lines[1:] == [PATIENT, PATIENT]
    assert "checked 3 rows of 14 columns" in capsys.readouterr().out


def test_a_file_with_other_rows_is_refused(get, site, tmp_path, capsys):
    content = {f"processed.{name}.data": f"{PATIENT}\n".encode() for name in ("cleveland", "va")}
    (site / "heart+disease.zip").write_bytes(packed(content))
    assert get.main(["heart_disease", "--out", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "processed.cleveland.data has 1 rows, not 2" in told
    assert "the source has changed" in told


def test_the_columns_of_the_credit_cards_get_their_names(get, site, tmp_path):
    names = ["ID", *(f"X{at}" for at in range(1, 24)), "Y"]
    rows = [["1", *["7"] * 23, "0"], ["2", *["8"] * 23, "1"]]
    (site / "data.csv").write_text("\n".join(",".join(row) for row in [names, *rows]))
    assert get.main(["credit_default", "--out", str(tmp_path)]) == 0
    lines = (tmp_path / "credit_default" / "UCI_Credit_Card.csv").read_text().splitlines()
    assert lines[0].startswith("ID,LIMIT_BAL,SEX,EDUCATION,MARRIAGE,AGE,PAY_0,PAY_2")
    assert lines[0].endswith("PAY_AMT6,default.payment.next.month")
    assert lines[1:] == [",".join(row) for row in rows]


def test_the_stations_become_one_table(get, site, tmp_path):
    files = {}
    for number in range(12):
        rows = [HOUR.format(hour=hour, station=f"s{number}") for hour in range(2)]
        files[f"PRSA_Data/PRSA_Data_s{number}.csv"] = "\n".join([HOURS, *rows]).encode()
    inner = packed(files)
    archive = packed({"PRSA2017_Data.zip": inner, "test.csv": b"no,data"})
    (site / "beijing+multi+site+air+quality+data.zip").write_bytes(archive)
    assert get.main(["air_quality", "--out", str(tmp_path)]) == 0
    table = parquet.read_table(tmp_path / "air_quality" / "beijing.parquet")
    assert len(set(table["station"].to_pylist())) == 12
    assert table["PM2.5"].null_count == table.num_rows == 24


def recordings(site, get) -> dict[str, bytes]:
    """Serves recordings of two people in the layout of the source; returns the files of DATA."""
    head, reading = "x_acc,y_acc,z_acc,x_gyro,y_gyro,z_gyro,timestamp,label", "1,2.5,3,4,5,6"
    files = {"subjects_info.csv": b"subject_id,age\n"}
    for person, device in (("s05", "sw"), ("s05", "sp"), ("s01", "sp")):
        rows = [f"{reading},{1657533977813 + at},SEATED" for at in range(3)]
        files[f"{person}/{person}_01_{device}.csv"] = "\n".join([head, *rows]).encode()
    top = "sp-sw-har-dataset-1"
    archive = {f"{top}/README.md": b"read me", f"{top}/DATA/": b""}
    archive |= {f"{top}/DATA/{path}": content for path, content in files.items()}
    (site / f"{get.WALKS}.zip").write_bytes(packed(archive))
    return files


def test_the_recordings_become_one_table_and_one_file_to_predict(get, site, tmp_path, monkeypatch):
    monkeypatch.setattr(get, "WALKS_TREE", get.git_tree(recordings(site, get)))
    assert get.main(["phone_watch_har", "--out", str(tmp_path)]) == 0
    table = parquet.read_table(tmp_path / "phone_watch_har" / "har.parquet")
    assert table.column_names[:4] == ["subject", "execution", "device", "x_acc"]
    assert table["subject"].to_pylist() == ["s01"] * 3 + ["s05"] * 6
    assert table["device"].to_pylist()[3:] == ["smartphone"] * 3 + ["smartwatch"] * 3
    assert table["timestamp"].to_pylist()[1] == 1657533977814
    lines = (tmp_path / "phone_watch_har" / "s05_01_sp.csv").read_text().splitlines()
    assert lines[0].replace('"', "").startswith("subject,execution,device,x_acc")
    assert len(lines) == 4


def test_changed_recordings_are_refused(get, site, tmp_path, capsys):
    recordings(site, get)
    assert get.main(["phone_watch_har", "--out", str(tmp_path)]) == 2
    assert "not fe704b98af3c5615776e552be1d1a50bed87798d" in capsys.readouterr().err


def test_the_checksum_of_a_folder_is_that_of_git(get):
    # By `git write-tree`. A folder s01 stands behind the file s01.csv, not before it.
    files = {"s05/y.csv": b"c\n", "s01/x.csv": b"b\n", "s01.csv": b"a\n"}
    assert get.git_tree(files) == "e31e4c2e2e6866a9284da4211557a7cb7aa596f8"


def test_a_file_with_another_checksum_is_refused(get, site, tmp_path, capsys):
    (site / "input.txt").write_text("ROMEO:\nBut soft")
    assert get.main(["tiny_shakespeare", "--out", str(tmp_path)]) == 2
    assert "expected 6fb458f1232090904fb40fe944165e91" in capsys.readouterr().err
    source = get.SOURCES["tiny_shakespeare"]
    right = hashlib.md5(b"ROMEO:\nBut soft").hexdigest()
    get.SOURCES["tiny_shakespeare"] = replace(source, md5=right)
    assert get.main(["tiny_shakespeare", "--out", str(tmp_path)]) == 0
    assert [each.name for each in (tmp_path / "tiny_shakespeare").iterdir()] == ["input.txt"]


def test_a_page_in_place_of_an_archive_is_refused(get, site, tmp_path, capsys):
    (site / "heart+disease.zip").write_text("<html>moved</html>")
    assert get.main(["heart_disease", "--out", str(tmp_path)]) == 2
    assert "it is no zip archive" in capsys.readouterr().err
