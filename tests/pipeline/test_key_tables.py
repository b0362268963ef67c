"""What `--keys` lists: every key of a recipe, each with a meaning."""

import json

import pytest

from fedpress.errors import RecipeError
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline.recipe import Recipe, key_tables
from fedpress.stages.table import STAGES


def test_every_key_of_the_schema_has_a_meaning():
    full = json.loads(recipes.schema())
    tables = {"recipe": full, **full["$defs"]}
    empty = [
        f"{name}.{key}"
        for name, table in tables.items()
        for key, about in table.get("properties", {}).items()
        if len(about.get("description", "")) < 8
    ]
    assert not empty


def test_every_listed_key_has_a_meaning():
    assert all(len(row.meaning) >= 8 for table in key_tables() for row in table.rows)


def test_every_kind_of_stage_lists_every_field_of_its_settings():
    listed = {table.word: table.rows for table in key_tables() if table.is_stage}
    for row in STAGES:
        fields = row.load().model_fields.keys() - {"kind", "name"}
        assert {one.key for one in listed[row.kind] if "." not in one.key} == fields
    [top, data, *_] = key_tables()
    assert {row.key for row in (*top.rows, *data.rows) if "." not in row.key} == {
        "name", "description", "seed", "device", *Recipe.model_fields["data"].annotation.model_fields,
    }  # fmt: skip


def test_tables_inside_and_tables_that_are_chosen_are_listed_too():
    [federate, *others] = key_tables(["federate"])
    keys = {row.key: row for row in federate.rows}
    assert keys["privacy.unit"].default == recipes.REQUIRED
    assert keys["privacy.unit"].meaning.endswith("one of sample, client")
    assert keys["schedule"].default == '"synchronous"'
    assert {"scaffold", "topk", "lognormal", "trimmed"} <= {table.word for table in others}
    [alpha] = key_tables(["dirichlet"])[0].rows
    assert alpha[:2] == ("alpha", "0.5")


def test_a_default_that_is_listed_is_what_the_recipe_has_without_the_key(tiny):
    stage = recipes.load(tiny).stage[0]
    given = {*stage.model_fields_set, "distill"}  # the last one is refused without a teacher
    listed = [row for row in recipes.keys("train") if row.key.split(".")[0] not in given]
    assert len(listed) > 10
    for row in listed:
        if row.default:
            changed = recipes.load(tiny, [f"stage.0.{row.key}={row.default}"])
            assert changed.stage[0] == stage


def test_a_word_that_names_no_table_is_refused_with_the_nearest():
    with pytest.raises(RecipeError, match=r"keys: there is no table 'fedrate'; did you mean 'fede"):
        key_tables(["fedrate"])


@pytest.mark.parametrize("command", ["run", "check"])
def test_the_commands_list_all_keys_or_those_of_some_tables(shell, command):
    said = shell(command, "--keys")
    assert said.code == 0
    for title in ("at the top", "[data]", "[model]", '[[stage]] kind = "l0"', 'kind = "topk"'):
        assert title in said.out
    said = shell(command, "--keys", "model", "shards")
    assert "checkpoint" in said.out
    assert "classes_per_client" in said.out
    assert "num_rounds" not in said.out
    assert shell(command, "--keys", "nothing").code == 2


def test_a_command_on_one_model_lists_its_stage_and_no_codec_of_the_same_name(shell):
    said = shell("quantize", "--keys")
    assert '[[stage]] kind = "quantize"' in said.out
    assert "uplink" not in said.out
    assert "fedpress run --keys recipe data model" in said.out
    assert shell("run", "--keys", "recipe", "data", "model").code == 0
    assert "no keys" in shell("pack", "--keys").out
