"""`predict` on texts, recordings and images: the inputs of the training, and what comes next."""

import json
import random
import shutil
import wave

import numpy as np
import pytest
import torch
from PIL import Image

import fedpress
from fedpress import storage
from fedpress.data import FederatedData, Preparation
from fedpress.data.preparation_parts import TextPart
from fedpress.data.text_settings import TextSettings
from fedpress.errors import FedpressError
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline.start import load_data
from tests.harness import finish

pytestmark = pytest.mark.recipe

END = """
[[stage]]
kind = "train"
epochs = 1
[[stage]]
kind = "export"
"""
DATA = """
name = "files"
[data]
source = "{source}"
path = "{path}"
public_clients = ["open"]
test_clients = ["cleo"]
validation = 0
"""
READER = """
from torch import nn

class Reader(nn.Module):
    def __init__(self, num_classes=32):
        super().__init__()
        self.embed = nn.Embedding(num_classes, 4)
        self.read = nn.GRU(4, 8, batch_first=True)
        self.head = nn.Linear(8, num_classes)

    def forward(self, tokens):
        states, _ = self.read(self.embed(tokens))
        return self.head(states).transpose(1, 2)
"""


def outputs_of_training(run):
    """The oracle: the outputs for the test examples as the training made them."""
    data = load_data(recipes.load((run / "recipe.toml").read_text()))
    _, model = storage.load(run)
    with torch.no_grad():
        return data, model.eval()(data.preprocess(data.test.x))


@pytest.fixture(scope="module", params=["characters", "words"])
def plays(request, tmp_path_factory):
    """A language model on three authors; the test author writes words that the public one knows."""
    place = tmp_path_factory.mktemp("plays")
    chance = random.Random(0)
    (place / "texts").mkdir()
    for author in ("open", "anna", "cleo"):
        lines = [chance.choice(["the king sleeps.", "a fool sings."]) for _ in range(40)]
        (place / "texts" / f"{author}.txt").write_text("\n".join(lines))
    (place / f"reader_of_{request.param}.py").write_text(READER)
    data = DATA.format(source="text", path=(place / "texts").as_posix())
    data += f'[data.text]\ntokens = "{request.param}"\nlength = 12\n'
    model = f'[model]\narchitecture = "reader_of_{request.param}:Reader"\n'
    size = {"characters": 17, "words": 8}[request.param]
    model += f"arguments = {{ num_classes = {size} }}\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(place))
        finish(data + model + END, place / "run")
        yield place / "run", place / "texts" / "cleo.txt", request.param


@pytest.mark.parametrize("model", [".", "artifacts/model.onnx"])
def test_a_text_goes_on_as_the_network_says_after_its_last_token(plays, model):
    run, _, tokens = plays
    data, wanted = outputs_of_training(run)
    names = data.preparation.part.vocabulary
    between = "" if tokens == "characters" else " "
    texts = [between.join(names[token] for token in row) for row in data.test.x[:5].tolist()]
    found = fedpress.predict(run / model, texts, tokens=3)
    torch.testing.assert_close(found.outputs, wanted[:5, :, -1], atol=1e-5, rtol=0)
    # The twin of the continuation: one text, one token after another.
    network = storage.load(run)[1].eval()
    row, words = data.test.x[:1], []
    for _ in range(3):
        with torch.no_grad():
            token = int(network(row)[0, :, -1].argmax())
        words.append(names[token])
        row = torch.cat([row[:, 1:], torch.tensor([[token]])], 1)
    header, table = found.table()
    assert header == ["row", "next", "probability", "continuation"]
    assert table[0][1] == words[0] == found.labels[0]
    assert table[0][2] == pytest.approx(float(wanted[0, :, -1].softmax(0).max()), abs=1e-5)
    assert table[0][3] == between.join(words)


def test_a_file_a_folder_and_a_table_are_read(plays, tmp_path, shell):
    run, file, _ = plays
    wanted = fedpress.predict(run, [file.read_text()]).outputs
    (tmp_path / "t.csv").write_text('id,text\n1,"' + file.read_text() + '"\n')
    for given in (file, tmp_path / "t.csv"):
        assert torch.equal(fedpress.predict(run, given).outputs, wanted)
    assert fedpress.predict(run, tmp_path / "t.csv").ignored == ("id",)
    folder = fedpress.predict(run, file.parent)
    assert folder.examples["file"] == ["anna.txt", "cleo.txt", "open.txt"]
    said = shell("predict", run, file, "--tokens", "2")
    assert said.code == 0
    assert said.out.startswith("file,next,probability,continuation\ncleo.txt,")


def test_a_short_text_is_read_from_its_first_token(plays):
    run, _, _ = plays
    data = load_data(recipes.load((run / "recipe.toml").read_text()))
    token = data.preparation.part.vocabulary.index("a")
    with torch.no_grad():
        wanted = storage.load(run)[1].eval()(torch.tensor([[token]]))[:, :, 0]
    torch.testing.assert_close(fedpress.predict(run, ["a"]).outputs, wanted)


def test_texts_that_cannot_be_read_are_refused(plays, tmp_path, shell):
    run, _, tokens = plays
    wrong = {"characters": "'#'", "words": "'queen'"}[tokens]
    (tmp_path / "a.txt").write_text(f"a fool sings.\nthe {wrong.strip(chr(39))}")
    said = rf"line 2 of .*a.txt': the {tokens[:-1]} {wrong} is not in the vocabulary"
    with pytest.raises(FedpressError, match=said):
        fedpress.predict(run, tmp_path / "a.txt")
    answer = shell("predict", run, tmp_path / "a.txt")
    assert answer.code == 2
    assert "--unknown zeros" in answer.err
    assert shell("predict", run, tmp_path / "a.txt", "--unknown", "zeros").code == 0
    with pytest.raises(FedpressError, match=r"texts\[1\]: it has no token"):
        fedpress.predict(run, ["a", ""])
    with pytest.raises(FedpressError, match="99 is the number of no token: the vocabulary has"):
        fedpress.predict(run, torch.tensor([[1, 99]]))
    with pytest.raises(FedpressError, match="have no token; give int64"):
        fedpress.predict(run, torch.zeros(1, 0, dtype=torch.int64))
    with pytest.raises(FedpressError, match="tokens: got 0, expected a number above 0"):
        fedpress.predict(run, ["a"], tokens=0)


def test_texts_are_classified_by_a_data_set_that_says_its_vocabulary(tmp_path):
    part = TextPart(TextSettings(tokens="words", length=3), ("<unknown>", "good", "bad", "very"))
    x = torch.tensor([[1, 0, 0], [2, 0, 0], [3, 1, 0], [3, 2, 0]])
    arrays = fedpress.data.dataset.Arrays(x, torch.tensor([1, 0, 1, 0]))
    data = FederatedData(
        name="moods",
        clients={"a": arrays},
        public=arrays,
        validation=arrays,
        test=arrays,
        num_classes=2,
        class_names=("sad", "glad"),
        preparation=Preparation((), part=part),
    )

    net = torch.nn.Sequential(torch.nn.Embedding(4, 2), torch.nn.Flatten(), torch.nn.Linear(6, 2))
    trained = fedpress.train(net, data=data, epochs=1)
    found = fedpress.predict(trained, ["very good", "bad"])
    with torch.no_grad():
        wanted = trained.model.eval()(torch.tensor([[3, 1, 0], [2, 0, 0]]))
    torch.testing.assert_close(found.outputs, wanted)
    assert found.table()[0] == ["row", "class", "probability of sad", "probability of glad"]


def tone(path, pitch, rate=8000):
    path.parent.mkdir(parents=True, exist_ok=True)
    sound = 0.3 * np.sin(2 * np.pi * pitch * np.arange(rate // 4) / rate)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes((sound * 32767).astype("<i2").tobytes())


@pytest.fixture(scope="module")
def tones(tmp_path_factory):
    """Recordings of 16,000 samples per second for a model of 8,000."""
    place = tmp_path_factory.mktemp("tones")
    for at, client in enumerate(("open", "anna", "cleo")):
        for number in range(4):
            tone(place / "wav" / client / "low" / f"{number}.wav", 300 + 20 * number + at, 16_000)
            tone(place / "wav" / client / "up" / f"{number}.wav", 1200 + 20 * number + at, 16_000)
    data = DATA.format(source="audio", path=(place / "wav").as_posix())
    data += (
        "[data.audio]\nsample_rate = 8000\nseconds = 0.2\nmels = 8\nwindow = 0.032\nhop = 0.02\n"
    )
    model = '[model]\narchitecture = "mlp"\narguments = { hidden = [4] }\n'
    finish(data + model + END, place / "run")
    return place / "run", place / "wav" / "cleo"


@pytest.mark.parametrize("model", [".", "artifacts/model.onnx"])
def test_recordings_become_the_spectrograms_of_the_training(tones, model):
    run, folder = tones
    _, wanted = outputs_of_training(run)
    found = fedpress.predict(run / model, folder)
    torch.testing.assert_close(found.outputs, wanted, atol=1e-5, rtol=0)
    assert found.examples["file"][0] == "low/0.wav"
    one = fedpress.predict(run / model, folder / "up" / "1.wav")
    torch.testing.assert_close(one.outputs[0], wanted[5], atol=1e-5, rtol=0)
    assert one.table()[0] == ["file", "class", "probability of low", "probability of up"]


def test_a_recording_of_another_rate_is_refused_by_one_sentence(tones, tmp_path, shell):
    run, folder = tones
    tone(tmp_path / "a.wav", 500, 44_100)
    answer = shell("predict", run, tmp_path / "a.wav")
    assert answer.code == 2
    assert (
        "it has 44,100 samples per second, the recordings of the training had 16,000" in answer.err
    )
    with pytest.raises(FedpressError, match=r"trained on recordings, and .*give a \.wav file"):
        fedpress.predict(run, [{"age": 3}])
    with pytest.raises(FedpressError, match="no such file or folder; did you mean 'cleo'"):
        fedpress.predict(run, [folder.parent / "cleos"])
    shutil.copy(__file__, tmp_path / "b.wav")
    with pytest.raises(FedpressError, match=r"b\.wav': not a readable WAV file"):
        fedpress.predict(run, tmp_path / "b.wav")


def photos(place, size):
    for client in ("open", "anna", "cleo"):
        for label, grey in (("dark", 40), ("light", 200)):
            folder = place / client / label
            folder.mkdir(parents=True)
            for number in range(3):
                Image.new("RGB", size, (grey, grey + number, 90)).save(folder / f"{number}.png")


@pytest.fixture(scope="module", params=["", "image_size = 6\n"])
def pictures(request, tmp_path_factory):
    place = tmp_path_factory.mktemp("photos")
    photos(place / "photos", (12, 8))
    data = DATA.format(source="folders", path=(place / "photos").as_posix()) + request.param
    finish(
        data + '[model]\narchitecture = "mlp"\narguments = { hidden = [4] }\n' + END, place / "run"
    )
    return place / "run", place / "photos" / "cleo", bool(request.param)


@pytest.mark.parametrize("model", [".", "artifacts/model.onnx"])
def test_images_become_those_of_the_training(pictures, model, tmp_path):
    run, folder, resized = pictures
    _, wanted = outputs_of_training(run)
    found = fedpress.predict(run / model, folder)
    torch.testing.assert_close(found.outputs, wanted, atol=1e-5, rtol=0)
    one = fedpress.predict(run / model, folder / "light" / "0.png")
    torch.testing.assert_close(one.outputs[0], wanted[3], atol=1e-5, rtol=0)
    Image.new("RGBA", (9, 9)).save(tmp_path / "a.png")
    if resized:
        assert len(fedpress.predict(run / model, tmp_path / "a.png")) == 1
    else:
        with pytest.raises(FedpressError, match=r"a.png': an image of 9x9 .* takes 8x12; resize"):
            fedpress.predict(run / model, tmp_path / "a.png")


def test_every_part_is_read_back_and_a_damaged_one_is_refused(plays, tones, pictures, tmp_path):
    for run in (plays[0], tones[0], pictures[0]):
        page = json.loads((run / "preparation.json").read_text())
        assert Preparation.read(run / "preparation.json").to_json() == page
        assert page["version"] == 2
        (kind,) = {"text", "audio", "image"} & {*page}
        more, none = {kind: {**page[kind], "more": 1}}, {kind: {}}
        for broken, said in ((more, "it has a step 'more' that"), (none, r"corrupt \(")):
            (tmp_path / "p.json").write_text(json.dumps(page | broken))
            with pytest.raises(FedpressError, match=rf"p\.json': {said}"):
                Preparation.read(tmp_path / "p.json")
