import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fedpress.data import DataSettings, load
from fedpress.errors import DataError

ROWS = 40


def table(**changes) -> pa.Table:
    rng = np.random.default_rng(0)
    columns = {
        "hospital": ["north", "south"] * (ROWS // 2),
        "age": rng.integers(20, 80, ROWS),
        "dose": rng.normal(size=ROWS),
        "ward": ["a", "b", "b", "c"] * (ROWS // 4),
        "ill": ["no", "yes", "yes", "no"] * (ROWS // 4),
    }
    return pa.table({**columns, **changes})


def write(path: Path, content: pa.Table, kind: str) -> Path:
    if kind == "parquet":
        pq.write_table(content, path)
    else:
        import pyarrow.csv

        pyarrow.csv.write_csv(content, path)
    return path


def ask(path: Path, source: str = "parquet", **keys) -> DataSettings:
    keys = {
        "label_column": "ill",
        "client_column": "hospital",
        "public_share": 0.3,
        "validation": 2,
        **keys,
    }
    return DataSettings(source=source, path=path, **keys)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_numbers_and_words_become_features_and_clients_keep_their_rows(tmp_path, kind):
    data = load(ask(write(tmp_path / f"a.{kind}", table(), kind), kind), 0)
    assert list(data.clients) == ["north", "south"]
    assert data.class_names == ("no", "yes")
    assert data.example_shape == (5,)  # age, dose, and a, b, c of ward
    assert set(data.clients["north"].x[:, 2:].argmax(1).tolist()) == {
        0,
        1,
    }  # wards a and b are in the north
    assert len(data.test) == 8


def test_csv_and_parquet_of_the_same_rows_give_the_same_data(tmp_path):
    one, two = (
        load(ask(write(tmp_path / f"a.{kind}", table(), kind), kind), 0)
        for kind in ("csv", "parquet")
    )
    assert all(torch.equal(one.clients[name].x, two.clients[name].x) for name in one.clients)


def test_features_are_standardised_by_public_rows_alone(tmp_path):
    """Private rows a thousand times as large leave the statistics as they are."""
    public = np.array([name == "south" for name in table()["hospital"].to_pylist()])
    small = table()["dose"].to_numpy()
    path = write(
        tmp_path / "a.parquet", table(dose=np.where(public, small, 1000 * small)), "parquet"
    )
    data = load(ask(path, public_share=None, public_clients=["south"], validation=0), 0)
    own = small[public]
    assert data.preprocess.mean[1] == pytest.approx(own.mean(), abs=1e-5)
    assert data.preprocess.std[1] == pytest.approx(own.std(), rel=1e-4)


def test_a_word_that_only_private_rows_have_gets_no_column(tmp_path):
    ward = ["secret" if i == 0 else "a" for i in range(ROWS)]  # row 0 is in the north
    path = write(tmp_path / "a.parquet", table(ward=ward), "parquet")
    assert load(ask(path, public_share=None, public_clients=["south"]), 0).example_shape == (3,)
    assert load(
        ask(path, public_share=None, public_clients=["north"], validation=0), 0
    ).example_shape == (4,)


def test_one_file_per_client_and_coded_columns(tmp_path):
    for name in ("east", "west"):
        coded = table(ward=pa.array(table()["ward"].to_pylist()).dictionary_encode()).drop_columns(
            ["hospital"]
        )
        write(tmp_path / f"{name}.parquet", coded, "parquet")
    for path in (tmp_path, tmp_path / "*.parquet"):
        data = load(ask(path, client_column="file", num_clients=2), 0)
        assert list(data.clients) == ["east", "west"]
        assert data.example_shape == (5,)
    data = load(
        ask(tmp_path, client_column="file", test_clients=["west"], partition="iid", num_clients=3),
        0,
    )
    assert (list(data.clients), len(data.test)) == (["c0", "c1", "c2"], ROWS)


@pytest.mark.parametrize("plain", [False, True])
def test_a_column_of_images_is_decoded(tmp_path, plain):
    pixels = np.random.default_rng(0).integers(0, 256, (ROWS, 4, 4, 3), dtype=np.uint8)
    blobs = []
    for image in pixels:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        content = buffer.getvalue()
        blobs.append(content if plain else {"bytes": content, "path": None})
    path = write(
        tmp_path / "a.parquet",
        pa.table({"img": blobs, "ill": [0, 1] * 20, "hospital": [1, 2] * 20}),
        "parquet",
    )
    data = load(ask(path), 0)
    assert data.example_shape == (3, 4, 4)
    assert data.public.x.dtype == torch.uint8
    assert list(data.clients) == ["1", "2"]


def gaps() -> pa.Table:
    dose = [None if i % 10 == 0 else float(i) for i in range(ROWS)]
    return table(dose=dose)


def test_missing_features_are_an_error_a_dropped_row_or_the_public_mean(tmp_path):
    path = write(tmp_path / "a.parquet", gaps(), "parquet")
    with pytest.raises(
        DataError,
        match=r"feature column 'dose': 4 of 40 rows have no value \(first: row 1\); set missing",
    ):
        load(ask(path), 0)
    dropped = load(ask(path, missing="drop"), 0)
    assert (
        sum(
            len(part)
            for part in (
                *dropped.clients.values(),
                dropped.public,
                dropped.validation,
                dropped.test,
            )
        )
        == 36
    )
    filled = load(
        ask(path, missing="mean", public_share=None, public_clients=["south"], validation=0), 0
    )
    mean = np.mean(list(range(1, ROWS, 2)))  # the south has the odd rows, none of which is missing
    doses = torch.cat([filled.clients["north"].x, filled.test.x])[:, 1].tolist()
    assert doses.count(pytest.approx(mean)) == 4
    with pytest.raises(DataError, match=r"'mean' needs public rows"):
        load(
            ask(path, missing="mean", public_share=0.0, validation=0, public_words=["ill", "ward"]),
            0,
        )


def test_a_question_mark_in_a_csv_file_is_a_missing_value(tmp_path):
    (tmp_path / "a.csv").write_text("hospital,age,ill\n" + "x,1,0\ny,?,1\n" * 20)
    with pytest.raises(DataError, match=r"feature column 'age': 20 of 40 rows have no value"):
        load(ask(tmp_path / "a.csv", "csv"), 0)


def test_another_delimiter_can_be_given(tmp_path):
    (tmp_path / "a.csv").write_text("hospital;age;ill\n" + "x;1;0\ny;2;1\n" * 20)
    assert load(ask(tmp_path / "a.csv", "csv", delimiter=";"), 0).example_shape == (1,)


@pytest.mark.parametrize(
    ("changes", "keys", "message"),
    [
        ({}, {"label_column": "il"}, r"^label_column: no column 'il' .* did you mean 'ill'"),
        (
            {},
            {"client_column": "hospitals"},
            r"^client_column: no column 'hospitals' .* did you mean 'hospital'",
        ),
        (
            {},
            {"feature_columns": ["ages"]},
            r"^feature_columns: no column 'ages' .* did you mean 'age'",
        ),
        ({}, {"drop_columns": ["age", "dose", "ward"]}, r"no feature column is left"),
        (
            {"ill": np.linspace(0, 1, ROWS)},
            {},
            r"label column 'ill': nearly all of the 40 rows have different labels",
        ),
        (
            {"ill": pa.array([[1]] * ROWS)},
            {},
            r"label column 'ill': holds list<.*>; expected whole numbers or words",
        ),
        ({"ill": [None, "a"] * 20}, {}, r"label column 'ill': row 1 has no value"),
        (
            {"ill": ["a"] * ROWS},
            {},
            r"label column 'ill': all public rows have the same class, 'a'",
        ),
        (
            {"ill": np.arange(ROWS)},
            {},
            r"label column 'ill': nearly all of the 40 rows have different labels",
        ),
        ({"hospital": [None, "a"] * 20}, {}, r"client column 'hospital': row 1 has no value"),
        (
            {"ward": pa.array([0] * ROWS, pa.time32("s"))},
            {},
            r"feature column 'ward': holds time32\[ms\]; expected",
        ),
        ({"ward": [None] * ROWS}, {"missing": "drop"}, r"there are no rows; check"),
        ({"dose": [float("inf")] * ROWS}, {}, r"hold NaN or infinite values; remove them"),
    ],
)
def test_unusable_columns_are_refused_with_place_and_cure(tmp_path, changes, keys, message):
    path = write(tmp_path / "a.parquet", table(**changes), "parquet")
    with pytest.raises(DataError, match=message):
        load(ask(path, **keys), 0)


def test_too_many_words_are_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("name,ill\n" + "".join(f"n{i},{i % 2}\n" for i in range(200)))
    with pytest.raises(DataError, match=r"it has more than 100 different words"):
        load(ask(path, "csv", client_column=None, public_share=0.7), 0)


def test_words_of_private_rows_do_not_decide_whether_a_column_can_be_coded(tmp_path):
    """Each private row has a word of its own: whether there are few or many of them must make no difference."""
    public = "".join(f"open,{'ab'[i % 2]},{i % 2}\n" for i in range(20))
    shapes = set()
    for count in (20, 300):
        private = "".join(f"closed,secret{i},{i % 2}\n" for i in range(count))
        path = tmp_path / "a.csv"
        path.write_text("who,name,ill\n" + public + private)
        keys = {"client_column": "who", "public_share": None, "public_clients": ("open",)}
        shapes.add(load(ask(path, "csv", **keys), 0).example_shape)
    assert shapes == {(2,)}


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_missing_and_corrupt_files_are_named(tmp_path, kind):
    with pytest.raises(DataError, match=rf"no such path '.*nowhere\.{kind}'"):
        load(ask(tmp_path / f"nowhere.{kind}", kind), 0)
    with pytest.raises(DataError, match=rf"no file '.*\*\.{kind}'"):
        load(ask(tmp_path, kind), 0)
    file = tmp_path / f"a.{kind}"
    for broken in (b"", b'a,ill\n1,2\n1,2,3\n"', bytes(range(256))):
        file.write_bytes(broken)
        with pytest.raises(DataError, match=rf"a\.{kind}'"):
            load(ask(file, kind), 0)


def test_files_that_do_not_fit_together_are_named(tmp_path):
    write(tmp_path / "a.parquet", table(), "parquet")
    write(tmp_path / "b.parquet", table(age=["old"] * ROWS), "parquet")
    with pytest.raises(
        DataError,
        match=r"'.*a.parquet': the 2 files have columns of different types \(.*age",
    ):
        load(ask(tmp_path), 0)
