import json

import pytest
import torch

from fedpress.core.examples import Arrays, Preprocess
from fedpress.data.dataset import FederatedData
from fedpress.errors import DataError


def arrays(n: int, *, shape: tuple[int, ...] = (2,), label: int = 0) -> Arrays:
    return Arrays(torch.zeros(n, *shape), torch.full((n,), label))


def make(**changes) -> FederatedData:
    parts = {
        "name": "tiny",
        "clients": {"a": arrays(2), "b": arrays(3, label=1)},
        "public": arrays(0),
        "validation": arrays(0),
        "test": arrays(1),
        "num_classes": 2,
        "class_names": ("no", "yes"),
        "preprocess": Preprocess(),
    }
    return FederatedData(**{**parts, **changes})


def test_describe_counts_labels_per_client_in_plain_json():
    text = make().describe()
    assert json.loads(json.dumps(text)) == text
    assert text["clients"] == {
        "a": {"examples": 2, "labels": [2, 0]},
        "b": {"examples": 3, "labels": [0, 3]},
    }
    assert (text["private"], text["public"], text["test"], text["shape"]) == (5, 0, 1, [2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clients": {}, "test": arrays(0)}, "there is no client"),
        ({"clients": {"a": arrays(0)}}, "client 'a' has no examples"),
        ({"class_names": ("no",)}, "2 classes but 1 class names"),
        (
            {"test": arrays(1, label=2)},
            "test part: some labels are no class number; give class numbers from 0 to 1",
        ),
        ({"test": arrays(1, shape=(3,))}, r"test part: examples of \[3\]"),
        (
            {"public": Arrays(torch.tensor([[1.0, float("nan")]]), torch.tensor([0]))},
            "public part: some features are NaN",
        ),
        (
            {"validation": Arrays(torch.zeros(1, 2, dtype=torch.int32), torch.tensor([0]))},
            "torch.int32; give uint8",
        ),
        (
            {"public": Arrays(torch.zeros(1, 2), torch.tensor([0.5]))},
            "labels of type torch.float32",
        ),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(changes, message):
    with pytest.raises(DataError, match=message):
        make(**changes)
