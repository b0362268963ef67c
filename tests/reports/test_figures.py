from __future__ import annotations

from pathlib import Path

import pytest
from folders import CLIENTS, federate, prune, result, train, write_run

from fedpress.reports.federated import bytes_over_rounds, client_scores, score_over_rounds
from fedpress.reports.figures import channels_kept, figures, score_and_size, training_curve
from fedpress.reports.reading import Run, read_run


def test_a_whole_run_has_all_figures_in_order(tmp_path):
    titles = [figure.title for figure in figures(read_run(write_run(tmp_path)))]
    assert titles == [
        "Accuracy against size",
        "Training: train",
        "Channels kept: prune",
        "Training: fine-tune",
        "Accuracy and privacy spent: federate",
        "Accuracy over bytes: federate",
        "Bytes sent: federate",
    ]
    titles = [figure.title for figure in figures(read_run(write_run(tmp_path, private=False)))]
    assert titles[-1] == "Accuracy per client: federate"


def test_every_figure_has_a_caption_and_titled_axes(tmp_path):
    for figure in figures(read_run(write_run(tmp_path))):
        assert figure.x.title
        assert all(panel.y.title or panel.y.names for panel in figure.panels)
        assert len(figure.caption) > 20


def test_without_data_there_is_no_figure():
    assert figures(Run(Path("x"))) == []
    assert training_curve("x", []) is None
    assert score_over_rounds("x", []) is None
    assert bytes_over_rounds("x", [{"round": 1}]) is None
    assert client_scores({"client_accuracy": {}}) is None
    assert channels_kept("x", {"layers": "none"}) is None
    assert score_and_size([{"accuracy": 0.5, "file_bytes": 3}]) is None


def test_strange_values_leave_gaps_instead_of_failing():
    steps = [
        {"epoch": 1, "accuracy": float("nan"), "loss": "?"},
        {"epoch": "two", "accuracy": 0.5, "image_size": "big"},
    ]
    figure = training_curve("x", steps)
    assert figure is not None
    assert figure.series[0].y == [None, 50.0]
    assert figure.series[0].x == [1.0, None]


def test_the_epochs_where_the_image_size_changes_are_marked():
    figure = training_curve("x", train(0, "train", 7, 0.94))
    assert figure is not None
    assert [note.text for note in figure.notes] == ["16 px", "24 px", "32 px"]
    assert figure.rules == [4.5, 6.5]


def test_kept_channels_are_counted_against_those_before():
    record = prune(1)
    figure = channels_kept("prune", record)
    assert figure is not None
    before, after = figure.series
    assert before.x == [layer["before"] for layer in record["layers"]]
    assert after.x == [layer["after"] for layer in record["layers"]]
    share = sum(after.x) / sum(before.x)
    assert figure.caption.startswith(f"{100 * share:.1f}% of all channels")


def test_epsilon_has_a_panel_only_if_it_was_spent():
    private = score_over_rounds("x", federate(3, CLIENTS, True))
    plain = score_over_rounds("x", federate(3, CLIENTS, False))
    assert private is not None
    assert plain is not None
    assert [series.name for series in private.series] == ["accuracy", "ε spent"]
    assert [series.name for series in plain.series] == ["accuracy"]


def test_bytes_so_far_end_at_the_sum_of_the_rounds():
    rounds = federate(3, CLIENTS, True)
    figure = bytes_over_rounds("x", rounds)
    assert figure is not None
    ends = [series.y[-1] for series in figure.series if "so far" in series.name]
    assert ends == [
        sum(r["bytes_up"] for r in rounds) / 1e9,
        sum(r["bytes_down"] for r in rounds) / 1e9,
    ]


def test_bytes_before_the_first_round_are_told_beside_the_figure():
    rounds = federate(3, CLIENTS, True)
    rounds[0] |= {"set_up_bytes_up": 4_000, "set_up_bytes_down": 6_000}
    figure = bytes_over_rounds("x", rounds)
    assert figure is not None
    assert figure.caption.endswith(
        "Before the first round, to set up: 4.00 kB up and 6.00 kB down."
    )


def test_many_clients_are_shown_as_a_distribution():
    few = client_scores({"client_accuracy": {f"c{i}": 0.5 for i in range(40)}})
    many = client_scores({"client_accuracy": {f"c{i}": 0.5 for i in range(41)}})
    assert few is not None
    assert many is not None
    assert (few.series[0].kind, many.series[0].kind) == ("dots", "bars")
    assert sum(many.series[0].y) == 41


def test_names_with_the_same_end_keep_their_own_rows():
    names = ["<b>a</b>" + "x" * 40, "<i>b</i>" + "x" * 40]
    figure = client_scores({"client_accuracy": dict.fromkeys(names, 0.5)})
    assert figure is not None
    (dots,) = figure.series
    assert dots.y == [0, 1]
    assert list(figure.panels[0].y.names) == names


def test_stages_at_nearly_the_same_point_share_a_label_and_the_first_one_is_labelled():
    figure = score_and_size(result("x", CLIENTS, True)["stages"])
    assert figure is not None
    (path,) = figure.series
    assert path.labels == ["1. train", "2. prune", "3. fine-tune\n4. federate\n5. export", "", ""]
    assert path.x == pytest.approx([44.76, 13.43, 13.43, 13.43, 13.52])
    assert figure.x.title == "file (MB)"
