"""Targets of a table: numbers and flags are read, refused and dealt as the task says."""

import pytest
import torch
from pydantic import ValidationError

from fedpress.data import DataSettings, load
from fedpress.data.partition_labels import (
    partition_labels_of_flags,
    partition_labels_of_numbers,
)
from fedpress.errors import DataError

ROWS = 40


@pytest.fixture
def table(tmp_path):
    """Forty rows of two inputs, a price, a weight, two flags, and a word."""
    lines = ["a,b,price,weight,red,round,kind"]
    for i in range(ROWS):
        truth = ("true", "false")[i % 2]
        lines.append(f"{i},{i * i},{i + 0.5},{100 - i},{i % 2},{truth},{'xy'[i % 2]}")
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def read(path, **changes):
    settings = {
        "source": "csv",
        "path": path,
        "num_clients": 2,
        "public_share": 0.25,
        "validation": 0,
        "feature_columns": ("a", "b"),
        **changes,
    }
    return load(DataSettings(**settings), 0)


def test_one_column_of_numbers_is_a_regression_standardised_by_the_public_part(table):
    data = read(table, task="regression", label_column="price")
    assert data.task.kind == "regression"
    assert data.task.names == ("price",)
    assert data.public.y.dtype == torch.float32
    assert data.public.y.dim() == 1
    assert data.task.mean[0] == pytest.approx(float(data.public.y.mean()))
    assert data.task.std[0] == pytest.approx(float(data.public.y.std(correction=0)), rel=1e-5)
    assert (data.num_classes, data.class_names) == (0, ())
    assert torch.equal(data.public.y, data.public.x[:, 0] + 0.5)


def test_several_columns_are_several_numbers(table):
    data = read(table, task="regression", label_column=["price", "weight"])
    assert data.task.outputs == 2
    assert torch.equal(data.test.y.sum(1), torch.full((len(data.test),), 100.5))


def test_numbers_and_truth_values_are_flags(table):
    data = read(table, task="multilabel", label_column=["red", "round"])
    assert data.task.names == ("red", "round")
    assert torch.equal(data.test.y.sum(1), torch.ones(len(data.test)))


def test_two_classes_are_a_binary_task_with_one_output(table):
    data = read(table, task={"kind": "binary", "threshold": 0.3}, label_column="kind")
    assert (data.task.outputs, data.task.names, data.task.threshold) == (1, ("x", "y"), 0.3)
    assert data.public.y.dtype == torch.int64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_column": "price"}, "or set task = 'regression'"),
        ({"label_column": ["price", "weight"]}, "2 columns, but a classification has one"),
        ({"task": "regression", "label_column": "kind"}, "hold no finite number"),
        ({"task": "multilabel", "label_column": ["red", "price"]}, "'price'.*than 0 and 1"),
    ],
)
def test_columns_of_another_kind_are_refused(table, changes, message):
    with pytest.raises(DataError, match=message):
        read(table, **changes)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("regresion", "no task 'regresion'.*did you mean 'regression'"),
        ({"kind": "binary", "treshold": 0.3}, "no option 'treshold'.*did you mean 'threshold'"),
    ],
)
def test_unknown_tasks_and_options_are_refused(task, message):
    with pytest.raises(ValidationError, match=message):
        DataSettings(source="digits", task=task)


def test_a_source_of_classes_learns_no_numbers():
    with pytest.raises(
        DataError, match="regression learns from numbers, but 'digits' gives classes"
    ):
        load(DataSettings(source="digits", task="regression"), 0)


def test_a_missing_target_is_refused_or_its_row_dropped(table):
    text = table.read_text().replace("\n3,9,3.5,", "\n3,9,,")
    table.write_text(text)
    with pytest.raises(DataError, match="label column 'price': line 5 has no value"):
        read(table, task="regression", label_column="price")
    data = read(table, task="regression", label_column="price", missing="drop")
    rows = [*data.clients.values(), data.public, data.test]
    assert sum(map(len, rows)) == ROWS - 1


def test_numbers_are_dealt_by_tenths_and_flags_by_what_occurs_together(table):
    groups = partition_labels_of_numbers(
        torch.randn(100, generator=torch.Generator().manual_seed(0))
    )
    assert groups.bincount().tolist() == [10] * 10
    assert partition_labels_of_numbers(torch.tensor([3.0])).tolist() == [0]
    assert partition_labels_of_numbers(torch.zeros(0)).tolist() == []
    flags = torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
    assert partition_labels_of_flags(flags).tolist() == [0, 1, 0]
    data = read(
        table,
        task="regression",
        label_column="price",
        partition={"kind": "shards", "classes_per_client": 5},
    )
    first, second = (part.y for part in data.clients.values())
    tenths = [set(((y - 0.5) // 4).tolist()) for y in (first, second)]
    assert len(tenths[0] | tenths[1]) > 6, "each holds five tenths of the values"
