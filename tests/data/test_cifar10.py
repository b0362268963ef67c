import io
import os
import pickle
import re
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fedpress.data import DataSettings, cifar10, cifar10_archive, cifar10_parquet, download, load
from fedpress.errors import DataError

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (60, 3, 32, 32), dtype=np.uint8)
LABELS = np.arange(60) % 10


def write_parquet(folder: Path) -> Path:
    """50 training images in two files and 10 for testing, in the layout of the hub."""
    folder.mkdir(parents=True)
    for name, rows in {
        "train-00000-of-00002": range(0, 20),
        "train-00001-of-00002": range(20, 50),
        "test-00000-of-00001": range(50, 60),
    }.items():
        images = []
        for row in rows:
            buffer = io.BytesIO()
            Image.fromarray(PIXELS[row].transpose(1, 2, 0)).save(buffer, "PNG")
            images.append({"bytes": buffer.getvalue(), "path": None})
        pq.write_table(
            pa.table({"img": images, "label": LABELS[list(rows)]}), folder / f"{name}.parquet"
        )
    return folder


def write_batches(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for i, name in enumerate(
        [name for names in cifar10_archive.BATCHES.values() for name in names]
    ):
        rows = slice(10 * i, 10 * i + 10)
        batch = {
            b"data": PIXELS[rows].reshape(10, -1),
            b"labels": LABELS[rows].tolist(),
            b"batch_label": name.encode(),
        }
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return folder


def write_archive(path: Path, monkeypatch: pytest.MonkeyPatch, *, official: bool = True) -> Path:
    batches = write_batches(path.parent / "unpacked" / cifar10_archive.FOLDER)
    with tarfile.open(path, "w:gz") as archive:
        archive.add(batches, arcname=cifar10_archive.FOLDER)
    if official:  # the published archive has 170 MB, so a small one takes its place
        monkeypatch.setattr(cifar10_archive, "MD5", download.md5_of(path))
    return path


def ask(path: Path | None, **keys) -> DataSettings:
    return DataSettings(
        source="cifar10", path=path, num_clients=2, examples_per_client=10, validation=5, **keys
    )


def test_every_layout_gives_the_same_clients_for_the_same_seed(tmp_path, monkeypatch):
    parquet = load(ask(write_parquet(tmp_path / "hub" / "cifar10").parent), 0)
    batches = load(ask(write_batches(tmp_path / "old" / cifar10_archive.FOLDER).parent), 0)
    archive = load(ask(write_archive(tmp_path / cifar10_archive.ARCHIVE, monkeypatch)), 0)
    assert parquet.describe() == batches.describe() == archive.describe()
    for other in (batches, archive):
        for name, own in parquet.clients.items():
            assert torch.equal(own.x, other.clients[name].x)
            assert torch.equal(own.y, other.clients[name].y)
        assert torch.equal(parquet.test.x, other.test.x)


def test_the_images_are_those_that_were_written(tmp_path):
    data = load(ask(write_parquet(tmp_path / "hub")), 0)
    private = [*data.clients.values()]
    x = torch.cat([part.x for part in (*private, data.public, data.validation)])
    y = torch.cat([part.y for part in (*private, data.public, data.validation)])
    found = {image.numpy().tobytes(): int(label) for image, label in zip(x, y, strict=True)}
    assert found == {
        image.tobytes(): int(label) for image, label in zip(PIXELS[:50], LABELS[:50], strict=True)
    }


def test_the_second_load_comes_from_the_cache(tmp_path, cache_folder, monkeypatch):
    folder = write_parquet(tmp_path / "hub")
    first = load(ask(folder), 0)
    assert len(list((cache_folder / "decoded").iterdir())) == 1
    monkeypatch.delattr(cifar10_parquet, "read")
    assert torch.equal(load(ask(folder), 0).public.x, first.public.x)


def test_a_download_is_kept_in_the_cache_folder(tmp_path, cache_folder, monkeypatch):
    archive = write_archive(tmp_path / "published.tar.gz", monkeypatch)
    monkeypatch.setattr(cifar10_archive, "URL", archive.as_uri())
    data = load(ask(None), 0)
    assert (cache_folder / cifar10_archive.ARCHIVE).read_bytes() == archive.read_bytes()
    archive.unlink()
    assert load(ask(None), 0).describe() == data.describe()


def test_without_path_and_download_the_cure_is_told():
    with pytest.raises(
        DataError,
        match=r"no path is given and download is off; set path, or put https://www.cs.toronto",
    ):
        load(ask(None, download=False), 0)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "no such path '.*nowhere'; check the path"),
        (".", "neither train-.*parquet nor cifar-10-python.tar.gz nor"),
    ],
)
def test_a_path_without_the_data_is_named(tmp_path, path, message):
    with pytest.raises(DataError, match=message):
        load(ask(tmp_path / path), 0)


def test_a_missing_parquet_file_of_several_is_named(tmp_path):
    folder = write_parquet(tmp_path / "hub")
    (folder / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(
        DataError, match=r"train-00001-of-00002.parquet' is missing; copy the whole folder"
    ):
        load(ask(folder), 0)
    (folder / "test-00000-of-00001.parquet").unlink()
    (folder / "train-00000-of-00002.parquet").rename(folder / "train-00000-of-00001.parquet")
    with pytest.raises(DataError, match=r"test-\*.parquet' is missing"):
        load(ask(folder), 0)


def test_a_corrupt_parquet_file_is_named(tmp_path):
    file = write_parquet(tmp_path / "hub") / "train-00001-of-00002.parquet"
    content = file.read_bytes()
    for broken in (
        content[:1000],
        b"",
        b"PAR1 no PAR1",
        content[:2000] + bytes(5000) + content[7000:],
    ):
        file.write_bytes(broken)
        with pytest.raises(DataError, match=re.escape(f"'{file}'")):
            load(ask(file.parent), 0)


def test_a_parquet_file_of_other_data_is_refused(tmp_path):
    folder = write_parquet(tmp_path / "hub")
    pq.write_table(pa.table({"image": [1], "label": [2]}), folder / "test-00000-of-00001.parquet")
    with pytest.raises(
        DataError, match=r"no column 'img' \(it has image, label\); is this CIFAR-10"
    ):
        load(ask(folder), 0)


def test_too_few_images_for_the_clients_are_counted(tmp_path):
    settings = ask(write_parquet(tmp_path / "hub")).model_copy(update={"examples_per_client": 6000})
    with pytest.raises(
        DataError,
        match=r"asked for 2 clients of 6000 examples = 12000 examples, but only 50 are left",
    ):
        load(settings, 0)


def test_an_archive_with_another_checksum_is_refused(tmp_path, monkeypatch):
    archive = write_archive(tmp_path / cifar10_archive.ARCHIVE, monkeypatch, official=False)
    with pytest.raises(
        DataError,
        match=f"md5 {download.md5_of(archive)}, expected c58f30108f718f92721af3bbe74f3473",
    ):
        load(ask(tmp_path), 0)


def test_a_cut_off_archive_is_refused(tmp_path, monkeypatch):
    archive = write_archive(tmp_path / cifar10_archive.ARCHIVE, monkeypatch)
    archive.write_bytes(archive.read_bytes()[:50_000])
    monkeypatch.setattr(cifar10_archive, "MD5", download.md5_of(archive))
    with pytest.raises(DataError, match=r"not a readable archive"):
        load(ask(archive), 0)


def test_a_missing_batch_is_named(tmp_path):
    folder = write_batches(tmp_path / cifar10_archive.FOLDER)
    (folder / "data_batch_3").unlink()
    with pytest.raises(DataError, match=r"data_batch_3' is missing; unpack"):
        load(ask(tmp_path), 0)


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/fedpress-test-was-run",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            pickle.dumps({b"data": Evil()}),
            "asks for posix.system, which is not needed to read data",
        ),
        (pickle.dumps({b"data": PIXELS[:2], b"labels": [1]}, protocol=2), "2 images but 1 labels"),
        (
            pickle.dumps({b"data": PIXELS[:1], b"labels": [10]}, protocol=2),
            "a label is not in 0 to 9",
        ),
        (
            pickle.dumps({b"data": PIXELS[:1].astype(float), b"labels": [1]}, protocol=2),
            "expected a uint8 array in C order",
        ),
        (b"\x80\x02}q", "not a batch of CIFAR-10"),
        (b"", "not a batch of CIFAR-10"),
    ],
)
def test_a_batch_is_read_without_running_what_it_holds(tmp_path, content, message):
    folder = write_batches(tmp_path / cifar10_archive.FOLDER)
    (folder / "data_batch_2").write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        load(ask(folder), 0)
    assert str(folder / "data_batch_2") in str(error.value)
    assert not Path("/tmp/fedpress-test-was-run").exists()


def test_batches_that_python_2_wrote_can_be_read():
    """The bytes that Python 2.7 and numpy 1.6 wrote differ from ours: str keys, and `numpy.core.multiarray`."""
    pixels = PIXELS[0].tobytes()
    content = (
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        b"T\x00\x0c\x00\x00" + pixels + b"tbU\x06labels]K\x07au."
    )
    x, y = cifar10_archive.read_batch(content, "here")
    assert np.array_equal(x[0], PIXELS[0])
    assert y.tolist() == [7]


def real_data() -> Path:
    given = os.environ.get("FEDPRESS_DATA")
    return Path(given) if given else Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.recipe
@pytest.mark.skipif(
    not (real_data() / "cifar10").is_dir(), reason="needs CIFAR-10 in FEDPRESS_DATA"
)
def test_the_reference_experiment_holds_what_it_declares():
    settings = DataSettings(
        source="cifar10", path=real_data(), num_clients=10, examples_per_client=600, validation=2000
    )
    data = load(settings, 0)
    text = data.describe()
    assert (text["private"], text["public"], text["validation"], text["test"]) == (
        6000,
        42000,
        2000,
        10000,
    )
    assert data.test.y.bincount().tolist() == [1000] * 10
    train = torch.cat([part.y for part in (*data.clients.values(), data.public, data.validation)])
    assert train.bincount().tolist() == [5000] * 10
    assert np.allclose(data.preprocess.mean, [0.49140, 0.48216, 0.44653], atol=2e-3)
    assert np.allclose(data.preprocess.std, [0.24703, 0.24349, 0.26159], atol=2e-3)
    assert data.class_names == cifar10.CLASSES
