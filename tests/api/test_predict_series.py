"""`predict` on raw rows of series: windows as the training made them, and the future of a forecast."""

import csv
import json
import math
import random

import pyarrow as pa
import pytest
import torch

import fedpress
from fedpress import storage
from fedpress.data import Preparation
from fedpress.errors import FedpressError
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline.start import load_data
from tests.harness import finish

pytestmark = pytest.mark.recipe

STEPS = """
name = "steps"
[data]
source = "csv"
path = "{path}"
client_column = "person"
label_column = "activity"
public_clients = ["open"]
test_clients = ["cleo"]
validation = 0
missing = "mean"
[data.series]
window = 8
stride = 5
by = ["device"]
order_column = "time"
max_gap = 1
[model]
architecture = "mlp"
arguments = {{ hidden = [4] }}
[[stage]]
kind = "train"
epochs = 1
[[stage]]
kind = "export"
"""
AIR = """
name = "air"
[data]
source = "csv"
path = "{path}"
client_column = "station"
label_column = "pm"
public_clients = ["open"]
test_clients = ["south"]
validation = 0
missing = "drop"
[data.series]
window = 4
stride = 3
order_column = ["year", "month", "day", "hour"]
max_gap = 3600
horizon = [1, 2]
lags = [3]
calendar = ["hour", "weekday"]
[model]
architecture = "mlp"
arguments = {{ hidden = [4] }}
[[stage]]
kind = "train"
epochs = 1
"""


def write(path, rows):
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def steps(chance):
    """Readings of two devices of each person; some speeds are missing, and Cleo's phone has a gap."""
    rows = []
    for person in ("open", "anna", "cleo"):
        for device in ("phone", "watch"):
            for time in range(60):
                speed = "" if time % 11 == 0 else f"{math.sin(time) + chance.gauss(0, 0.3):.4f}"
                place = {"person": person, "device": device}
                late = 5 * (person == "cleo" and device == "phone" and time > 40)
                row = {"time": time + late, "speed": speed, "mood": chance.choice("ab")}
                rows.append({**place, **row, "activity": "run" if time % 20 < 10 else "walk"})
    chance.shuffle(rows)
    return rows


def air(chance):
    rows = []
    for station in ("open", "north", "south"):
        for hour in range(100):
            date = {"year": 2024, "month": 1, "day": 1 + hour // 24, "hour": hour % 24}
            pm = 50 + 20 * math.sin(hour / 4) + chance.gauss(0, 2)
            # A row with a gap ends the series.
            wind = "" if hour == 70 else f"{chance.uniform(0, 9):.2f}"
            rows.append({"station": station, **date, "wind": wind, "pm": f"{pm:.3f}"})
    return rows


@pytest.fixture(scope="module")
def walks(tmp_path_factory):
    place = tmp_path_factory.mktemp("steps")
    rows = steps(random.Random(0))
    write(place / "t.csv", rows)
    finish(STEPS.format(path=(place / "t.csv").as_posix()), place / "run")
    return place / "run", [row for row in rows if row["person"] == "cleo"]


@pytest.fixture(scope="module")
def winds(tmp_path_factory):
    place = tmp_path_factory.mktemp("air")
    rows = air(random.Random(0))
    write(place / "t.csv", rows)
    finish(AIR.format(path=(place / "t.csv").as_posix()), place / "run")
    return place / "run", [row for row in rows if row["station"] == "south"]


def outputs_of_training(run):
    """The oracle: the outputs for the test windows as the training made them."""
    data = load_data(recipes.load((run / "recipe.toml").read_text()))
    _, model = storage.load(run)
    with torch.no_grad():
        return data, model.eval()(data.preprocess(data.test.x))


def far_from(wanted, found):
    """Returns how far each wanted row is from the nearest row that was found."""
    return (wanted[:, None] - found).abs().amax(2).amin(1)


@pytest.mark.parametrize("model", [".", "stages/0-train", "artifacts/model.onnx"])
def test_raw_rows_become_the_windows_of_the_training(walks, model, tmp_path):
    run, rows = walks
    data, wanted = outputs_of_training(run)
    assert data.preparation.shape == data.example_shape == (3, 8)
    # Without the label, in another order, with a column that the model does not know.
    turned = [{"note": "x", **dict(reversed(row.items()))} for row in reversed(rows)]
    for row in turned:
        del row["activity"]
    write(tmp_path / "new.csv", turned)
    found = fedpress.predict(run / model, tmp_path / "new.csv")
    assert len(found) == len(wanted)
    assert ("phone", "40") not in zip(found.examples["device"], found.examples["time"], strict=True)
    assert float(far_from(wanted, found.outputs).max()) < 1e-5
    assert found.ignored == ("note",)


def test_a_forecast_is_that_of_the_training_and_goes_beyond_the_last_row(winds, tmp_path):
    run, rows = winds
    data, wanted = outputs_of_training(run)
    write(tmp_path / "new.csv", rows)
    found = fedpress.predict(run, tmp_path / "new.csv")
    header, table = found.table()
    assert header == ["station", "time", "horizon", "pm"]
    times = found.examples["time"]
    assert times[-1] == "2024-01-05 03:00:00", "the last hour of the table"
    # The row of hour 70 ends a series: no window holds it, and one ends before it.
    assert "2024-01-03 21:00:00" in times
    # The oracle knows only windows whose targets are in the table.
    assert float(far_from(wanted, found.outputs).max()) < 1e-5
    assert len(found) > len(wanted)
    # In the unit of the column, not standardised.
    values = torch.tensor([row[-1] for row in table]).reshape(-1, 2)
    torch.testing.assert_close(values, data.task.to_targets(found.outputs))
    assert [row[2] for row in table[:2]] == [1, 2]


def test_rows_in_memory_give_the_same_as_their_file(winds, tmp_path):
    run, rows = winds
    write(tmp_path / "new.csv", rows)
    wanted = fedpress.predict(run, tmp_path / "new.csv")
    typed = pa.Table.from_pylist(
        [
            {
                name: cell if name == "station" else (float(cell) if cell != "" else None)
                for name, cell in row.items()
            }
            for row in rows
        ]
    )
    for given in (rows, typed):
        found = fedpress.predict(run, given)
        assert torch.equal(found.outputs, wanted.outputs)
        assert found.table()[1] == wanted.table()[1]


def test_the_json_says_how_rows_become_windows(winds):
    run, _ = winds
    page = json.loads((run / "preparation.json").read_text())
    assert page["version"] == 2
    assert page["series"]["by"] == ["station"]
    assert page["series"]["missing"] == "drop"
    assert page["input"].startswith("float32 [N, 7, 4]: ")
    assert Preparation.read(run / "preparation.json").to_json() == page


def changed(rows, at, **cells):
    """The rows with other cells in one; the row `at` is brought to line 6, and lies in a window."""
    first = next(row for row in rows if row["device"] == "watch" and row["time"] == 9)
    rows = [row for row in rows if row is not first]
    rows.insert(at, first)
    return [row | cells if number == at else row for number, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda rows: [{k: v for k, v in row.items() if k != "time"} for row in rows],
            "it lacks the column 'time'",
        ),
        (lambda rows: changed(rows, 4, time=""), "line 6 of .*: column 'time' has no value"),
        (
            lambda rows: changed(rows, 4, time="soon"),
            "line 6 of .*: column 'time' is no number, as",
        ),
        (lambda rows: changed(rows, 4, device=""), "line 6 of .*: column 'device' has no value"),
        (
            lambda rows: changed(rows, 4, mood="c"),
            "line 6 of .*: column 'mood' has the unknown word",
        ),
        (lambda rows: changed(rows, 4, speed="fast"), "line 6 of .*has the text 'fast'"),
        (lambda rows: [*rows, rows[3]], "line 122 of .*same time as line 5 of .*leave one of"),
        (
            lambda rows: [row for row in rows if row["device"] == "phone" or int(row["time"]) < 7],
            "the series device watch, person cleo has 7 rows, too few .* takes 8; give more",
        ),
    ],
)
def test_rows_that_make_no_windows_are_refused_by_one_sentence(
    walks, tmp_path, shell, change, said
):
    run, rows = walks
    write(tmp_path / "new.csv", change(rows))
    with pytest.raises(FedpressError, match=said):
        fedpress.predict(run, tmp_path / "new.csv")
    answer = shell("predict", run, tmp_path / "new.csv")
    assert answer.code == 2
    assert answer.err.count("\n") == 1


def test_a_file_of_another_kind_is_refused(walks, tmp_path):
    run, _ = walks
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(
        FedpressError, match=r"trained on windows over a series.*give rows: a \.csv"
    ):
        fedpress.predict(run, tmp_path / "a.txt")
