import os
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from fedpress.data import DataSettings, load
from fedpress.data.text import UNKNOWN
from fedpress.errors import DataError
from fedpress.tasks.base import IGNORED

REAL = Path(os.environ.get("FEDPRESS_DATA", "/nowhere"))

PLAY = """A play.

ROMEO:
But soft, what light?
It is the east.

JULIET:
O Romeo: wherefore?

First Citizen:
Speak, and hear this:
Speak, speak.

ROMEO:
She speaks.
"""


def ask(path, length=8, tokens="characters", vocabulary=None, **keys):
    keys = {"validation": 0, "test_share": 0.2, "public_words": ["label"], **keys}
    text = {"tokens": tokens, "length": length, "vocabulary": vocabulary}
    return DataSettings(source="text", path=path, text=text, **keys)


def parts_of(data):
    return [data.public, data.validation, data.test, *data.clients.values()]


def words_of(data, x):
    return [data.class_names[number] for number in x.tolist()]


def folder(root, **texts):
    root.mkdir()
    for name, content in texts.items():
        (root / f"{name}.txt").write_text(content, "utf-8")
    return root


LONG = {
    name: "".join(chr(97 + (k * k + at) % 9) for k in range(200)) for at, name in enumerate("abc")
}


@pytest.mark.parametrize("length", [1, 7, 8, 199, 300])
def test_every_token_but_the_first_is_a_target_once(tmp_path, length):
    root = folder(tmp_path / "t", **LONG)
    data = load(ask(root, length, test_clients=["a"], public_clients=["b"]), 0)
    assert data.task.kind == "language"
    assert data.example_shape == (length,)
    # The rows of a test client keep their order.
    assert "".join(words_of(data, data.test.y[data.test.y != IGNORED])) == LONG["a"][1:]
    assert "".join(words_of(data, data.test.x.flatten()[:199])) == LONG["a"][:199]
    for name, part in (("b", data.public), ("c", data.clients["c"])):
        said = sorted(words_of(data, part.y[part.y != IGNORED]))
        assert said == sorted(LONG[name][1:])
        # An input is the target of the place before it; behind the end there is padding.
        inside = part.y[:, :-1] != IGNORED
        assert torch.equal(part.x[:, 1:][inside], part.y[:, :-1][inside])


def test_speakers_of_a_play_are_clients(tmp_path):
    (tmp_path / "play.txt").write_text(PLAY)
    data = load(ask(tmp_path / "play.txt", 100, client_column="speaker", test_clients=["ROMEO"]), 0)
    assert [*data.clients] == ["First Citizen", "JULIET"]
    spoken = data.test.x[0][: len("But soft, what light?\nIt is the east.\nShe speaks.\n") - 1]
    assert "".join(words_of(data, spoken)) == "But soft, what light?\nIt is the east.\nShe speaks."
    juliet = data.clients["JULIET"].x[0]
    assert "".join(words_of(data, juliet)).startswith("O Romeo: wherefore?")


def test_words_and_marks_are_tokens(tmp_path):
    root = folder(tmp_path / "t", a="Don't stop-and-go,\n  now. " * 3, b="now stop. " * 9)
    data = load(ask(root, 5, "words", test_clients=["a"]), 0)
    assert words_of(data, data.test.x[0]) == ["Don't", "stop-and-go", ",", "now", "."]
    assert data.class_names == (UNKNOWN, ",", ".", "Don't", "now", "stop", "stop-and-go")


def private_and_public(tmp_path, **keys):
    root = folder(tmp_path / "t", open="abab" * 20, secret="abxb" * 20)
    keys = {"public_clients": ["open"], "public_words": [], **keys}
    return load(ask(root, 8, **keys), 0)


def test_the_vocabulary_is_that_of_public_texts(tmp_path):
    data = private_and_public(tmp_path)
    assert data.class_names == (UNKNOWN, "a", "b")
    own = data.clients["secret"]
    # x is the third of four characters: input 0, and not asked for.
    assert (own.x == 0).sum() >= 2 * len(own) - 2
    assert not (own.y == 0).any()
    assert "x" not in data.class_names


def test_unknown_tokens_may_be_a_class_or_drop_their_sequence(tmp_path):
    data = private_and_public(tmp_path, unknown="other")
    assert (data.clients["secret"].y == 0).any()
    assert data.class_names == (UNKNOWN, "a", "b")
    (tmp_path / "d").mkdir()
    with pytest.raises(DataError, match="client 'secret': all its rows are dropped"):
        private_and_public(tmp_path / "d", unknown="drop")


def test_the_vocabulary_may_be_listed_or_limited(tmp_path):
    data = private_and_public(tmp_path, classes=["b", "x"])
    assert data.class_names == (UNKNOWN, "b", "x")
    root = folder(tmp_path / "u", a="the cat the dog the end " * 9, b="the cat " * 30)
    data = load(ask(root, 5, "words", vocabulary=2, test_clients=["a"]), 0)
    assert data.class_names == (UNKNOWN, "cat", "the")


def test_tokens_are_not_standardised(tmp_path):
    data = private_and_public(tmp_path)
    assert data.preprocess.mean == ()
    assert data.preprocess(data.public.x).dtype == torch.int64


def test_a_folder_of_a_client_may_hold_several_texts(tmp_path):
    root = folder(tmp_path / "t", bob="hello there " * 5)
    folder(root / "ann", one="first text " * 5, two="second text " * 5)
    data = load(ask(root, 10, test_clients=["bob"]), 0)
    assert [*data.clients] == ["ann"]
    # No sequence goes from one text into the next.
    said = ["".join(words_of(data, x)) for x in data.clients["ann"].x]
    assert not any("first" in one and "second" in one for one in said)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"a": "", "b": "hello"}, "client 'a' of '.*t': fewer than two tokens, so there is none"),
        ({"a": "x", "b": "hello"}, "client 'a' of '.*t': fewer than two tokens"),
        ({}, r"no .txt file or folder in '.*t'; expected client.txt, or client/text.txt"),
    ],
)
def test_texts_without_tokens_are_refused(tmp_path, texts, message):
    with pytest.raises(DataError, match=message):
        load(ask(folder(tmp_path / "t", **texts)), 0)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(DataError, match="no such path"):
        load(ask(tmp_path / "no.txt"), 0)
    (tmp_path / "a.txt").write_bytes("für und wider".encode("latin-1") * 20)
    with pytest.raises(DataError, match=r"a.txt': not UTF-8; add its encoding to .data."):
        load(ask(tmp_path / "a.txt", num_clients=2), 0)
    assert "ü" in load(ask(tmp_path / "a.txt", num_clients=2, encoding="latin-1"), 0).class_names
    with pytest.raises(DataError, match=r'client_column: a text has no column .*"speaker"'):
        load(ask(tmp_path / "a.txt", encoding="latin-1", client_column="who"), 0)
    with pytest.raises(DataError, match="it has no line that names a speaker"):
        load(ask(tmp_path / "a.txt", encoding="latin-1", client_column="speaker"), 0)


def test_a_private_text_gives_no_vocabulary(tmp_path):
    root = folder(tmp_path / "t", **LONG)
    with pytest.raises(DataError, match="no row is public, and the labels of private rows must"):
        load(ask(root, public_words=[]), 0)


def test_a_sequence_of_no_token_is_refused():
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        ask("a.txt", length=0)


@pytest.mark.recipe
@pytest.mark.skipif(not (REAL / "tiny_shakespeare").is_dir(), reason="needs FEDPRESS_DATA")
def test_shakespeare_says_as_much_as_in_the_file():
    path = REAL / "tiny_shakespeare" / "input.txt"
    data = load(ask(path, 80, client_column="speaker", test_clients=["ROMEO"]), 0)
    assert len(data.clients) > 200
    text = path.read_text("utf-8")
    speeches = [part.partition(":\n") for part in text.split("\n\n")]
    said = "".join(f"{speech.strip()}\n" for name, _, speech in speeches if name == "ROMEO")
    counted = int((data.test.y != IGNORED).sum())
    assert counted == len(said) - 1
    assert len(data.class_names) - 1 <= len(set(text))
    assert np.isfinite(data.task.unigram).all()
