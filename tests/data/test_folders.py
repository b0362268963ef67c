from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedpress.data import DataSettings, load
from fedpress.errors import DataError


def write(root: Path, *, size: int = 4) -> Path:
    """Two clients with 10 images each; the pixels of an image tell its client and label."""
    for c, client in enumerate(("ann", "bob")):
        for k, label in enumerate(("cat", "dog")):
            folder = root / client / label
            folder.mkdir(parents=True)
            for i in range(5):
                Image.fromarray(np.full((size, size), 100 * c + 50 * k, np.uint8)).save(
                    folder / f"{i}.png"
                )
    return root


def ask(path: Path, **keys) -> DataSettings:
    return DataSettings(
        source="folders",
        path=path,
        **{"test_share": 0.2, "validation": 0, "public_words": ["label"], **keys},
    )


def test_images_belong_to_the_client_and_label_of_their_folders(tmp_path):
    data = load(ask(write(tmp_path / "zoo")), 0)
    assert (data.name, data.class_names, data.example_shape) == ("zoo", ("cat", "dog"), (1, 4, 4))
    for c, name in enumerate(("ann", "bob")):
        own = data.clients[name]
        assert len(own) == 8
        assert own.x[:, 0, 0, 0].tolist() == (100 * c + 50 * own.y).tolist()


def test_other_files_are_passed_over_and_other_sizes_resized(tmp_path):
    root = write(tmp_path)
    (root / "notes.txt").write_text("x")
    (root / "ann" / "cat" / "notes.txt").write_text("x")
    (root / ".hidden").mkdir()
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(root / "ann" / "cat" / "big.png")
    with pytest.raises(
        DataError, match=r"big.png': an image of 9x9 pixels, but the first has 4x4; set image_size"
    ):
        load(ask(root), 0)
    assert load(ask(root, image_size=6), 0).example_shape == (1, 6, 6)


@pytest.mark.parametrize("private", ["L", "RGB"])
@pytest.mark.parametrize("public", ["L", "RGB"])
def test_public_images_decide_how_many_channels_there_are(tmp_path, private, public):
    """The first image is private: whether it is grey must not show in the shape of the input."""
    root = write(tmp_path)
    for client, mode in (("ann", private), ("bob", public)):
        for file in (root / client).rglob("*.png"):
            Image.open(file).convert(mode).save(file)
    data = load(ask(root, public_clients=["bob"], public_words=[], test_clients=[]), 0)
    assert data.example_shape == (1 if public == "L" else 3, 4, 4)
    assert data.clients["ann"].x.unique().tolist() == [0, 50]


def test_private_images_are_not_copied_to_the_cache(tmp_path, cache_folder):
    load(ask(write(tmp_path / "zoo")), 0)
    assert not cache_folder.exists()


def test_missing_empty_and_corrupt_folders_are_named(tmp_path):
    with pytest.raises(DataError, match=r"no folder '.*nowhere'"):
        load(ask(tmp_path / "nowhere"), 0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no folders; expected client/label/image.png"):
        load(ask(tmp_path / "empty"), 0)
    root = write(tmp_path / "zoo")
    (root / "cleo" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match=r"client 'cleo' has no images"):
        load(ask(root), 0)
    (root / "cleo" / "cat" / "1.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"cleo/\*/1.png': not a readable image"):
        load(ask(root), 0)
