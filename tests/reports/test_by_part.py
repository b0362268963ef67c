"""Values for each horizon, class and time: what is drawn, and from which numbers."""

import pytest

from fedpress.reports.by_part import by_client, by_part, survival_curves
from fedpress.reports.draw import svg
from fedpress.reports.federated import client_scores

FORECAST = {
    "kind": "train",
    "task": "forecast",
    "parts": ["1h", "6h", "24h"],
    "mae_by_horizon": [1.0, 2.0, 4.0],
    "rmse_by_horizon": [2.0, 3.0, 5.0],
    "skill_by_horizon": [-0.1, 0.2, 0.3],
}


def drawn(figure):
    """Returns the rows of a figure: name -> value."""
    (panel,) = figure.panels
    return dict(zip(panel.y.names, panel.series[0].x, strict=True))


def test_a_forecast_has_a_figure_for_each_metric_with_a_row_for_each_horizon():
    mae, rmse, skill = by_part(FORECAST)
    assert mae.title == "MAE by horizon: train"
    assert drawn(mae) == {"1h": 1.0, "6h": 2.0, "24h": 4.0}
    assert drawn(rmse)["24h"] == 5.0
    assert drawn(skill)["1h"] == -0.1
    # A bar below 0 has no length, so there are dots.
    assert [figure.panels[0].series[0].kind for figure in (mae, skill)] == ["rows", "dots"]


def test_without_persistence_there_is_no_figure_of_the_skill():
    assert len(by_part({**FORECAST, "skill_by_horizon": None})) == 2


def test_shares_are_percent_and_a_class_that_is_not_there_has_no_bar():
    stage = {"task": "segmentation", "parts": ["sky", "sea", "cat"]}
    (iou,) = by_part({**stage, "iou_by_class": [0.5, 0.25, None]})
    assert drawn(iou) == {"sky": 50.0, "sea": 25.0, "cat": None}
    assert "from 25.00% to 50.00%" in iou.caption


def test_labels_of_a_multilabel_task_have_their_own_figures():
    stage = {"task": "multilabel", "parts": ["rain", "wind"], "auc_by_label": [0.75, None]}
    f1, auc = by_part({**stage, "f1_by_label": [0.5, 0.25]})
    assert (f1.title, auc.title) == ("F1 by label: ?", "AUC by label: ?")
    assert drawn(f1) == {"rain": 0.5, "wind": 0.25}
    assert drawn(auc) == {"rain": 0.75, "wind": None}


def test_a_task_of_the_user_is_drawn_by_what_its_result_describes():
    found = {"key": "hit_by_box", "name": "hits", "share": True}
    stage = {"task": "not_loaded:Boxes", "task_by_part": [found], "parts": ["big", "small"]}
    (hits,) = by_part({**stage, "hit_by_box": [0.5, 0.25]})
    assert hits.title == "Hits by box: ?"
    assert drawn(hits) == {"big": 50.0, "small": 25.0}
    assert by_part({**stage, "hit_by_box": [0.5, 0.25], "task_by_part": [3]}) == []


def test_the_recall_is_the_diagonal_of_the_confusion_by_the_sums_of_its_rows():
    stage = {"task": "classification", "parts": ["cat", "dog"], "confusion": [[3, 1], [5, 5]]}
    (recall,) = by_part(stage)
    assert recall.title.startswith("Recall by class")
    assert drawn(recall) == {"cat": 75.0, "dog": 50.0}
    unnamed = {key: value for key, value in stage.items() if key != "parts"}
    assert drawn(by_part(unnamed)[0]) == {"0": 75.0, "1": 50.0}


def test_the_main_metric_of_each_client_is_drawn():
    stage = {"kind": "train", "task": "binary", "test_clients": ["north", "south", "lung clinic"]}
    figure = by_client({**stage, "auc_by_client": [0.75, 0.5, None]})
    assert figure.title == "AUC by client: train"
    assert drawn(figure) == {"north": 0.75, "south": 0.5, "lung clinic": None}
    assert by_client(stage) is None
    assert by_client({**stage, "auc_by_client": [None, None, None]}) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"mae_by_horizon": "many"},
        {"mae_by_horizon": [None, None, None]},
        {"mae_by_horizon": [1.0]},
        {"mae_by_horizon": list(range(1, 100))},
        {"confusion": 3},
        {"confusion": [[1], [2], [3]]},
    ],
)
def test_strange_values_and_too_many_parts_have_no_figure(wrong):
    assert by_part({"task": "forecast", "parts": ["a", "b"], **wrong}) == []


SURVIVAL = {
    "name": "train",
    "task": "survival",
    "edges": [6.0, 12.0],
    "survival_by_edge": [0.9, 0.7],
    "kaplan_meier_by_edge": [0.85, 0.75],
}


def test_survival_is_drawn_from_the_start_beside_what_was_observed():
    figure = survival_curves(SURVIVAL)
    predicted, observed = figure.series
    assert list(predicted.x) == list(observed.x) == [0.0, 6.0, 12.0]
    assert list(observed.y) == [100.0, 85.0, 75.0]
    assert "at most 5.0 percentage points" in figure.caption
    assert survival_curves({**SURVIVAL, "survival_by_edge": [0.9]}) is None
    assert survival_curves({"task": "binary"}) is None


@pytest.mark.parametrize("figure", [*by_part(FORECAST), survival_curves(SURVIVAL)])
def test_every_figure_is_drawn(figure):
    assert figure.title in svg(figure, "figure-1")


def test_clients_of_a_metric_below_one_are_told_apart():
    stage = {"task": "survival", "client_concordance": {"a": 0.724, "b": 0.783}}
    labels = client_scores(stage).panels[0].series[0].labels
    assert list(labels) == ["0.724", "0.783"]
