import json
import math

import pytest

from fedpress.workspace.records import Records


@pytest.mark.parametrize("count", [0, 1, 2, 3, 9])
def test_records_are_cut_to_whole_ones(tmp_path, count):
    records = Records(tmp_path)
    records.keep_first(count)  # there are none yet
    for number in range(2):
        records.add({"number": number})
    with open(records.path, "a") as file:
        file.write('{"number": 2, "torn')
    assert records.count() == 2
    records.keep_first(min(count, records.count()))
    assert [json.loads(x)["number"] for x in records.path.read_text().splitlines()] == list(
        range(min(count, 2))
    )


def test_a_record_holds_null_for_what_json_cannot_say(tmp_path):
    records = Records(tmp_path)
    records.add({"loss": math.nan, "rate": math.inf})
    assert records.path.read_text() == '{"loss": null, "rate": null}\n'
