from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import of_class, pictures

from fedpress.reports.labels import CHARACTER
from fedpress.reports.plot import Axis, Figure, Panel, Series


@pytest.mark.recipe
@given(
    points=st.lists(st.tuples(st.floats(0, 100), st.floats(0, 10)), min_size=1, max_size=12),
    name=st.text("abcdefgh=.0123456789", min_size=1, max_size=80),
)
@settings(max_examples=40, deadline=None)
def test_labels_stay_inside_the_picture(points, name):
    names = [f"{name}{i}" for i in range(len(points))]
    series = Series(
        "points", "p", [a for a, _ in points], [b for _, b in points], hover=names, labels=names
    )
    figure = Figure(
        "t", "c", Axis("x", low=0.0), [Panel(Axis("y", low=0.0, high=10.0), [series])], wide=True
    )
    for picture in pictures(figure):
        width, height = (float(n) for n in picture.get("viewBox").split()[2:])
        labels = of_class(picture, "label")
        assert len(labels) == len(points)
        for label in labels:
            wide = len(label.text) * CHARACTER
            left = float(label.get("x")) - (wide if label.get("text-anchor") == "end" else 0)
            assert left >= -0.1
            assert left + wide <= width + 0.1
            assert 0 <= float(label.get("y")) <= height
