"""Files and folders of other programs are told for what they are, and nothing in them runs."""

import json
import pickle
import zipfile
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fedpress import storage
from fedpress.errors import ModelError
from fedpress.models.foreign import identify
from fedpress.models.weights import load_weights_


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def net():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()


def torchscript(path):
    torch.jit.script(net()).save(str(path))


def program(path):
    torch.export.save(torch.export.export(net(), (torch.zeros(1, 4),)), path)


def keras(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", "{}")
        archive.writestr("model.weights.h5", b"x")


def plain_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "x")


def checkpoint(path):
    optimizer = torch.optim.Adam(net().parameters()).state_dict()
    torch.save({"epoch": 3, "state_dict": net().state_dict(), "optimizer": optimizer}, path)


def onnx_file(path):
    import onnx

    graph = onnx.helper.make_graph([], "g", [], [])
    path.write_bytes(onnx.helper.make_model(graph, producer_name="x").SerializeToString())


def starts_with(head, at=0):
    return lambda path: path.write_bytes(bytes(at) + head + bytes(64))


FILES = {
    "state.pt": (lambda path: torch.save(net().state_dict(), path), "a state dict"),
    "old.pth": (
        lambda path: torch.save(net().state_dict(), path, _use_new_zipfile_serialization=False),
        "a state dict",
    ),
    "checkpoint.ckpt": (checkpoint, "a state dict, or a checkpoint that holds one"),
    "weights.safetensors": (
        lambda path: save_file(net().state_dict(), path),
        "a state dict (safetensors)",
    ),
    "module.pt": (
        lambda path: torch.save(net(), path),
        "a pickled object of classes such as torch.nn",
    ),
    "old-module.pt": (
        lambda path: torch.save(net(), path, _use_new_zipfile_serialization=False),
        "a pickled object of classes such as torch.nn",
    ),
    "module.pkl": (
        lambda path: path.write_bytes(pickle.dumps(net())),
        "a pickled object of classes such as torch.nn",
    ),
    "plain.pkl": (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "a Python pickle"),
    "script.pt": (torchscript, "a TorchScript archive"),
    "program.pt2": (program, "a program of torch.export"),
    "model.keras": (keras, "a Keras archive"),
    "model.h5": (starts_with(b"\x89HDF\r\n\x1a\n"), "an HDF5 file"),
    "model.onnx": (onnx_file, "an ONNX file"),
    "onnx-without-its-ending": (onnx_file, "an ONNX file"),
    "model.tflite": (starts_with(b"TFL3", 4), "a LiteRT"),
    "model.pte": (starts_with(b"ET12", 4), "an ExecuTorch program"),
    "model.gguf": (starts_with(b"GGUF"), "a GGUF file"),
    "model.zip": (plain_zip, "a zip archive; unpack it"),
    "model.npy": (starts_with(b"\x93NUMPY"), "a numpy array"),
    "model.tar.gz": (starts_with(b"\x1f\x8b"), "a gzip file"),
    "model.xml": (
        lambda path: path.write_text('<?xml version="1.0"?><net name="m">'),
        "an OpenVINO file",
    ),
    "net.py": (lambda path: path.write_text("import torch"), "a Python file"),
    "recipe.toml": (lambda path: path.write_text("seed = 1"), "a recipe, not a model"),
    "pointer.safetensors": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
        "Git LFS",
    ),
    "empty.pt": (lambda path: path.write_bytes(b""), "an empty file"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_program_is_named_with_the_way_in(tmp_path, name):
    write, what = FILES[name]
    write(tmp_path / name)
    with pytest.raises(ModelError) as caught:
        storage.load(tmp_path / name)
    said = str(caught.value)
    assert said.startswith(
        f"model: '{tmp_path / name}' is {what}" if "LFS" not in what else "model: "
    )
    assert what in said
    assert "; " in said
    assert "damaged" not in said


@pytest.mark.parametrize("protocol", range(6))
def test_nothing_is_unpickled_to_find_out(tmp_path, protocol):
    mark = tmp_path / "mark"
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(Trap(mark), protocol=protocol))
    torch.save({"weight": Trap(mark)}, tmp_path / "b.pt")
    torch.save({"weight": Trap(mark)}, tmp_path / "c.pt", _use_new_zipfile_serialization=False)
    for name in ("a.pkl", "b.pt", "c.pt"):
        identify(tmp_path / name)
        with pytest.raises(ModelError):
            storage.load(tmp_path / name)
        with pytest.raises(ModelError):
            load_weights_(net(), tmp_path / name)
    assert not mark.exists()


def hub(folder):
    (folder / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"]}))
    (folder / "model.safetensors").write_bytes(b"x")


FOLDERS = {
    "hub": (
        hub,
        r"a model of the Hugging Face hub \(GPT2LMHeadModel, .*transformers.GPT2LMHeadModel.from_pretrained",
    ),
    "tensorflow": (
        lambda folder: (folder / "saved_model.pb").write_bytes(b""),
        "a TensorFlow SavedModel",
    ),
    "weights": (
        lambda folder: (folder / "w.pt").write_bytes(b""),
        r"the file of weights 'w.pt'.*checkpoint=.*w.pt",
    ),
    "sweep": (
        lambda folder: (folder / "sweep.json").write_text("{}"),
        "the folder of a sweep; give one of the runs",
    ),
    "empty": (lambda folder: None, "an empty folder"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_another_program_is_named_with_the_way_in(tmp_path, name):
    fill, what = FOLDERS[name]
    fill(tmp_path)
    with pytest.raises(ModelError, match=what):
        storage.load(tmp_path)


def test_the_way_in_for_a_state_dict_works(tmp_path, shell):
    torch.save(OrderedDict(net().state_dict()), tmp_path / "my weights.pt")
    (tmp_path / "own_net.py").write_text(
        "from torch import nn\n\n\ndef build():\n"
        "    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))\n"
    )
    said = shell("prune", tmp_path / "my weights.pt", "keep_params=0.5")
    assert said.code == 2
    way = said.err.partition("package.module:function ")[2].strip()
    assert way == f"and --checkpoint '{tmp_path / 'my weights.pt'}'"
    keys = ("density=0.5", "keep_first=false")
    said = shell(
        "sparsify",
        "own_net:build",
        "--checkpoint",
        tmp_path / "my weights.pt",
        "--input",
        "4",
        *keys,
    )
    assert said.code == 0, said.err
    for name in ("state.pt", "module.pt"):
        FILES[name][0](tmp_path / name)
    said = shell(
        "sparsify", "own_net:build", "--checkpoint", tmp_path / "module.pt", "--input", "4", *keys
    )
    assert said.code == 2
    assert "is a pickled object" in said.err


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.txt", b"hello", "no model: it is text"),
        ("a.pt", b"<!DOCTYPE html><html>404</html>", "no model: it is text"),
        (
            "a.png",
            b"\x89PNG\r\n\x1a\n" + bytes(40),
            "no model: it is of a kind that fedpress does not know",
        ),
        ("a.pt", b"PK\x03\x04" + bytes(400), "a damaged archive"),
        ("spec.json", b"{}", "a part of a model's folder; give the folder"),
        ("config.json", b"{}", "a folder without a model"),
    ],
)
def test_what_is_no_model_at_all_is_not_called_a_damaged_one(tmp_path, name, content, what):
    (tmp_path / name).write_bytes(content)
    path = tmp_path if name == "config.json" else tmp_path / name
    with pytest.raises(ModelError) as caught:
        storage.load(path)
    assert f"'{path}' is {what}" in str(caught.value)
    assert "packed model is damaged" not in str(caught.value)


def test_a_damaged_packed_file_is_still_called_one(tmp_path):
    (tmp_path / "a.packed.safetensors").write_bytes(bytes(64))
    with pytest.raises(ModelError, match="this packed model is damaged"):
        storage.load(tmp_path / "a.packed.safetensors")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.net."])
def test_weights_under_the_name_of_a_wrapper_are_taken(tmp_path, prefix):
    torch.save(
        {"state_dict": {prefix + k: v for k, v in net().state_dict().items()}}, tmp_path / "w.pt"
    )
    model = net()
    nn.init.zeros_(model[0].weight)
    load_weights_(model, tmp_path / "w.pt")
    saved = torch.load(tmp_path / "w.pt")["state_dict"]
    assert torch.equal(model[0].weight, saved[f"{prefix}0.weight"])
    with pytest.raises(ModelError, match="do not fit the model"):
        load_weights_(nn.Linear(3, 3), tmp_path / "w.pt")
