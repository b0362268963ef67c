"""The data of a run as a page shows them: columns, gaps, words, and the classes of each client."""

import pytest

from fedpress.reports.data import classes_of_clients, data_section
from fedpress.reports.draw import svg

AGE = {
    "name": "age",
    "type": "number",
    "missing": 5,
    "distinct": 9,
    "numbers": [20.0, 50.0, 80.0],
    "histogram": [4, 0, 11],
    "rows": 20,
}
JOB = {
    "name": "job",
    "type": "word",
    "missing": 0,
    "distinct": 9,
    "words": [["cook", 9]],
    "rows": 20,
}
CLASSES = {
    "rows": "public",
    "classes": ["cat", "dog"],
    "labels": [10, 10],
    "clients": {"anna": [3, 1], "bob": [0, 4]},
}


def test_a_column_has_its_gaps_its_range_and_a_histogram_with_intervals():
    (age,) = data_section({"rows": "public", "columns": [AGE]}).columns
    assert (age.name, age.type, age.missing) == ("age", "number", "5 (25.0%)")
    assert 'width="15"' in age.gaps  # a quarter of 60 pixels
    assert age.content == "20 to 80, median 50"
    assert "4 rows from 20 to 40" in age.picture
    assert "11 rows from 60 to 80" in age.picture


def test_words_are_counted_and_those_that_are_not_shown_too():
    (job,) = data_section({"rows": "all", "columns": [JOB]}).columns
    assert job.content == "cook 9, 8 more"
    assert job.missing == "none"
    assert "cook: 9" in job.picture


def test_the_section_says_which_rows_were_looked_at():
    assert "by the 20 public rows alone" in data_section({"columns": [AGE]}).looked_at
    everything = data_section({"rows": "all", "columns": [AGE], "more_columns": 3})
    assert "All 20 rows were looked at, private ones too" in everything.looked_at
    assert everything.more == "3 more columns are not shown."


def test_cells_are_as_dark_as_the_share_of_the_class_in_its_row():
    figure = classes_of_clients(CLASSES)
    assert figure.title == "Classes of each client"
    assert list(figure.panels[0].y.names) == ["public", "anna", "bob"]
    drawn = svg(figure, "figure-1")
    assert "anna: 3 of class cat" in drawn
    # 0.08 + 0.92 * 3 / 4
    assert 'fill-opacity="0.77"' in drawn
    assert drawn.count('class="cell empty mark"') == 3  # bob has no cat, at three widths


def test_without_clients_the_figure_says_that_none_was_counted():
    alone = {key: value for key, value in CLASSES.items() if key != "clients"}
    figure = classes_of_clients(alone)
    assert figure.title == "Classes of the public rows"
    assert "Private rows were not counted" in figure.caption
    assert (
        "60 more clients are not drawn"
        in classes_of_clients(CLASSES | {"more_clients": 60}).caption
    )


def test_names_are_text_and_no_html():
    wrong = data_section({"columns": [JOB | {"words": [["<b>", 3]]}]})
    assert "<b>" not in wrong.columns[0].picture
    assert "<b>" not in svg(classes_of_clients(CLASSES | {"classes": ["<b>", "dog"]}), "figure-1")


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        3,
        {},
        {"columns": 3},
        {"columns": [3]},
        {"classes": ["a", "b"], "labels": [1]},
        {"classes": ["a", "b"], "labels": "many", "clients": [3]},
        {"classes": ["a"], "labels": [1]},
        {"classes": ["a", "b"], "labels": [0, 0]},
    ],
)
def test_strange_values_are_no_section(wrong):
    assert data_section(wrong) is None


@pytest.mark.parametrize(
    "wrong",
    [{"words": 3}, {"words": [3, ["a"]]}, {"histogram": "x", "numbers": [1, 2]}, {"dates": 3}],
)
def test_a_damaged_column_is_still_a_line(wrong):
    (one,) = data_section({"columns": [{"name": "a", "rows": 2, **wrong}]}).columns
    assert one.name == "a"
