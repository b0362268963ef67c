import pytest
from pydantic import ValidationError

from fedpress.errors import ModelError, RecipeError, TrainingError
from fedpress.models import load_model
from fedpress.reports.compression import density_over_epochs
from fedpress.stages.l0.stage import L0Stage
from tests.harness import Killed, begun, checked, finish, told
from tests.stages.recipes import HEAD, TRAIN, zeros

L0 = '[[stage]]\nkind = "l0"\nepochs = 6\nbatch_size = 32\nlr = 0.05\nkeep_first = false\nkeep_last = false\n'
CHANNELS = L0 + 'unit = "channels"\nround_to = 1\n'


def test_weights_end_at_the_exact_density_and_stay_zero(tmp_path):
    result = finish(HEAD + TRAIN + L0 + "density = 0.1\n" + TRAIN, tmp_path / "run")["stages"]
    entries, kept = zeros(tmp_path / "run" / "stages" / "1-l0")
    assert kept == round(0.1 * entries)
    assert result[1]["density"] == kept / entries
    assert result[1]["expected_density"] == pytest.approx(0.1, abs=0.02)
    assert zeros(tmp_path / "run" / "stages" / "2-train-2") == (entries, kept)
    assert result[2]["accuracy"] > 0.3


def test_the_expected_density_falls_and_lambda_is_told(tmp_path):
    finish(HEAD + L0 + "density = 0.2\n", tmp_path / "run")
    lines = [r for r in told(tmp_path / "run") if "expected_density" in r]
    path = [r["expected_density"] for r in lines]
    assert len(path) == 6
    assert path[0] > path[1] > path[2] > path[3]
    assert all(isinstance(r["lambda_"], float) for r in lines)
    drawn = density_over_epochs("l0", lines)
    assert [panel.y.title for panel in drawn.panels] == ["kept (%)", "λ"]


def test_channels_are_gone_and_the_count_is_met(tmp_path):
    line = finish(HEAD + CHANNELS + "density = 0.4\n" + TRAIN, tmp_path / "run")["stages"][0]
    spec, model = load_model(tmp_path / "run" / "stages" / "0-l0")
    left = sum(p.numel() for p in model.parameters()) / sum(
        p.numel() for p in spec.build_dense().parameters()
    )
    assert left == pytest.approx(0.4, abs=0.005)
    assert line["density"] == pytest.approx(left)
    assert line["parity_error"] < 1e-5
    assert spec.sparse == ()


@pytest.mark.recipe
@pytest.mark.parametrize("text", [L0 + "density = 0.2\n", CHANNELS + "density = 0.4\n"])
def test_a_killed_stage_goes_on_to_the_same_bits(tmp_path, left, text):
    finish(HEAD + text, tmp_path / "whole")
    run = begun(HEAD + text, tmp_path / "killed")
    for _ in range(40):
        next(run)
    with pytest.raises(Killed):
        run.throw(Killed())
    finish(HEAD + text, tmp_path / "killed", resume=True)
    assert left(tmp_path / "killed") == left(tmp_path / "whole")


def test_an_earlier_cut_stays(tmp_path):
    cut = '[[stage]]\nkind = "sparsify"\nkeep_first = false\nkeep_last = false\ndensity = 0.5\n'
    finish(HEAD + cut + L0 + "density = 0.2\n", tmp_path / "run")
    one, two = (load_model(tmp_path / "run" / "stages" / name) for name in ("0-sparsify", "1-l0"))
    for name in one[0].sparse:
        a, b = (dict(m.named_parameters())[name] for _, m in (one, two))
        assert not ((a == 0) & (b != 0)).any()
    entries, kept = zeros(tmp_path / "run" / "stages" / "1-l0")
    assert kept == round(0.2 * entries)


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        (CHANNELS + "density = 0.001\n", RecipeError, "cannot be reached"),
        (L0 + "density = 0.5\nkeep = ['nothing']\n", RecipeError, "no weight matches"),
        (L0 + "density = 0.5\nkeep = ['*']\n", ModelError, "no weight"),
        (L0 + "density = 0.5\n" + L0 + "density = 0.6\n", RecipeError, "are left"),
    ],
)
def test_what_cannot_be_is_found_before_the_run(text, kind, said):
    with pytest.raises(kind, match=said) as found:
        checked(HEAD + text)
    assert "recipe.stage" in str(found.value)


def test_checking_tells_what_will_be_left():
    weights, channels = (checked(HEAD + text + "density = 0.4\n")[0] for text in (L0, CHANNELS))
    assert weights["density"] == pytest.approx(0.4, abs=1e-3)
    assert channels["density"] == pytest.approx(0.4, abs=0.005)
    assert channels["parameters"] < weights["parameters"]


def test_the_end_needs_public_examples():
    with pytest.raises(TrainingError, match="public part has no examples"):
        checked(
            HEAD.replace("public_share = 0.3", "public_share = 0.0").replace(
                "validation = 60", "validation = 0"
            )
            + L0
            + "density = 0.4\n"
        )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"epochs": 0}, "epochs: .* give epochs=10"),
        ({"patience": 1}, "patience"),
        ({"ema": 0.9}, "ema"),
        ({"density": 0.0}, "greater than 0"),
        ({"unit": "filters"}, "'weights' or 'channels'"),
    ],
)
def test_settings_that_do_not_fit_together_say_so(changes, said):
    with pytest.raises(ValidationError, match=said):
        L0Stage(**{"kind": "l0", "epochs": 2, "density": 0.5, **changes})
