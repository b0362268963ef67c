"""What a person sees who gives a wrong file: one sentence with place and cure, and exit status 2."""

import sqlite3
from contextlib import closing

import numpy as np
import pytest

RECIPE = """
name = "x"

[data]
{data}

[model]
architecture = "mlp"
arguments = {{ in_features = 1, num_classes = 2 }}

[[stage]]
kind = "federate"
num_rounds = 1
"""

TABLE = "who,t,size,label\n" + "".join(
    f"{'ab'[at % 2]},{at},{at / 7},{'yn'[at % 3 == 0]}\n" for at in range(60)
)


def write_sources(folder):
    (folder / "a.csv").write_text(TABLE)
    (folder / "mixed.csv").write_text("size,label\n1.5,y\n2,n\nlarge,y\n3,n\n")
    with closing(sqlite3.connect(folder / "a.db")) as connection, connection:
        connection.execute("CREATE TABLE people (age, label)")
        connection.execute("INSERT INTO people VALUES (1, 'y'), ('old', 'n')")
    np.savez(folder / "a.npz", x=np.zeros((4, 1)), y=np.zeros(3))
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text("")
    (folder / "sounds" / "a" / "up").mkdir(parents=True)
    for number in range(4):
        (folder / "sounds" / "a" / "up" / f"{number}.wav").write_text("no sound")
    (folder / "hub").mkdir()


@pytest.mark.recipe
@pytest.mark.parametrize(
    ("data", "said"),
    [
        ('source = "arrow"\npath = "no.arrow"', "no such path"),
        ('source = "arrow"\npath = "a.csv"', 'set source = "csv"'),
        ('source = "parquet"\npath = "a.csv"', 'set source = "csv"'),
        (
            'source = "sql"\npath = "postgresql://reader:word@host/loans"\ntable = "t"',
            "recipe.data.path: it is an address, and path is a file or folder of this machine; give",
        ),
        ('source = "sql"\naddress = "sqlite:///no.db"\ntable = "t"', "no database"),
        ('source = "sql"\naddress = "nodb://x"\ntable = "t"', "knows no database 'nodb'"),
        ('source = "sql"\npath = "a.db"\ntable = "persons"', "no table 'persons'"),
        ('source = "sql"\npath = "a.db"\ntable = "people"', "row 1 holds text, but the rows"),
        ('source = "numpy"\npath = "a.npz"', "give one target for each example"),
        ('source = "huggingface"\npath = "hub"', "save_to_disk"),
        ('source = "text"\npath = "texts"', "fewer than two tokens"),
        (
            'source = "audio"\npath = "sounds"\nclasses = ["up", "down"]\ntest_share = 0.5',
            "not a readable WAV file",
        ),
        ('source = "csv"\npath = "a.csv"\nlabel_column = "ill"', "no column 'ill'"),
        (
            'source = "csv"\npath = "a.csv"\nclient_column = "who"\n'
            'series = { window = 99, order_column = "t" }',
            "99 rows of a window, but the longest series has 30",
        ),
        (
            'source = "csv"\npath = "a.csv"\nclient_column = "who"\n'
            'series = { window = 2, order_column = "label" }',
            "is no date",
        ),
        (
            'source = "csv"\npath = "a.csv"\ntypes = { label = "date" }\nlabel_column = "who"',
            "column 'label': line 2 holds 'n', which is no date; write it as 2024-05-01",
        ),
        (
            'source = "csv"\npath = "mixed.csv"\ntypes = { size = "number" }',
            "column 'size': line 4 holds 'large', which is no number; write a number there",
        ),
        (
            'source = "csv"\npath = "a.csv"\ntypes = { sise = "number" }',
            "no column 'sise' in",
        ),
        (
            'source = "csv"\npath = "a.csv"\ntypes = { size = "nummer" }',
            "no type 'nummer' (known: number, word, integer id, date, image, audio, text); "
            "did you mean 'number'?",
        ),
        (
            'source = "numpy"\npath = "a.npz"\ntypes = { size = "number" }',
            "source 'numpy' is no table; leave types out",
        ),
        (
            'source = "csv"\npath = "a.csv"\ntypes = { t = "integer id" }\npublic_share = 0.5',
            "ids differ, so they tell rows apart and predict nothing; set",
        ),
        (
            'source = "csv"\npath = "a.csv"\ntypes = { who = "audio" }',
            "cannot be of the type audio; save recordings as client/label/sound.wav, and set source",
        ),
        (
            'source = "csv"\npath = "a.csv"\ntypes = { who = "text" }',
            'cannot be of the type text; save texts as client.txt, and set source = "text"',
        ),
        (
            'source = "csv"\npath = "a.csv"\ntypes = { who = "image" }',
            "it holds string, but images of a table are bytes; save images as",
        ),
    ],
)
def test_a_wrong_file_is_one_sentence_and_status_two(data, said, shell, tmp_path):
    write_sources(tmp_path)
    (tmp_path / "x.toml").write_text(RECIPE.format(data=data))
    found = shell("check", "x.toml")
    assert found.code == 2
    text = " ".join(found.err.split())
    assert said in text
    assert "Traceback" not in text


@pytest.mark.recipe
def test_a_file_that_changes_after_check_is_checked_again_by_run(shell, tmp_path):
    """A run checks all that it has read before it trains, so it needs no memory of `check`."""
    keys = 'source = "csv"\npath = "a.csv"\nclient_column = "who"\nfeature_columns = ["size"]\n'
    (tmp_path / "x.toml").write_text(RECIPE.format(data=keys + "public_share = 0.3"))
    (tmp_path / "a.csv").write_text(TABLE)
    assert shell("check", "x.toml").code == 0
    (tmp_path / "a.csv").write_text(TABLE.replace("size", "length", 1))
    found = shell("run", "x.toml", "--out", "run")
    assert found.code == 2
    assert "no column 'size'" in " ".join(found.err.split())
    # Another number of inputs is noticed too, before any training.
    words = TABLE.splitlines()
    (tmp_path / "a.csv").write_text(
        "\n".join(
            [words[0], *(line.replace(line.split(",")[2], "w" + line[0]) for line in words[1:])]
        )
    )
    found = shell("run", "x.toml", "--out", "run")
    assert found.code == 2
    assert "in_features" in found.err
