"""A mistake in the data is named where it is, and does not silently change what is learned."""

import numpy as np
import pytest
import torch

import fedpress
from fedpress.data import DataSettings, load
from fedpress.data.functions import refuse_one_hot
from fedpress.errors import DataError


def table(tmp_path, **cells):
    """A table of 60 rows in the lines 2 to 61; `cells` replaces ages: line -> text."""
    lines = ["age,site,y"]
    for at in range(60):
        age = cells.get(f"line{at + 2}", f"{at * 7 % 50 + 20.5}")
        lines.append(f"{age},{'open' if at < 30 else 'north'},{'ill' if at % 2 else 'well'}")
    (tmp_path / "t.csv").write_text("\n".join(lines))
    return DataSettings(
        source="csv",
        path=tmp_path / "t.csv",
        client_column="site",
        label_column="y",
        public_clients=["open"],
        missing=cells.get("missing", "error"),
    )


def test_one_public_word_does_not_turn_numbers_into_words(tmp_path):
    with pytest.raises(
        DataError, match="line 9 has the text 'old'; write a number there"
    ) as raised:
        load(table(tmp_path, line9="old"), 0)
    assert raised.value.place == "feature column 'age'"
    # The cures work: an empty cell is filled, and listed words are words.
    assert load(table(tmp_path, line9="", missing="mean"), 0).example_shape == (1,)
    words = table(tmp_path, line9="old").model_copy(update={"words": {"age": ("old", "20.5")}})
    assert load(words, 0).example_shape == (2,)


def test_a_column_of_words_may_hold_some_numbers(tmp_path):
    cells = {f"line{at}": "none" for at in range(2, 32, 5)}
    assert load(table(tmp_path, **cells), 0).example_shape[0] > 1


def test_a_missing_cell_is_named_by_its_line(tmp_path):
    with pytest.raises(DataError, match=r"1 of 60 rows have no value \(first: line 40\)"):
        load(table(tmp_path, line40=""), 0)


def test_classes_in_one_hot_form_are_no_regression():
    one_hot = np.eye(3, dtype=np.float32)[[0, 1, 2, 1]]
    with pytest.raises(DataError, match=r"one-hot form; give class numbers, y\.argmax\(1\)"):
        refuse_one_hot(one_hot, "data")
    refuse_one_hot(one_hot * 0.5, "data")
    refuse_one_hot(one_hot[:, :1], "data")
    net, x = torch.nn.Linear(2, 3), torch.randn(4, 2)
    with pytest.raises(DataError, match="one-hot form"):
        fedpress.evaluate(net, (x, torch.from_numpy(one_hot)))
    # Both cures work.
    assert "accuracy" in fedpress.evaluate(net, (x, torch.from_numpy(one_hot).argmax(1)))
    assert "accuracy" not in fedpress.evaluate(
        net, (x, torch.from_numpy(one_hot)), task="regression"
    )


def test_check_says_nothing_of_unknown_words_if_no_public_row_has_one(tmp_path):
    data = load(table(tmp_path), 0)
    assert data.left_out["clients"] == 0
    assert data.left_out_sentence(private=True) == ""
