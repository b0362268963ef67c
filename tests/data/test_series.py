"""Windows over series are compared with a plain loop over the rows."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError

from fedpress.data import DataSettings, load
from fedpress.data.series_settings import SeriesSettings
from fedpress.data.windows import find_windows, overlap, split_by_time
from fedpress.errors import DataError

REAL = Path(os.environ.get("FEDPRESS_DATA", "/nowhere"))
"""Folder of real data sets, described in tests/tasks/test_recipes.py."""


def readings(people=("ann", "bob", "cat"), rows=60, devices=("phone", "watch"), **changes):
    """Every reading is a number of its own; `t` counts from 0, and label a changes to b midway."""
    columns = {name: [] for name in ("who", "device", "t", "value", "label")}
    for person in people:
        for device in devices:
            for t in range(rows):
                columns["who"].append(person)
                columns["device"].append(device)
                columns["t"].append(t)
                columns["value"].append(float(len(columns["value"])))
                columns["label"].append("a" if t < rows // 2 else "b")
    return pa.table({**columns, **changes})


def ask(path, series, **keys):
    wanted = {"client_column": "who", "public_clients": ["ann"], "validation": 0}
    wanted |= {"mean": [0], "std": [1], "source": "parquet"}
    series = {"by": ["device"], "order_column": "t", **series}
    return DataSettings(path=path, series=series, **{**wanted, **keys})


def ask_load(path, series, **keys):
    """Settings for a table of one series without clients, such as `dated`, whose load is forecast."""
    alone = {"client_column": None, "public_clients": [], "label_column": "load"}
    return ask(path, {"by": [], **series}, **{**alone, "task": "regression", **keys})


def loaded(folder, table, series, **keys):
    pq.write_table(table, folder / "a.parquet")
    return load(ask(folder / "a.parquet", series, **keys), 0)


def parts_of(data):
    return [data.public, data.validation, data.test, *data.clients.values()]


def plain_windows(series, order, usable, ask):
    """Returns the windows (rows, targets) by a loop over sorted rows, the twin of find_windows."""
    found = []
    for number in sorted(set(series.tolist())):
        own = [at for at in range(len(series)) if series[at] == number]
        own.sort(key=lambda at: order[at])
        stretches, current = [], []
        for at in own:
            far = current and ask.max_gap and order[at] - order[current[-1]] > ask.max_gap
            if current and (far or not usable[at]):
                stretches.append(current)
                current = []
            if usable[at]:
                current = [*current, at]
        for stretch in [*stretches, current]:
            start = ask.before
            while start + ask.window + ask.after <= len(stretch):
                last = start + ask.window - 1
                rows = stretch[start : last + 1]
                found.append((rows, [stretch[last + h] for h in ask.horizon]))
                start += ask.step
    return found


@pytest.mark.parametrize("seed", range(30))
def test_windows_are_those_of_a_plain_loop(seed):
    chance = np.random.default_rng(seed)
    count = int(chance.integers(20, 80))
    series = chance.integers(0, 3, count)
    order = np.cumsum(chance.integers(1, 4, count))[chance.permutation(count)].astype(float)
    usable = chance.random(count) > 0.05
    asked = SeriesSettings(
        window=int(chance.integers(1, 4)),
        stride=[None, 1, 2][seed % 3],
        max_gap=[None, 8.0][seed % 2],
        order_column="t",
        horizon=[(), (1,), (1, 3)][chance.integers(3)],
        lags=[(), (2,)][chance.integers(2)],
    )
    wanted = plain_windows(series, order, usable, asked)
    if not wanted:
        with pytest.raises(DataError, match=r"series.window: .*, but the longest series has"):
            find_windows(series, order, usable, asked)
        return
    found = find_windows(series, order, usable, asked)
    assert found.rows.tolist() == [rows for rows, _ in wanted]
    assert found.targets.tolist() == [targets for _, targets in wanted]
    for at, lag in enumerate(asked.lags):
        place = np.lexsort((order, series)).tolist()
        for row in found.rows.flatten().tolist():
            assert found.lagged[row, at] == place[place.index(row) - lag]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("last", [True, False])
def test_parts_by_time_share_no_row(seed, last):
    chance = np.random.default_rng(seed)
    series = np.sort(chance.integers(0, 3, 60))
    asked = SeriesSettings(window=5, stride=int(chance.integers(1, 7)))
    spans = find_windows(series, None, np.ones(60, bool), asked).spans
    every = torch.arange(len(spans))
    share = float(chance.random())
    taken, rest = split_by_time(spans, every, share, last=last)
    held = [{r for f, e in spans[part, 1:].tolist() for r in range(f, e)} for part in (taken, rest)]
    assert not held[0] & held[1]
    counts = spans[:, 0].bincount()
    assert len(taken) == sum(int(share * n + 1e-9) for n in counts.tolist())
    for number in range(3):
        mine = spans[taken][spans[taken, 0] == number, 1].tolist()
        others = spans[rest][spans[rest, 0] == number, 1].tolist()
        if mine and others:
            assert (min(mine) > max(others)) if last else (max(mine) < min(others))


def test_no_window_leaves_a_device_or_a_client(tmp_path):
    data = loaded(tmp_path, readings(), {"window": 10, "stride": 5}, feature_columns=["value"])
    assert data.example_shape == (1, 10)
    for part in parts_of(data):
        start = part.x[:, 0, 0].int()
        # The values count up within a window, and a device has 60 of them.
        assert torch.equal(part.x[:, 0].int(), start[:, None] + torch.arange(10, dtype=torch.int32))
        assert torch.equal(start // 60, (start + 9) // 60)
    assert {int(s) // 120 for s in data.clients["bob"].x[:, 0, 0]} == {1}
    # Test windows are the last of each series, and share no reading with others.
    seen = {int(v) for v in torch.cat([c.x.flatten() for c in data.clients.values()])}
    assert not seen & {int(v) for v in data.test.x.flatten()}


def test_rows_are_sorted_by_their_order(tmp_path):
    table = readings()
    shuffled = table.take(np.random.default_rng(0).permutation(table.num_rows))
    one = loaded(tmp_path, table, {"window": 10})
    two = loaded(tmp_path, shuffled, {"window": 10})
    for name, part in one.clients.items():
        assert torch.equal(part.x, two.clients[name].x)
        assert torch.equal(part.y, two.clients[name].y)


def test_the_label_is_that_of_most_rows_or_of_the_last(tmp_path):
    table = readings(rows=55)  # label a has 27 rows: of the third window of ten it has 7
    for label, third in (("majority", 0), ("last", 1)):
        data = loaded(
            tmp_path, table, {"window": 10, "label": label}, test_clients=["bob"], source="parquet"
        )
        assert data.test.y.tolist() == [0, 0, third, 1, 1] * 2
        assert data.class_names == ("a", "b")


@pytest.mark.parametrize("source", ["parquet", "csv"])
def test_forecasts_are_the_values_of_later_rows(tmp_path, source):
    path = tmp_path / f"a.{source}"
    table = readings(rows=300).drop_columns("label")
    if source == "csv":
        pyarrow.csv.write_csv(table, path)
    else:
        pq.write_table(table, path)
    series = {"window": 6, "stride": 1, "horizon": [1, 12], "lags": [24]}
    data = load(ask(path, series, label_column="value", task="regression", source=source), 0)
    assert data.task.names == ("value +1", "value +12")
    assert data.example_shape == (2, 6)  # the value, and its lag
    for part in parts_of(data):
        assert torch.equal(part.y[:, 0], part.x[:, 0, -1] + 1)
        assert torch.equal(part.y[:, 1], part.x[:, 0, -1] + 12)
        assert torch.equal(part.x[:, 1], part.x[:, 0] - 24)
    # All windows of the public client, of two devices.
    assert len(data.public) == 2 * (300 - 24 - 6 - 12 + 1)


def test_a_forecast_brings_the_value_of_now(tmp_path):
    """Values grow by one a row, so persistence is wrong by as much as the horizon is long."""
    table = readings(rows=300).drop_columns("label")
    series = {"window": 6, "horizon": [1, 12]}
    data = loaded(tmp_path, table, series, label_column="value")
    assert data.task.kind == "forecast"
    assert data.task.names == ("value +1", "value +12")
    assert torch.equal(data.test.y[:, 0], data.test.x[:, 0, -1])
    found = data.task.summary(data.task.metrics(torch.zeros(len(data.test), 2), data.test.y))
    assert found["mae_of_persistence"] == pytest.approx((1 + 12) / 2)
    task = {"kind": "forecast", "now": False}
    data = loaded(tmp_path, table, series, label_column="value", task=task)
    assert torch.equal(data.test.y[:, 0], data.test.x[:, 0, -1] + 1)


def test_one_client_may_hold_all_windows_since_it_shares_no_row_with_others(tmp_path):
    alone = {"client_column": None, "public_clients": [], "public_share": 0.2}
    series = {"window": 10, "stride": 5, "by": ["who", "device"]}
    # The first fifth of the time, which is public, shows one class alone.
    alone["classes"] = ["a", "b"]
    data = loaded(tmp_path, readings(), series, num_clients=1, **alone)
    assert list(data.clients) == ["c0"]
    assert len(data.clients["c0"]) > 0 < len(data.public)


def test_windows_of_one_row_are_rows(tmp_path):
    data = loaded(
        tmp_path,
        readings(),
        {"horizon": [1], "lags": [1, 2]},
        label_column="value",
        task="regression",
        feature_columns=["value"],
    )
    assert data.example_shape == (3,)
    assert torch.equal(data.public.y, data.public.x[:, 0] + 1)
    assert torch.equal(data.public.x[:, 2], data.public.x[:, 0] - 2)


def test_a_gap_ends_a_series(tmp_path):
    late = [t + 1000 * (t >= 33) for t in readings()["t"].to_pylist()]
    table = readings(t=late)
    for gap, most in ((5.0, 3 + 2), (None, 6)):
        series = {"window": 10, "max_gap": gap}
        data = loaded(tmp_path, table, series, test_clients=["bob"], feature_columns=["t"])
        assert len(data.test) == 2 * most
        jumps = data.test.x.diff(dim=2).max()
        assert (jumps > 1) == (gap is None)


def test_an_incomplete_row_ends_a_series_if_rows_are_dropped(tmp_path):
    value = readings()["value"].to_pylist()
    value[200] = None  # of bob's watch: its 20th row
    data = loaded(
        tmp_path,
        readings(value=value),
        {"window": 10},
        missing="drop",
        test_clients=["bob"],
        feature_columns=["value"],
    )
    assert data.test.x[:, 0, 0].tolist() == [120 + 10 * k for k in range(8)] + [
        201.0 + 10 * k for k in range(3)
    ]


def test_a_missing_target_leaves_its_window_out(tmp_path):
    value = readings()["value"].to_pylist()
    value[129] = None
    data = loaded(
        tmp_path,
        readings(value=value),
        {"window": 5, "horizon": [5]},
        missing="mean",
        test_clients=["bob"],
        label_column="value",
        task="regression",
        feature_columns=["value"],
    )
    # The window 120-124 has no target; 125-129 is filled.
    assert 129.0 not in data.test.y.tolist()
    assert 125.0 in data.test.x[:, 0, 0].tolist()
    assert 120.0 not in data.test.x[:, 0, 0].tolist()


def test_validation_follows_the_public_past(tmp_path):
    data = loaded(
        tmp_path,
        readings(),
        {"window": 10, "stride": 2},
        public_clients=[],
        public_share=0.5,
        validation=0.25,
        feature_columns=["value"],
        label_column="device",
    )
    held = [{int(v) for v in part.x.flatten()} for part in parts_of(data)]
    for at, one in enumerate(held):
        for other in held[at + 1 :]:
            assert not one & other
    first = {int(v) % 60 for v in data.public.x.flatten()}
    later = {int(v) % 60 for v in data.test.x.flatten()}
    assert max(first) < min(later)


def test_statistics_are_of_public_windows_alone(tmp_path):
    table = readings()
    private = np.array([who != "ann" for who in table["who"].to_pylist()])
    value = np.where(private, 1e6, table["value"].to_numpy())
    data = loaded(
        tmp_path,
        readings(value=value),
        {"window": 60},
        feature_columns=["value"],
        test_clients=["bob"],
        label_column="device",
        mean=[],
        std=[],
    )
    assert data.preprocess.mean[0] == pytest.approx(59.5)


DATES = [f"2024-05-0{d} {h:02d}:30:00" for d in (3, 4, 5) for h in range(0, 24, 2)]


def dated(dates=DATES):
    return pa.table({"when": dates, "load": np.arange(float(len(dates)))})


def test_the_calendar_is_a_circle_of_dates(tmp_path):
    pyarrow.csv.write_csv(dated(), tmp_path / "a.csv")
    data = load(
        ask_load(
            tmp_path / "a.csv",
            {
                "order_column": "when",
                "horizon": [1],
                "stride": 2,
                "calendar": ["hour", "weekday", "month"],
                "max_gap": 7200,
            },
            source="csv",
            num_clients=1,
            public_share=0.3,
        ),
        0,
    )
    assert data.example_shape == (7,)
    x = data.public.x[0].tolist()  # Friday, 2024-05-03 00:30
    turns = [0.5 / 24, 4 / 7, 4 / 12]
    wanted = [f(2 * np.pi * turn) for turn in turns for f in (np.sin, np.cos)]
    assert x == pytest.approx([0.0, *wanted], abs=1e-6)


@pytest.mark.parametrize("kind", ["text", "timestamp", "zone", "date32", "columns", "offset"])
def test_dates_of_every_type_give_the_same_order(tmp_path, kind):
    dates = DATES if kind != "date32" else [f"2024-05-{d:02d}" for d in range(1, 29)]
    table = dated(dates)
    column = table["when"].cast(pa.timestamp("s"))
    order = "when"
    if kind == "timestamp":
        table = table.set_column(0, "when", column)
    if kind == "zone":
        table = table.set_column(0, "when", column.cast(pa.timestamp("ns", "Europe/Berlin")))
    if kind == "date32":
        table = table.set_column(0, "when", column.cast(pa.date32()))
    if kind == "offset":
        table = dated([f"{date.replace(' ', 'T')}+00:00" for date in dates])
    if kind == "columns":
        import pyarrow.compute as pc

        parts = {name: getattr(pc, name)(column) for name in ("year", "month", "day", "hour")}
        table, order = pa.table({**parts, "load": table["load"]}), list(parts)
    pq.write_table(table.take(np.arange(len(dates))[::-1]), tmp_path / "a.parquet")
    settings = ask_load(
        tmp_path / "a.parquet",
        {
            "order_column": order,
            "window": 2,
            "stride": 3,
            "horizon": [1],
            "calendar": ["hour"],
        },
        num_clients=1,
        public_share=0.3,
    )
    data = load(settings, 0)
    assert torch.equal(data.public.x[:, 0, 0] + 2, data.public.y)
    assert data.example_shape == (3, 2)


def broken_date(name, values):
    table = dated()
    return table.set_column(0, name, [values])


@pytest.mark.parametrize(
    ("when", "message"),
    [
        ([*DATES[:-1], "soon"], "series.order_column: row 35 of column 'when' is no date; write"),
        ([*DATES[:-1], None], "series.order_column: row 35 of column 'when' has no value; fill"),
        ([*DATES[:-1], DATES[0]], "series.order_column: rows 0 and 35 are of one series"),
        ([[1.0]] * 36, "series.order_column: column 'when' holds list"),
        (list(range(36)), "series.calendar: order_column when holds numbers, no dates"),
    ],
)
def test_an_order_that_is_none_is_refused(tmp_path, when, message):
    pq.write_table(broken_date("when", when), tmp_path / "a.parquet")
    series = {"order_column": "when", "horizon": [1], "calendar": ["hour"]}
    settings = ask_load(tmp_path / "a.parquet", series)
    with pytest.raises(DataError, match=message):
        load(settings, 0)


@pytest.mark.parametrize(
    ("part", "value"), [("month", 13), ("day", 31), ("day", 1.5), ("hour", 24), ("year", None)]
)
def test_a_row_whose_columns_make_no_date_is_refused(tmp_path, part, value):
    columns = {"year": [2024.0] * 9, "month": [4.0] * 9, "day": [*map(float, range(1, 10))]}
    columns |= {"hour": [0.0] * 9, "load": [0.0] * 9}
    columns[part] = [*columns[part][:-1], value]
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    series = {"order_column": ["year", "month", "day", "hour"], "horizon": [1]}
    settings = ask_load(tmp_path / "a.parquet", series)
    with pytest.raises(DataError, match=f"row 8 is no date, by its column '{part}'"):
        load(settings, 0)


@pytest.mark.parametrize(
    ("series", "keys", "message"),
    [
        ({"window": 61}, {}, "series.window: 61 rows of a window, but the longest series has 60"),
        (
            {"window": 50, "lags": [6], "horizon": [6]},
            {"label_column": "value", "task": "regression"},
            "50 rows of a window, 6 before it, 6 after it, but the longest series has 60 rows",
        ),
        ({"by": ["devise"]}, {}, "series.by: no column 'devise' in .*did you mean 'device'"),
        ({"order_column": "time"}, {}, "series.order_column: no column 'time'"),
        ({"by": []}, {}, "rows 0 and 60 are of one series and have the same value; name"),
        (
            {"window": 10, "stride": 5},
            {"client_column": None, "public_clients": [], "public_share": 0.2, "by": 0},
            "series: windows share rows, so they cannot be dealt",
        ),
        (
            {"window": 10, "stride": 5},
            {"client_column": None, "public_clients": [], "num_clients": 2, "by": 0},
            "num_clients: windows share rows.*or num_clients = 1, or set series.stride",
        ),
        (
            {"window": 40, "stride": 1},
            {},
            "test_share: no window is left for the other parts.*; lower test_share, or series.window",
        ),
        (
            {"window": 40, "stride": 1},
            {"public_clients": [], "public_share": 0.1, "test_clients": ["cat"]},
            "public_share: no window is left for the other parts.*; lower public_share, or series",
        ),
        (
            {"window": 10, "stride": 1},
            {"public_clients": [], "public_share": 0.4, "validation": 0.9},
            "validation: no window is left for the other parts.*; lower validation, or series",
        ),
    ],
)
def test_series_that_do_not_fit_the_table_are_refused(tmp_path, series, keys, message):
    if "by" in keys:
        keys = {key: value for key, value in keys.items() if key != "by"}
        series = {**series, "by": ["who", "device"]}
    with pytest.raises(DataError, match=message):
        loaded(tmp_path, readings(), series, **keys)


def test_a_client_without_a_window_is_named(tmp_path):
    table = pa.concat_tables([readings(("ann", "bob")), readings(("cat",), rows=8)])
    with pytest.raises(DataError, match="no series of client 'cat' has 10 rows without a gap"):
        loaded(tmp_path, table, {"window": 10})


def test_ties_may_keep_the_order_of_the_file(tmp_path):
    table = readings(t=[t // 2 for t in readings()["t"].to_pylist()])
    data = loaded(tmp_path, table, {"window": 10, "ties": "keep"}, feature_columns=["value"])
    assert (data.public.x.diff(dim=2) == 1).all()


def test_a_list_of_one_column_is_that_column():
    one = SeriesSettings(window=2, order_column=["when"], max_gap=60)
    assert one.order_columns == ("when",)


@pytest.mark.parametrize(
    ("series", "message"),
    [
        ({"window": 0}, "greater than or equal to 1"),
        ({"by": ["a", "a"]}, ".*has a value twice"),
        ({"order_column": None, "max_gap": 1.0}, "it needs dates; give"),
        ({"order_column": ["day", "year"]}, "is no date; name one column, or the first ones of"),
    ],
)
def test_settings_that_do_not_fit_are_refused(series, message):
    with pytest.raises(ValidationError, match=message):
        DataSettings(source="csv", path="a.csv", series=series)
    with pytest.raises(ValidationError, match="a forecast predicts numbers, but the task is bin"):
        DataSettings(source="csv", path="a.csv", task="binary", series={"horizon": [1]})
    with pytest.raises(ValidationError, match="source 'digits' is no table"):
        DataSettings(source="digits", series={})


def test_neighbouring_windows_overlap():
    asked = SeriesSettings(window=4, stride=3)
    series, usable = np.zeros(20, np.int64), np.ones(20, bool)
    assert overlap(find_windows(series, None, usable, asked).spans)
    assert not overlap(find_windows(series, None, usable, SeriesSettings(window=4)).spans)


@pytest.mark.recipe
@pytest.mark.skipif(not (REAL / "phone_watch_har").is_dir(), reason="needs FEDPRESS_DATA")
def test_windows_of_phones_and_watches_stay_within_a_recording():
    path = REAL / "phone_watch_har" / "har.parquet"
    series = {
        "window": 250,
        "stride": 125,
        "by": ["execution", "device"],
        "order_column": "timestamp",
        "ties": "keep",
        "max_gap": 1000,
    }
    settings = DataSettings(
        source="parquet",
        path=path,
        client_column="subject",
        public_clients=["s01", "s02"],
        test_clients=["s23"],
        mean=[0],
        std=[1],
        series=series,
    )
    data = load(settings, 0)
    assert data.example_shape == (6, 250)
    assert len(data.class_names) == 5
    # A twin that reads the rows of the person for testing with a plain loop.
    table = pq.read_table(path)
    rows = [row for row in table.to_pylist() if row["subject"] == "s23"]
    names = ("x_acc", "y_acc", "z_acc", "x_gyro", "y_gyro", "z_gyro")
    wanted = []
    recordings = sorted({(row["execution"], row["device"]) for row in rows})
    for recording in recordings:
        own = [row for row in rows if (row["execution"], row["device"]) == recording]
        own.sort(key=lambda row: row["timestamp"])
        assert np.diff([row["timestamp"] for row in own]).max() <= 1000
        values = np.array([[row[name] for name in names] for row in own], np.float32)
        wanted += [values[at : at + 250].T for at in range(0, len(own) - 249, 125)]
    assert torch.equal(data.test.x, torch.from_numpy(np.stack(wanted)))


@pytest.mark.recipe
@pytest.mark.skipif(not (REAL / "air_quality").is_dir(), reason="needs FEDPRESS_DATA")
def test_forecasts_of_air_quality_have_the_persistence_of_the_file():
    path = REAL / "air_quality" / "beijing.parquet"
    settings = DataSettings(
        source="parquet",
        path=path,
        client_column="station",
        public_clients=["Aotizhongxin"],
        test_clients=["Wanliu"],
        label_column="PM2.5",
        task="regression",
        missing="mean",
        feature_columns=["PM2.5", "TEMP"],
        mean=[0],
        std=[1],
        series={
            "window": 24,
            "stride": 6,
            "order_column": ["year", "month", "day", "hour"],
            "max_gap": 3600,
            "horizon": [1, 24],
            "calendar": ["hour"],
        },
    )
    data = load(settings, 0)
    assert data.example_shape == (4, 24)
    table = pq.read_table(path)
    values = table.filter(pa.compute.equal(table["station"], "Wanliu"))["PM2.5"].to_numpy()
    last = np.arange(23, len(values) - 24, 6)
    complete = np.isfinite(values[last + 1]) & np.isfinite(values[last + 24])
    assert len(data.test) == complete.sum()
    assert data.test.y[:, 0].numpy() == pytest.approx(values[last + 1][complete])
    assert data.test.y[:, 1].numpy() == pytest.approx(values[last + 24][complete])
    now = values[last][complete]
    known = np.isfinite(now)
    assert data.test.x[:, 0, -1].numpy()[known] == pytest.approx(now[known])
