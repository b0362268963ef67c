import io
import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from fedpress.data import DataSettings, load
from fedpress.errors import DataError

LABEL = {"names": ["zebra", "ant"], "_type": "ClassLabel"}


def write_split(folder, content, features, files=2):
    """Writes a split as `Dataset.save_to_disk` of datasets 3 does: streams beside two lists."""
    folder.mkdir(parents=True)
    names = []
    rows = -(-content.num_rows // files)
    for at in range(files):
        names.append(f"data-{at:05d}-of-{files:05d}.arrow")
        part = content.slice(at * rows, rows)
        with (
            pa.OSFile(str(folder / names[-1]), "wb") as file,
            pa.ipc.new_stream(file, part.schema) as writer,
        ):
            writer.write_table(part)
    state = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": "0123456789abcdef",
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / "state.json").write_text(json.dumps(state))
    info = {"citation": "", "description": "", "features": features, "homepage": "", "license": ""}
    (folder / "dataset_info.json").write_text(json.dumps(info))


def numbers(rows, start=0):
    return pa.table(
        {
            "size": np.arange(start, start + rows, dtype=np.float64),
            "who": ["ann", "bob"] * (rows // 2),
            "label": pa.array([0, 1, 1, 0] * (rows // 4), pa.int64()),
        }
    )


FEATURES = {
    "size": {"dtype": "float64", "_type": "Value"},
    "who": {"dtype": "string", "_type": "Value"},
    "label": LABEL,
}


def write_splits(root, **tables):
    for name, content in tables.items():
        write_split(root / name, content, FEATURES)
    (root / "dataset_dict.json").write_text(json.dumps({"splits": list(tables)}))
    return root


def ask(path, **keys):
    keys = {"client_column": "who", "public_share": 0.5, "validation": 2, **keys}
    return DataSettings(source="huggingface", path=path, mean=[0], std=[1], **keys)


def sizes(*parts):
    return sorted(torch.cat([part.x for part in parts]).flatten().int().tolist())


def test_class_numbers_become_the_names_of_classes(tmp_path):
    write_split(tmp_path / "d", numbers(40), FEATURES)
    data = load(ask(tmp_path / "d"), 0)
    assert data.class_names == ("ant", "zebra")
    for part in (data.public, data.test, *data.clients.values()):
        # The rows 0, 3, 4, 7, ... are of class 0, which is named zebra.
        is_zebra = (part.x.flatten().int() % 4 == 0) | (part.x.flatten().int() % 4 == 3)
        assert torch.equal(part.y == 1, is_zebra)
    listed = load(ask(tmp_path / "d", classes=["zebra", "ant"]), 0)
    assert listed.class_names == ("zebra", "ant")


def test_the_split_test_is_the_test_set_and_others_are_not_read(tmp_path):
    root = write_splits(
        tmp_path / "d", train=numbers(40), test=numbers(8, 1000), validation=numbers(8, 5000)
    )
    data = load(ask(root), 0)
    assert sizes(data.test) == list(range(1000, 1008))
    others = (data.public, data.validation, *data.clients.values())
    assert sizes(*others) == list(range(40))
    # Rows of a public client that are for testing stay for testing.
    data = load(ask(root, public_share=None, public_clients=["ann"]), 0)
    assert sizes(data.test) == list(range(1000, 1008))


def test_a_split_may_be_named(tmp_path):
    root = write_splits(tmp_path / "d", train=numbers(40), test=numbers(40, 1000))
    data = load(ask(root, table="test"), 0)
    parts = (data.public, data.validation, data.test, *data.clients.values())
    assert sizes(*parts) == list(range(1000, 1040))


def test_rows_without_a_secret_label_are_missing(tmp_path):
    content = numbers(40).set_column(2, "label", pa.array([-1] + [0, 1, 1] * 13))
    write_split(tmp_path / "d", content, FEATURES)
    with pytest.raises(DataError, match="label column 'label': row 1 has no value"):
        load(ask(tmp_path / "d"), 0)
    data = load(ask(tmp_path / "d", missing="drop"), 0)
    parts = (data.public, data.validation, data.test, *data.clients.values())
    assert sizes(*parts) == list(range(1, 40))


def test_images_are_decoded(tmp_path):
    def image(value):
        file = io.BytesIO()
        Image.fromarray(np.full((4, 4), value, np.uint8)).save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}

    content = pa.table({"image": [image(i) for i in range(20)], "label": [0, 1] * 10})
    write_split(tmp_path / "d", content, {"image": {"_type": "Image"}, "label": LABEL})
    settings = DataSettings(
        source="huggingface", path=tmp_path / "d", num_clients=2, public_share=0.5
    )
    data = load(settings, 0)
    assert data.example_shape == (1, 4, 4)
    for part in data.clients.values():
        assert part.y.tolist() == (1 - part.x[:, 0, 0, 0] % 2).tolist()


def test_a_folder_that_was_not_saved_so_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no folder '.*no'; check the path"):
        load(ask(tmp_path / "no"), 0)
    with pytest.raises(DataError, match=r"state.json'; give a folder that save_to_disk"):
        load(ask(tmp_path), 0)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("state.json", "{", r"state.json': cannot be read .*; write the data set anew"),
        ("state.json", "{}", r"state.json': it lists no Arrow file"),
        ("dataset_info.json", "[", r"dataset_info.json': cannot be read"),
        ("data-00000-of-00002.arrow", "x", "data-00000-of-00002.arrow': not a readable Arrow"),
        (
            "dataset_info.json",
            json.dumps({"features": {"label": {"names": ["a"], "_type": "ClassLabel"}}}),
            "column 'label': it holds class 1, but dataset_info.json names 1 classes",
        ),
    ],
)
def test_a_damaged_file_is_refused_by_its_name(tmp_path, file, text, message):
    write_split(tmp_path / "d", numbers(40), FEATURES)
    (tmp_path / "d" / file).write_text(text)
    with pytest.raises(DataError, match=message):
        load(ask(tmp_path / "d"), 0)


def test_a_missing_split_is_refused(tmp_path):
    root = write_splits(tmp_path / "d", train=numbers(40))
    with pytest.raises(DataError, match=r"table: no split 'trian' .* did you mean 'train'"):
        load(ask(root, table="trian"), 0)
    write_split(tmp_path / "e", numbers(40), FEATURES)
    with pytest.raises(DataError, match=r"table: '.*e' has no splits; leave table out"):
        load(ask(tmp_path / "e", table="train"), 0)
    (root / "dataset_dict.json").write_text('{"splits": ["other"]}')
    with pytest.raises(DataError, match="no split 'train' in"):
        load(ask(root), 0)


def test_a_file_name_does_not_lead_out_of_the_folder(tmp_path):
    write_split(tmp_path / "d", numbers(40), FEATURES, files=1)
    (tmp_path / "d" / "data-00000-of-00001.arrow").rename(tmp_path / "secret.arrow")
    state = {"_data_files": [{"filename": "../secret.arrow"}]}
    (tmp_path / "d" / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match=r"d/secret.arrow': not a readable Arrow file"):
        load(ask(tmp_path / "d"), 0)
