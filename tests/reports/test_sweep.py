from __future__ import annotations

from fedpress.reports.sweep import sweep_outcome, sweep_table


def variant(name, accuracy, size, *, error=None, spread=0.01, **more):
    stage = {
        "kind": "train",
        "name": "train",
        "accuracy": accuracy,
        "accuracy_error": spread,
        "test_examples": 500,
        "file_bytes": size,
        "parameters": size // 4,
        **more,
    }
    stages = [] if accuracy is None else [stage]
    return {"name": name, "overrides": [], "stages": stages, "error": error}


def test_the_smallest_variant_that_cannot_be_told_from_the_best_is_named():
    page = {
        "variants": [
            variant("keep=1", 0.95, 4000),
            variant("keep=0.5", 0.945, 2000),
            variant("keep=0.3", 0.941, 1200),
            variant("keep=0.1", 0.90, 400),
        ]
    }
    assert sweep_outcome(page) == (
        "Of 4 variants, keep=1 has the best test accuracy, 95.00% ± 1.00 with 4.00 kB; keep=0.3 is the smallest within "
        "one standard error of it: 94.10% ± 1.00 with 1.20 kB."
    )


def test_the_best_variant_stands_alone_where_no_error_is_known_or_no_other_is_near():
    far = {"variants": [variant("a", 0.95, 4000), variant("b", 0.90, 400)]}
    assert sweep_outcome(far) == (
        "Of 2 variants, a has the best test accuracy, 95.00% ± 1.00 with 4.00 kB."
    )
    unknown = {"variants": [variant("a", 0.95, 4000, spread=None), variant("b", 0.949, 400)]}
    assert sweep_outcome(unknown).endswith("95.00% with 4.00 kB.")


def test_a_lower_error_is_the_better_one():
    line = {"task": "regression", "mae_error": 0.1}
    page = {
        "variants": [
            variant("a", 0.0, 4000, **line, mae=2.0),
            variant("b", 0.0, 400, **line, mae=2.05),
        ]
    }
    told = sweep_outcome(page)
    assert told.startswith("Of 2 variants, a has the best test MAE, 2.000 ± 0.100")
    assert "b is the smallest" in told


def test_seeds_are_one_variant_with_a_mean():
    page = {"variants": [variant("k=1 seed=0", 0.9, 100), variant("k=1 seed=1", 0.8, 100)]}
    assert sweep_outcome(page) == (
        "Of 2 variants, k=1 has the best test accuracy, 85.00% ± 7.07 (mean of 2 seeds) with 100 B."
    )


def test_failed_and_unfinished_sweeps_say_so():
    failed = variant("a", None, 0, error="no")
    assert sweep_outcome({"variants": [failed]}) == "The only variant failed."
    assert sweep_outcome({"variants": [failed, variant("b", None, 0)]}).startswith("None of 2")
    assert sweep_outcome({"variants": []}).startswith("None of 0")
    mixed = sweep_outcome({"variants": [failed, variant("b", 0.9, 100)]})
    assert mixed.startswith("Of 2 variants (1 failed), b has the best")


def test_the_standard_error_stands_in_the_table_for_one_seed():
    page = {"variants": [variant("a", 0.95, 4000)]}
    assert sweep_table(page).rows[0][2] == "95.00% ± 1.00"
