"""Errors: fields that read as one sentence, survive a copy, and are renamed on the way up."""

import ast
import copy
import pickle
import re
from dataclasses import replace
from pathlib import Path

import pytest

from fedpress import errors
from fedpress.codecs import Clip, Quantize, Rotate
from fedpress.data import DataSettings, load
from fedpress.errors import (
    Argument,
    DataError,
    DivergedError,
    FedpressError,
    RecipeError,
    RunError,
    renaming,
)
from fedpress.federation.guarantee import Guarantee
from fedpress.federation.sampling import Cohort
from fedpress.federation.schedules.buffered import Buffered
from fedpress.federation.uplink import Uplink
from fedpress.federation.vectors import Payload
from fedpress.pipeline.places import errors_of_data, errors_of_stage, recipe_place
from fedpress.privacy.plan import PrivacyPlan
from fedpress.secagg import SecurePlan
from fedpress.stages.federate.stage import FederateStage
from fedpress.stages.table import STAGES
from tests.sources import nodes, tree

PACKAGE = Path(errors.__file__).parent
STAGE = FederateStage(kind="federate", name="tune", cohort=5)
PLAN = PrivacyPlan("client", clip_norm=1.0, sampling_prob=1.0, noise_multiplier=1.0)


def test_fields_read_as_one_sentence():
    error = RecipeError("got 0, expected a number above 0", place="clip_norm", cure="try 1.0")
    assert str(error) == "clip_norm: got 0, expected a number above 0; try 1.0"
    assert str(RecipeError("got 0", cure="try 1.0")) == "got 0; try 1.0"
    assert str(RecipeError("got 0", place="clip_norm")) == "clip_norm: got 0"


@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))]
)
def test_a_copy_keeps_class_and_fields(again):
    cure = ("give ", Argument("data", "SOURCE"))
    error = DivergedError("the loss is not finite", place="lr", cure=cure)
    error.place = "recipe.stage[0].lr"
    twin = again(error)
    assert type(twin) is DivergedError
    assert (twin.place, twin.problem, twin.cure) == (error.place, error.problem, cure)
    assert str(twin) == "recipe.stage[0].lr: the loss is not finite; give data=SOURCE"


def test_a_reader_writes_arguments_in_its_own_way():
    error = RecipeError("not known", place="shape", cure=("such as ", Argument("shape", (3, 8))))
    assert str(error) == "shape: not known; such as shape=(3, 8)"
    told = error.sentence(lambda argument: f"--{argument.name}", place="--shape")
    assert told == "--shape: not known; such as --shape"


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("lr", "recipe.stage[1].lr"),
        ("privacy.clip_norm", "recipe.stage[1].privacy.clip_norm"),
        ("uplink[0].bits", "recipe.stage[1].uplink[0].bits"),
        ("federate.lr", "recipe.stage[1].lr"),
        ("stage.lr", "recipe.stage[1].lr"),
        ("federate", "recipe.stage[1]"),
        ("", "recipe.stage[1] (tune)"),
        ("run/records.jsonl", "recipe.stage[1] (tune): run/records.jsonl"),
        ("message.header", "recipe.stage[1] (tune): message.header"),
    ],
)
def test_an_argument_becomes_the_key_of_its_stage(place, expected):
    assert recipe_place(place, 1, STAGE) == expected


def test_an_error_keeps_its_class_and_its_origin_when_it_is_placed():
    keys = {"clip_norm": "privacy.clip_norm"}
    with pytest.raises(DivergedError) as caught, errors_of_stage(2, STAGE), renaming(keys):
        raise DivergedError("got 0", place="clip_norm", cure="try 1.0")
    assert caught.value.place == "recipe.stage[2].privacy.clip_norm"
    assert caught.value.__cause__ is None


def test_the_places_of_a_stage_are_keys_that_it_has():
    for row in STAGES:
        stage = row.load()
        for key in stage.places.values():
            assert re.split(r"[.\[]", key)[0] in stage.model_fields, (row.kind, key)


def _bind(chain=(), **given):
    return Uplink.bind(Payload(8, chain), Cohort(2, 4), **given)


@pytest.mark.parametrize(
    ("act", "python", "recipe"),
    [
        (lambda: _bind(chain=(Clip(clip_norm=1.0), Rotate(block=3))), "chain[1].block", "uplink[1].block"),
        (lambda: _bind(chain=(Quantize(bits=8), Quantize(bits=8))), "chain[1].kind", "uplink[1].kind"),
        (lambda: _bind(guarantee=Guarantee(PLAN, "nobody")), "trust", "privacy.trust"),
        (lambda: _bind(weights="size"), "weights", "weights"),
        (lambda: Cohort(9, 4), "size", "cohort"),
        (lambda: Buffered(buffer=9).cohort(None, 4, "fixed"), "buffer", "schedule.buffer"),
        (lambda: SecurePlan(2, 18, max_dropout=0.7), "max_dropout", "max_dropout"),
        (lambda: replace(PLAN, clip_norm=0.0), "clip_norm", "privacy.clip_norm"),
    ],
)  # fmt: skip
def test_python_sees_its_argument_and_the_recipe_its_key(act, python, recipe):
    with pytest.raises(FedpressError) as caught:
        act()
    assert caught.value.place == python
    with pytest.raises(FedpressError) as caught, errors_of_stage(1, STAGE):
        act()
    assert caught.value.place == f"recipe.stage[1].{recipe}"


def test_python_sees_a_setting_of_the_data_and_the_recipe_its_key():
    settings = DataSettings(source="digits", test_clients=("nobody",))
    with pytest.raises(DataError, match=r"^test_clients: "):
        load(settings, 0)
    with pytest.raises(DataError, match=r"^recipe\.data\.test_clients: "), errors_of_data():
        load(settings, 0)


def test_the_file_of_a_run_is_no_key_of_a_recipe():
    with pytest.raises(RunError, match=r"^result.json: damaged"), errors_of_stage(2, STAGE):
        raise RunError("damaged", place="result.json", cure="delete it")


def test_an_error_without_a_name_for_its_argument_is_left_alone():
    with pytest.raises(FedpressError, match=r"^score: "), renaming({"clip_norm": "clip"}):
        raise FedpressError("got 0", place="score", cure="try 'l1'")


ERRORS = {
    name
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, FedpressError)
}
ERRORS |= {"AboveLimit"}  # the one kind that is made elsewhere


def called(call: ast.Call) -> str:
    """Returns the last name of what is called: `RunError` of `errors.RunError(...)`."""
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def lacks(call: ast.Call) -> bool:
    """Says whether an error is made without a place, or without a cure or what was expected."""
    given = {keyword.arg for keyword in call.keywords}
    texts = [node.value for node in ast.walk(call) if isinstance(node, ast.Constant)]
    expected = any("expected" in text for text in texts if isinstance(text, str))
    placed = (
        "place" in given or called(call) == "SettingError"
    )  # pydantic knows whose validator it is
    return not placed or not ("cure" in given or expected)


def test_errors_are_raised_with_their_place_and_their_cure():
    where = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in nodes(path):
            ours = isinstance(node, ast.Call) and called(node) in ERRORS
            if ours and path.name != "errors.py" and lacks(node):
                where.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert not where, f"give place= and cure=: {where}"


def validates(tree: ast.Module) -> bool:
    """Says whether a module has validators of pydantic's."""
    return any(
        name.name.lower().endswith("validator")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "pydantic"
        for name in node.names
    )


def test_validators_raise_errors_with_fields():
    where, seen = [], 0
    for path in sorted(PACKAGE.rglob("*.py")):
        if not validates(tree(path)):
            continue
        seen += 1
        for node in nodes(path):
            raised = node.exc if isinstance(node, ast.Raise) else None
            name = called(raised) if isinstance(raised, ast.Call) else getattr(raised, "id", "")
            if name in ("ValueError", "AssertionError", "PydanticCustomError"):
                where.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert seen > 10
    assert not where, f"raise SettingError: {where}"


ABOVE = {"cli", "pipeline", "reports", "stages", "errors.py", "__init__.py"}
"""Rooms that may speak of a recipe; those below know no more than their arguments."""


def words_of(call: ast.Call) -> str:
    """Returns the beginning of the place that an error names; empty where a variable says it."""
    place = next((keyword.value for keyword in call.keywords if keyword.arg == "place"), None)
    if isinstance(place, ast.JoinedStr):
        place = place.values[0]
    return str(place.value) if isinstance(place, ast.Constant) else ""


def test_no_other_kind_of_error_is_made_elsewhere():
    made = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in nodes(path):
            if isinstance(node, ast.ClassDef) and path.name != "errors.py":
                made |= {node.name for base in node.bases if getattr(base, "id", "") in ERRORS}
    assert made == {"AboveLimit"}


def test_floors_below_the_stages_name_no_key_of_a_recipe():
    kinds = {row.kind for row in STAGES} | {"stage", "recipe", "data"}
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.relative_to(PACKAGE).parts[0] in ABOVE:
            continue
        for node in nodes(path):
            if isinstance(node, ast.Call) and "." in (place := words_of(node)):
                assert place.partition(".")[0] not in kinds, f"{path.name}:{node.lineno}: {place}"
