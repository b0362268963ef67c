"""Examples' pages: a user's own file becomes a report and answers by the commands that they show."""

import csv
import random

import numpy as np
import pytest
from PIL import Image

from tests import pages

SECTION = "With a file of your own"


def write(path, header, rows, **how):
    with open(path, "w", newline="", encoding=how.pop("encoding", "utf-8")) as file:
        csv.writer(file, **how).writerows([header, *rows])


def answers(path):
    return len(path.read_text().splitlines()) - 1


def commands(page):
    return [block for block in pages.blocks(page) if block.section == SECTION]


@pytest.mark.recipe
def test_a_bank_gets_from_its_export_to_answers(tmp_path, shell):
    chance = random.Random(0)
    rows = []
    for at in range(400):
        date = f"{at % 28 + 1:02}.07.20{18 + at % 5}"
        sum_ = f"{chance.randint(1, 30)}.500,00"
        bank = ["Süd", "Nord"][at % 2]
        rows.append([1000 + at // 2, bank, date, "01067", sum_, ["ja", "nein"][at % 3 == 0]])
    header = ["Kundennr.", "Bank", "Antragsdatum", "PLZ", "Betrag €", "ausgefallen"]
    german = {"delimiter": ";", "encoding": "cp1252"}
    write(tmp_path / "loans.csv", header, rows, **german)
    write(tmp_path / "new.csv", header[:-1], [row[:-1] for row in rows[:7]], **german)
    pages.do(commands("examples/finance/README.md"), shell)
    assert answers(tmp_path / "answers.csv") == 7


@pytest.mark.recipe
def test_hospitals_get_from_tables_and_images_to_answers(tmp_path, shell):
    chance = random.Random(0)
    rows = []
    for at in range(400):
        date = f"{at % 28 + 1:02}.01.2021"
        hospital = ["A", "B"][at % 2]
        back = ["yes", "no"][at % 3 == 0]
        rows.append([at * 3, hospital, date, chance.choice(["?", "70"]), "250.8", back])
    header = ["patient_nbr", "hospital", "adm. date", "weight (kg)", "diag", "readmitted?"]
    write(tmp_path / "diabetes.csv", header, rows)
    write(tmp_path / "new.csv", header[:-1], [row[:-1] for row in rows[:5]])
    trial = [
        ["AB"[at % 2], chance.randint(30, 90), chance.randint(1, 60), at % 2] for at in range(400)
    ]
    write(tmp_path / "survival.csv", ["center", "age", "months", "died"], trial)
    write(tmp_path / "survival_new.csv", ["center", "age"], [row[:2] for row in trial[:4]])
    pixels = np.random.default_rng(0)
    for folder in ("xrays/A/ill", "xrays/A/well", "xrays/B/ill", "new_xrays"):
        (tmp_path / folder).mkdir(parents=True)
        for at in range(20):
            image = Image.fromarray(pixels.integers(0, 256, (16, 16)).astype(np.uint8))
            image.save(tmp_path / folder / f"{at}.png")
    pages.do(commands("examples/medicine/README.md"), shell)
    files = ("answers.csv", "curves.csv", "seen.csv")
    assert [answers(tmp_path / file) for file in files] == [5, 4, 20]
