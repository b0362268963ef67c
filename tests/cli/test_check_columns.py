"""`fedpress check` says how columns are understood, what they hold, and the classes of each client."""

import json

import pytest

import fedpress

RECIPE = """
name = "x"
[data]
source = "csv"
path = "t.csv"
client_column = "who"
label_column = "y"
public_clients = ["a"]
missing = "{missing}"
types = {{ zip = "integer id", since = "date" }}
[model]
architecture = "mlp"
[[stage]]
kind = "federate"
num_rounds = 1
{privacy}
"""
PRIVACY = 'privacy = { unit = "sample", epsilon = 8.0, delta = 1e-3 }'


@pytest.fixture
def table(tmp_path):
    lines = ["who,zip,since,age,y"]
    for at in range(90):
        # Only the clients b and c have gaps and the code 02.
        age = "" if at % 3 and at < 20 else 20 + at
        lines.append(f"{'abc'[at % 3]},0{at % 3},2024-01-{at % 28 + 1:02},{age},{'yn'[at % 2]}")
    (tmp_path / "t.csv").write_text("\n".join(lines))

    def recipe(missing="mean", privacy=""):
        path = tmp_path / "x.toml"
        path.write_text(RECIPE.format(missing=missing, privacy=privacy))
        return path

    return recipe


def columns(recipe):
    return {one["name"]: one for one in fedpress.check(recipe)["data"]["columns"]}


@pytest.mark.recipe
@pytest.mark.parametrize("missing", ["mean", "drop"])
def test_without_privacy_all_rows_are_described_before_any_is_dropped(table, missing):
    found = columns(table(missing))
    assert list(found) == ["zip", "since", "age", "y"]
    assert (found["age"]["missing"], found["age"]["rows"]) == (13, 90)
    assert found["zip"]["type"] == "integer id"
    assert [list(pair) for pair in found["zip"]["words"]] == [["00", 30], ["01", 30], ["02", 30]]
    assert found["since"]["type"] == "date"
    assert list(found["since"]["dates"]) == ["2024-01-01", "2024-01-28"]
    assert [list(pair) for pair in found["y"]["words"]] == [["n", 45], ["y", 45]]


@pytest.mark.recipe
def test_with_privacy_only_public_rows_are_described(table):
    found = columns(table(privacy=PRIVACY))
    # The public rows lack a fifth for the test set, and the validation set.
    assert 0 < found["age"]["rows"] <= 30
    assert found["age"]["missing"] == 0
    assert [word for word, _ in found["zip"]["words"]] == ["00"]


@pytest.mark.recipe
def test_the_command_draws_columns_and_the_classes_of_clients(table, shell):
    said = shell("check", table())
    assert said.code == 0
    assert "columns, by all rows:" in said.out
    lines = {line.split()[0]: " ".join(line.split()) for line in said.out.splitlines() if line}
    assert lines["zip"] == "zip integer id 1 0 mean 00 30, 01 30, 02 30 ███"
    assert lines["age"].startswith("age number 1 13 (14%) ▂ 64.56 20 to 109, median")
    assert lines["since"].startswith("since date 5 0 mean 2024-01-01 to")
    assert "█" in lines["b"]
    said = shell("check", table(privacy=PRIVACY))
    assert "columns, by the public rows:" in said.out
    # The classes of clients are private.
    assert "Examples" not in said.out
    assert json.loads(shell("check", table(), "--json").out)["data"]["columns"][2]["missing"] == 13


@pytest.mark.recipe
def test_the_page_of_check_shows_all_rows_and_under_privacy_the_public_ones(table, shell, tmp_path):
    said = shell("check", table(), "--draw", "all.html")
    assert (said.code, "drawn: all.html" in said.out) == (0, True)
    page = (tmp_path / "all.html").read_text()
    assert "All 90 rows were looked at, private ones too" in page
    assert "13 (14.4%)" in page
    assert "00 30, 01 30, 02 30" in page
    assert "Classes of each client" in page
    assert shell("check", table(privacy=PRIVACY), "--draw", "few.html").code == 0
    page = (tmp_path / "few.html").read_text()
    assert "public rows alone" in page
    assert "Classes of the public rows" in page
    # Only private rows have gaps and the codes 01 and 02.
    assert "(14.4%)" not in page
    assert "01 30" not in page


@pytest.mark.recipe
@pytest.mark.parametrize(
    ("more", "clients"),
    [("", True), ('aggregator = "secure"', False), (PRIVACY, False)],
    ids=["open", "secure", "private"],
)
def test_the_report_describes_public_rows_and_counts_clients_only_in_an_open_run(
    table, tmp_path, more, clients
):
    run = fedpress.run(table(privacy=more), out=tmp_path / "run")
    shown = run.result["data"]
    assert shown["rows"] == "public"
    zips = next(one for one in shown["columns"] if one["name"] == "zip")
    assert [word for word, _ in zips["words"]] == ["00"]
    assert zips["part"] == "public"
    assert shown["labels"] == [
        sum(count for word, count in shown["columns"][-1]["words"] if word == name)
        for name in shown["classes"]
    ]
    assert ("clients" in shown) == clients
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Columns are described by the" in page
    assert ("Classes of each client" in page) == clients
