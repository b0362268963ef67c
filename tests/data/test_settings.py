from pathlib import Path

import pytest
from pydantic import ValidationError

from fedpress.data.partition import Shards
from fedpress.data.settings import DataSettings


def test_settings_survive_a_round_trip_through_json():
    settings = DataSettings(
        source="csv",
        path="a.csv",
        partition={"kind": "shards", "classes_per_client": 3},
        validation=20,
        client_column="who",
    )
    assert settings.partition == Shards(classes_per_client=3)
    assert DataSettings.model_validate_json(settings.model_dump_json()) == settings


def test_validation_is_a_number_of_rows_or_a_share():
    assert isinstance(DataSettings(source="digits", validation=2000).validation, int)
    assert DataSettings(source="digits", validation=0.25).validation == 0.25


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"source": "cifar"}, "no source 'cifar' .* did you mean 'cifar10'"),
        ({"source": "csv"}, "source 'csv' needs a path"),
        ({"source": "digits", "mean": [0.5]}, "1 values of mean but 0 of std"),
        ({"source": "digits", "mean": [0.5], "std": [0.0]}, "greater than 0"),
        (
            {"source": "digits", "public_share": 0.5, "public_clients": ["a"]},
            "public_share: public_clients is given, too",
        ),
        (
            {"source": "digits", "test_clients": ["a"], "public_clients": ["a"]},
            "test_clients: client 'a' is in public_clients, too",
        ),
        ({"source": "digits", "path": "~nobody_of_this_name/x"}, "no home folder"),
        ({"source": "digits", "encoding": "a\0"}, "no encoding"),
        ({"source": "digits", "validation": -1}, "validation"),
        ({"source": "digits", "validation": 1.5}, "validation"),
        ({"source": "digits", "test_share": 1.0}, "less than 1"),
        ({"source": "digits", "num_clients": 0}, "greater than or equal to 1"),
        ({"source": "digits", "colour": 1}, "colour"),
    ],
)
def test_wrong_settings_are_refused(keys, message):
    with pytest.raises(ValidationError, match=message):
        DataSettings(**keys)


def test_a_path_may_start_at_the_home_folder():
    assert DataSettings(source="digits", path="~/x").path == Path.home() / "x"


def test_settings_have_a_json_schema_that_names_the_partitions():
    schema = DataSettings.model_json_schema()
    assert {"Iid", "Quantity", "Dirichlet", "Shards", "Natural"} <= set(schema["$defs"])
