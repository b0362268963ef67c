import json
import shlex

import pytest

from fedpress.errors import Argument, RecipeError
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline.arguments import shell_text
from tests.harness import tiered


def said(text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        recipes.load(text, overrides)
    return str(caught.value)


@pytest.fixture(scope="module")
def digits() -> str:
    return recipes.find("digits")


@pytest.mark.parametrize("name", recipes.names())
def test_every_shipped_recipe_loads_under_its_own_name(name):
    recipe = recipes.load(recipes.find(name))
    assert recipe.name == name
    assert recipe.description
    assert [stage.kind for stage in recipe.stage].count("federate") == (name != "compress")


def test_the_first_recipe_walks_the_whole_way(digits):
    kinds = [stage.kind for stage in recipes.load(digits).stage]
    assert kinds == ["train", "prune", "train", "federate", "export"]


def test_settings_are_frozen(digits):
    recipe = recipes.load(digits)
    with pytest.raises(ValueError, match="frozen"):
        recipe.stage[0].lr = 1.0
    with pytest.raises(ValueError, match="frozen"):
        recipe.data.num_clients = 1


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("seed=7", lambda r: r.seed, 7),
        ("stage.3.num_rounds=9", lambda r: r.stage[3].num_rounds, 9),
        ("stage.federate.num_rounds=9", lambda r: r.stage[3].num_rounds, 9),
        ("stage.fine-tune.lr=0.5", lambda r: r.stage[2].lr, 0.5),
        ("stage.3.privacy.epsilon=2", lambda r: r.stage[3].privacy.epsilon, 2.0),
        ("stage.3.server={kind='momentum', beta=0.5}", lambda r: r.stage[3].server.beta, 0.5),
        ("stage.3.target_accuracy=0.9", lambda r: r.stage[3].target_accuracy, 0.9),
        (
            "stage.0.image_sizes=[[8, 2], [4, 1]]",
            lambda r: r.stage[0].image_sizes,
            ((8, 2), (4, 1)),
        ),
        ("stage.3.trainable=['head.*']", lambda r: r.stage[3].trainable, ("head.*",)),
        ("stage.3.trainable.0=head.*", lambda r: r.stage[3].trainable, ("head.*",)),
        ("stage.prune={kind='export'}", lambda r: r.stage[1].kind, "export"),
        ("data.partition.kind=quantity", lambda r: r.data.partition.kind, "quantity"),
        ("data.source=mine:data", lambda r: r.data.source, "mine:data"),
        ("model.arguments.width=8", lambda r: r.model.arguments["width"], 8),
        ("description=it is = 1 # 2", lambda r: r.description, "it is = 1 # 2"),
        ("description=1\nseed=9", lambda r: r.seed, 0),
    ],
)
def test_an_override_reaches_its_place(digits, override, read, value):
    assert read(recipes.load(digits, [override])) == value


def test_of_two_overrides_the_later_counts(digits):
    assert recipes.load(digits, ["seed=1", "seed=2"]).seed == 2


UNION = "choose one of adam, average, momentum"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "stage.3.privacy.epsilom=1",
            "recipe.stage[3].privacy.epsilom: no such key; did you mean 'epsilon'?",
        ),
        ("data.soruce=digits", "recipe.data.soruce: no such key; did you mean 'source'?"),
        ("sede=1", "recipe.sede: no such key; did you mean 'seed'?"),
        ("stage.1.lr=0.1", "recipe.stage[1].lr: no such key; see fedpress check --schema"),
        (
            "stage.3.server={kind='adam', tua=1}",
            "recipe.stage[3].server.tua: no such key; did you mean 'tau'?",
        ),
        (
            "stage.0.augment.crp=0.1",
            "recipe.stage[0].augment.crp: no such key; did you mean 'crop'?",
        ),
        (
            "stage.3.privacy={unti='sample'}",
            "recipe.stage[3].privacy.unti: no such key; did you mean 'unit'? (1 more)",
        ),
        (
            "data.partition={kind='dirichlet', alfa=1}",
            "recipe.data.partition.alfa: no such key; did you mean 'alpha'?",
        ),
        ("stage.1.kind=trian", "recipe.stage[1].kind: there is no 'trian'; did you mean 'train'?"),
        ("stage.3.server={kind='x'}", f"recipe.stage[3].server.kind: there is no 'x'; {UNION}"),
        ("stage.3.server={beta=1}", "recipe.stage[3].server.kind: this key is missing; add it"),
        ("stage.0={kind='train'}", "recipe.stage[0].epochs: this key is missing; add it"),
        ("stage.3.lr=fast", "recipe.stage[3].lr: input should be a valid number, unable to parse"),
        ("stage.3.momentum=2", "recipe.stage[3].momentum: input should be less than 1, got 2"),
        (
            "stage.3.server={kind='momentum', beta=2}",
            "recipe.stage[3].server.beta: input should be less than 1, got 2",
        ),
        ("stage.0.epochs=1.5", "recipe.stage[0].epochs: input should be a valid integer"),
        (
            "stage.1.keep_params=0",
            "recipe.stage[1].keep_params: input should be greater than 0, got 0",
        ),
        (
            "stage.1.keep_params=1.5",
            "recipe.stage[1].keep_params: input should be less than or equal to 1, got 1.5",
        ),
        (
            "stage.3.privacy.epsilon=-1",
            "recipe.stage[3].privacy.epsilon: input should be greater than 0, got -1",
        ),
        (
            "stage.3.privacy.noise_multiplier=1",
            "recipe.stage[3].privacy: epsilon and noise_multiplier are both given",
        ),
        ("stage.1.score=taylr", "did you mean 'taylor'?"),
        (
            "stage.0.image_sizes=[[8, 99]]",
            "recipe.stage[0].image_sizes: these sizes take 99 epochs, but the training has only 60",
        ),
        ("stage.0.image_sizes=[[8]]", "recipe.stage[0].image_sizes[0][1]: this key is missing"),
        ("stage.0.lr=nan", "recipe.stage[0].lr: expected a finite number, got nan"),
        (
            "stage.3.privacy.epsilon=inf",
            "recipe.stage[3].privacy.epsilon: expected a finite number, got inf",
        ),
        (
            "model.arguments.sizes=[1.0, inf]",
            "recipe.model.arguments.sizes[1]: expected a finite number, got inf",
        ),
        ("seed=1979-05-27", "recipe.seed: no setting is a date or time"),
        ("stage=5", "recipe.stage: expected a list, got 5"),
        ("data.classes=paid", "recipe.data.classes: expected a list, got 'paid'; write ['paid']"),
        (
            "data.path=postgresql://reader:secret@host/loans",
            "recipe.data.path: it is an address, and path is a file or folder of this machine",
        ),
        ("stage=[]", "recipe.stage: "),
        ("name=../elsewhere", "recipe.name: string should match"),
        ("stage.0.name=a/b", "recipe.stage[0].name: string should match"),
        (
            "stage.1.name=dense",
            "recipe.stage[1].name: two stages are named 'dense'; give every stage a name of its own",
        ),
        ("data.source=digit", "did you mean 'digits'?"),
    ],
)
def test_a_mistake_is_one_sentence_with_place_and_cure(digits, override, sentence):
    assert sentence in said(digits, override)


@pytest.mark.parametrize(
    "stage",
    [
        "kind='train', epochs=3, image_sizes=[[4, 2], [6, 2]]",
        "kind='train', epochs=1, distill={temperature=2}",
        "kind='distill', epochs=1",
        "kind='export', weight_bits=7",
        "kind='l0', density=0.5, epochs=0",
        "kind='prune', scope='layer', strategy='single-channel'",
        "kind='prune', score='taylor', calibration=0",
        "kind='prune', densities=[1.0]",
        "kind='prune', steps=3",
        "kind='prune', rewind=true",
        "kind='prune', finetune={epochs=1}",
        "kind='prune', steps=2, finetune={epochs=1, image_sizes=[[8, 2]]}",
        "kind='quantize', bits=1",
        "kind='quantize', mixed=[1, 4], max_bytes=100",
        "kind='quantize', max_bytes=100",
        "kind='sparsify'",
        "kind='sparsify', density=0.5, epochs=1, score='movement'",
        "kind='sparsify', density=0.5, schedule='gradual'",
        "kind='sparsify', epochs=1, pattern='2:4', schedule='rigl'",
        "kind='federate', uplink=[{kind='quantize'}]",
        "kind='federate', privacy={unit='client'}",
    ],
)
def test_each_setting_that_a_cure_names_is_a_cure(digits, stage):
    broken = f"stage=[{{{stage}}}]"
    with pytest.raises(RecipeError) as caught:
        recipes.load(digits, [broken])
    given = [part for part in caught.value.cure if isinstance(part, Argument)]
    assert given, caught.value
    together = [given] if "and public examples" in str(caught.value) else [[one] for one in given]
    for arguments in together:
        recipes.load(digits, [broken, *(shlex.split(shell_text(one))[0] for one in arguments)])


def test_the_sentence_of_a_misspelt_key_is_exact(digits):
    expected = "recipe.stage[3].privacy.epsilom: no such key; did you mean 'epsilon'?"
    assert said(digits, "stage.3.privacy.epsilom=1") == expected


def test_did_you_mean_proposes_only_keys_of_that_place(digits):
    # `keep_params` is a key, but of another kind of stage
    assert "did you mean" not in said(digits, "stage.0.keep_param=0.5")
    assert "did you mean 'keep_params'?" in said(digits, "stage.1.keep_param=0.5")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("seed", "override 'seed': expected key=value; write for instance stage.2.num_rounds=5"),
        ("=1", "expected key=value"),
        ("seed.x=1", "seed is a single value, it has no key 'x'"),
        (
            "stage.9.lr=1",
            "there is no stage.9; entries are numbered from 0 to 4, or named dense, prune, fine-tune",
        ),
        ("stage.-1.lr=1", "there is no stage.-1"),
        ("stage.².lr=1", "there is no stage.²"),
        ("stage.dnse.lr=1", "there is no stage.dnse"),
        (
            "stage.train.lr=1",
            "stage.train stands for more than one entry; write dense or fine-tune instead of train",
        ),
        (
            "stage.3.trainable.5=x",
            "there is no stage.3.trainable.5; entries are numbered from 0 to 0",
        ),
        ("nowhere.at.all=1", "recipe.nowhere: no such key"),
    ],
)
def test_an_override_without_a_place_is_refused(digits, override, sentence):
    assert sentence in said(digits, override)


def test_a_name_goes_before_a_kind_in_an_override():
    text = '[data]\nsource="digits"\n[model]\narchitecture="mlp"\n' + "".join(
        f'[[stage]]\nkind="train"\nepochs=1\nname="{name}"\n' for name in ("first", "train")
    )
    recipe = recipes.load(text, ["stage.train.epochs=5"])
    assert [stage.epochs for stage in recipe.stage] == [1, 5]


def test_stages_without_a_name_get_different_ones():
    text = (
        '[data]\nsource="digits"\n[model]\narchitecture="mlp"\n'
        + '[[stage]]\nkind="train"\nepochs=1\n' * 3
    )
    assert [stage.name for stage in recipes.load(text).stage] == ["train", "train-2", "train-3"]


def test_text_that_is_no_toml_is_refused_with_its_line():
    assert "not valid TOML" in said("a = [\n1,,2]")
    assert "line 2" in said("a = [\n1,,2]")


def test_an_unknown_recipe_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(RecipeError, match="no recipe 'digit'; did you mean 'digits'"):
        recipes.find("digit")
    with pytest.raises(RecipeError, match=r"cannot read .*nowhere.toml.*No such file"):
        recipes.find(str(tmp_path / "nowhere.toml"))
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot read"):
        recipes.find(str(tmp_path / "bytes.toml"))


def test_a_folder_of_the_same_name_does_not_hide_a_shipped_recipe(tmp_path, monkeypatch):
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    assert 'name = "digits"' in recipes.find("digits")


def test_a_recipe_is_read_from_a_file_of_any_name(tmp_path):
    (tmp_path / "mine").write_text("x = 1")
    assert recipes.find(str(tmp_path / "mine")) == "x = 1"


def test_the_schema_is_json_and_knows_every_stage():
    page = json.loads(recipes.schema())
    assert page["type"] == "object"
    assert {"data", "model", "stage"} <= set(page["required"])
    kinds = page["properties"]["stage"]["items"]["discriminator"]["mapping"]
    assert {"train", "prune", "federate", "export"} <= set(kinds)
    assert "num_rounds" in page["$defs"]["FederateStage"]["properties"]


def test_one_misspelt_key_of_a_stage_is_one_mistake():
    text = '[data]\nsource = "digits"\n[model]\narchitecture = "cnn"\n[[stage]]\nkind = "prune"\n'
    with pytest.raises(RecipeError, match=r"did you mean 'keep_params'\?$"):
        recipes.load(text + "keep_param = 0.5\n")
    with pytest.raises(RecipeError, match=r"\(1 more\)$"):
        recipes.load(text + "keep_param = 0.5\nscor = 'l1'\n")


DEEP = {
    "lists": "x = " + "[" * 10_000 + "]" * 10_000,
    "open lists": "x = " + "[" * 10_000,
    "tables": "x = " + "{a = " * 10_000 + "1" + "}" * 10_000,
    "a long key": ".".join("a" * 10_000) + " = 1",
    "a long header": "[" + ".".join("a" * 10_000) + "]",
    "a hundred lists": "x = " + "[" * 100 + "]" * 100,
}


@pytest.mark.parametrize("how", tiered(DEEP, quick=DEEP.keys() - {"a long key"}))
def test_a_recipe_that_is_nested_too_deep_is_one_sentence(tiny, how):
    extra = DEEP[how]
    with pytest.raises(RecipeError, match="recipe: lists and tables are nested too deeply"):
        recipes.load(extra + "\n" + tiny if extra[0] != "[" else tiny + extra)


@pytest.mark.parametrize(
    "override",
    ["model.arguments.x=" + "[" * 10_000 + "]" * 10_000, "model.arguments.x=" + "{a=" * 100 + "1" + "}" * 100,
     "model." + ".".join("a" * 10_000) + "=1"],
)  # fmt: skip
def test_an_override_that_is_nested_too_deep_is_one_sentence(tiny, override):
    with pytest.raises(RecipeError, match="are nested too deeply") as caught:
        recipes.load(tiny, [override])
    assert len(str(caught.value)) < 300


def test_a_number_without_end_is_no_traceback(tiny):
    with pytest.raises(RecipeError, match="not valid TOML"):
        recipes.load(tiny.replace('name = "tiny"', f'name = "tiny"\nseed = {"9" * 5000}'))
    with pytest.raises(RecipeError, match="seed"):
        recipes.load(tiny, [f"seed={'9' * 5000}"])


@pytest.mark.parametrize(
    ("text", "cure"),
    [
        ("[[data]]\nsource = 'digits'", r"recipe.data: .* write \[data\] with single brackets"),
        (
            "[[model]]\narchitecture = 'mlp'",
            r"recipe.model: .* write \[model\] with single brackets",
        ),
        ("seed = 1\nlr = 0,1", "line 2.*; write decimals with a point"),
        ("[data]\nsource = digits", "line 2.*; put words in quotes"),
        ('{"name": "t"}', "this is JSON; write TOML"),
        ("name: t\ndata:\n  source: digits", "this looks like YAML; write TOML"),
    ],
)
def test_habits_of_other_formats_are_told_with_their_cure(text, cure):
    with pytest.raises(RecipeError, match=cure):
        recipes.load(text)


def test_utf_16_without_its_mark_is_named(tmp_path):
    (tmp_path / "r.toml").write_bytes("seed = 1".encode("utf-16-le"))
    with pytest.raises(RecipeError, match=r"looks like UTF-16.*saved as UTF-8"):
        recipes.find(str(tmp_path / "r.toml"))
