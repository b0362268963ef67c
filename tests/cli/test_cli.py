import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fedpress as package
from fedpress.core.random import STREAMS
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline.keys import settings_of

TRAIN_ONLY = "stage=[{kind='train', epochs=2, batch_size=64}]"
COMMAND = [sys.executable, "-c", "from fedpress.cli import main; main()"]


def one_sentence(said, *parts: str) -> None:
    assert said.code == 2, said
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1, said.err
    assert "Traceback" not in said.err
    for part in parts:
        assert part in said.err


# What a person can do wrong, and what the sentence must hold: the place, and words of the cure.
BAD = {
    "unknown recipe": (["digit"], "no recipe 'digit'; did you mean 'digits'"),
    "missing recipe file": (["nowhere.toml"], "cannot read 'nowhere.toml'"),
    "a folder for a recipe": (["folder.toml"], "cannot read 'folder.toml'"),
    "text that is no recipe": (["broken.toml"], "not valid TOML", "line 1"),
    "unknown key": (["tiny.toml", "stage.2.privacy.epsilom=8"], "recipe.stage[2].privacy.epsilom", "mean 'epsilon'"),
    "wrong type": (["tiny.toml", "seed=x"], "recipe.seed: input should be a valid integer"),
    "wrong range": (["tiny.toml", "stage.0.lr=-1"], "recipe.stage[0].lr", "greater than 0"),
    "override without value": (["tiny.toml", "seed"], "override 'seed': expected key=value"),
    "missing data": (["tiny.toml", "data.source=csv", "--data", "no.csv"], "no.csv"),
    "missing image data": (["tiny.toml", "data.source=cifar10", "--data", "none"], "none'; check the path, or leave"),
    "corrupt archive": (["tiny.toml", "data.source=cifar10", "--data", "bad"], "cifar-10-python.tar.gz"),
    "corrupt parquet": (["tiny.toml", "data.source=parquet", "--data", "bad.parquet"], "bad.parquet"),
    "unknown data function": (["tiny.toml", "data.source=nowhere:f"], "no module 'nowhere'; put its folder"),
    "download not allowed": (["tiny.toml", "data.source=cifar10", "data.download=false"], "download is off; set path"),
    "too few images": (["tiny.toml", "data.examples_per_client=600"], "examples_per_client"),
    "too many clients": (["tiny.toml", "data.num_clients=5000", "data.examples_per_client=1"], "num_clients"),
    "no public part": (["tiny.toml", "data.public_share=0.0", "data.validation=0"], "stage[0]", "data.public_share"),
    "keep nothing": (["tiny.toml", "stage.1.keep_params=0"], "recipe.stage[1].keep_params", "greater than 0"),
    "keep more than all": (["tiny.toml", "stage.1.keep_params=1.1"], "stage[1].keep_params", "less than or equal to 1"),
    "keep too little": (["tiny.toml", "stage.1.keep_params=0.001"], "recipe.stage[1].keep_params", "raise keep_params"),
    "epsilon of zero": (["tiny.toml", "stage.2.privacy.epsilon=0"], "stage[2].privacy.epsilon", "greater than 0"),
    "negative epsilon": (["tiny.toml", "stage.2.privacy.epsilon=-1"], "stage[2].privacy.epsilon", "greater than 0"),
    "batch norm that mixes": (
        ["tiny.toml", "model={architecture='resnet-small', arguments={in_channels=1, width=8}}", "stage.2.norm=batch"],
        "recipe.stage[2].norm",
        "use 'frozen'",
    ),
    "weights that break the promise": (
        ["tiny.toml", "stage.2.privacy.unit=client", "stage.2.weights=examples"],
        "recipe.stage[2].weights",
        'set weights = "equal"',
    ),
    "nothing to train": (["tiny.toml", "stage.2.trainable=['nothing.*']"], "stage[2].trainable", "or '*' for all"),
    "a cohort too large": (["tiny.toml", "stage.2.cohort=4"], "recipe.stage[2].cohort", "population of 3"),
    "unknown network": (["tiny.toml", "model={architecture='resnet81'}"], "model.architecture", "mean 'resnet18'"),
    "wrong arguments": (["tiny.toml", "model.arguments.depth=3"], "model.arguments", "depth"),
    "wrong number of classes": (["tiny.toml", "model.arguments.num_classes=3"], "10 classes", "num_classes=10"),
    "network of no file": (["tiny.toml", "model={architecture='nowhere:net'}"], "nowhere:net", "PYTHONPATH"),
    "network that fails": (["tiny.toml", "model={architecture='networks:fails'}"], "recipe.model", "KeyError"),
    "network that returns a pair": (["tiny.toml", "model={architecture='networks:pair'}"], "recipe.model", "tuple"),
    "network that cannot be exported": (
        ["tiny.toml", "model={architecture='networks:decides'}", "stage=[{kind='export'}]"],
        "recipe.stage[0]",
        "use torch.where in place of `if`",
    ),
    "network that cannot be pruned": (
        ["tiny.toml", "model={architecture='networks:decides'}", "stage=[{kind='prune'}]"],
        "recipe.stage[0]",
    ),
}  # fmt: skip
NETWORKS = """
from torch import nn

class Net(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.layer = how, nn.Linear(64, 10)

    def forward(self, x):
        y = self.layer(x.flatten(1))
        if self.how == "fails":
            raise KeyError("x")
        if self.how == "pair":
            return y, y
        return y if y.sum() > 0 else -y

fails, pair, decides = (lambda how=how: Net(how) for how in ("fails", "pair", "decides"))
"""


@pytest.fixture
def mistakes(tiny_file) -> Path:
    """A folder with a recipe and with files that are wrong."""
    folder = tiny_file.parent
    (folder / "folder.toml").mkdir()
    (folder / "broken.toml").write_text("name = \n[data]\n")
    (folder / "bad").mkdir()
    (folder / "bad" / "cifar-10-python.tar.gz").write_bytes(b"not an archive")
    (folder / "bad.parquet").write_bytes(b"PAR1 no parquet")
    (folder / "networks.py").write_text(NETWORKS)
    return folder


@pytest.mark.recipe
@pytest.mark.parametrize("words", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_sentence_before_anything_is_trained(shell, mistakes, monkeypatch, words):
    monkeypatch.setenv("FEDPRESS_CACHE", str(mistakes / "cache"))
    monkeypatch.delitem(sys.modules, "networks", raising=False)
    (command, *parts) = words
    one_sentence(shell("run", *command, "--out", "new"), *parts)
    assert not (mistakes / "new").exists()


def test_check_refuses_what_run_refuses(shell, mistakes):
    one_sentence(
        shell("check", "tiny.toml", "stage.1.keep_params=0.001"), "recipe.stage[1].keep_params"
    )
    one_sentence(shell("check"), "give the name of a recipe")


def test_no_network_is_one_sentence(shell, tiny_file, monkeypatch):
    from fedpress.data import cifar10_archive, download

    monkeypatch.setenv("FEDPRESS_CACHE", str(tiny_file.parent / "cache"))
    monkeypatch.setattr(cifar10_archive, "URL", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    monkeypatch.setattr(download.time, "sleep", lambda _: None)
    said = shell("run", tiny_file, "data.source=cifar10", "--out", "new")
    one_sentence(
        said,
        "'http://127.0.0.1:9/cifar-10-python.tar.gz': cannot be downloaded",
        "check the network, or set path",
    )


@pytest.mark.parametrize(
    "words", [[], ["runn"], ["run"], ["run", "digits", "--ouut", "x"], ["privacy", "epsilon"]]
)
def test_a_command_that_is_no_command_ends_in_2(shell, words):
    said = shell(*words)
    assert said.code == 2
    assert "Usage" in said.out + said.err
    assert "Traceback" not in said.err


@pytest.mark.recipe
def test_a_run_is_told_drawn_and_given_as_json(shell, tiny_file):
    said = shell("run", tiny_file, TRAIN_ONLY, "--out", "new", "--json")
    assert said.code == 0, said.err
    result = json.loads(said.out)
    assert result == json.loads(Path("new/result.json").read_text())
    assert result["final"]["accuracy"] > 0.2
    assert "report: " in said.err
    assert Path("new/report.html").stat().st_size > 10_000
    settings = json.loads(Path("new/settings.json").read_text())
    assert settings.pop("streams") == STREAMS
    assert settings_of(recipes.load(Path("new/recipe.toml").read_text())) == settings, (
        "overrides are in it"
    )
    environment = json.loads(Path("new/environment.json").read_text())
    assert environment["overrides"] == [TRAIN_ONLY]
    assert environment["command"].startswith("fedpress run ")

    again = shell("run", tiny_file, TRAIN_ONLY, "--out", "new")
    one_sentence(
        again, "new: this folder already holds a run; add --resume to go on, or give another --out"
    )
    other = shell("run", tiny_file, TRAIN_ONLY, "seed=5", "--out", "new", "--resume")
    one_sentence(other, "belongs to another recipe (recipe.seed was 0, now 5)", "--from new")
    resumed = shell("run", tiny_file, TRAIN_ONLY, "--out", "new", "--resume")
    assert resumed.code == 0
    assert "train: already done" in resumed.out
    assert json.loads(Path("new/result.json").read_text()) == result
    drawn = shell("report", "new", "--out", "page.html")
    assert (drawn.code, drawn.out) == (0, "page.html\n")
    assert (
        max(len(line) for line in resumed.out.splitlines() if not line.startswith("report")) <= 80
    )


@pytest.mark.recipe
def test_runs_without_out_are_numbered_and_the_last_is_resumed(shell, tiny_file):
    for _ in range(2):
        assert shell("run", tiny_file, TRAIN_ONLY).code == 0
    assert sorted(p.name for p in Path("runs").iterdir()) == ["tiny", "tiny-2"]
    Path("runs/tiny").rename("elsewhere")
    said = shell("run", tiny_file, TRAIN_ONLY, "--resume")
    assert said.code == 0
    assert "tiny into runs/tiny-2" in said.out
    assert shell("run", tiny_file, TRAIN_ONLY, "--from", "elsewhere").code == 0
    assert Path("runs/tiny-3").exists()


@pytest.mark.recipe
def test_run_folders_that_are_none_are_refused(shell, tiny_file):
    one_sentence(
        shell("run", tiny_file, "--resume", "--out", "nowhere"), "there is no run to resume"
    )
    one_sentence(
        shell("run", tiny_file, "--from", "nowhere"), "nowhere: there is no run in this folder"
    )
    one_sentence(
        shell("run", tiny_file, "--out", tiny_file), "this is a file; give a folder with --out"
    )
    one_sentence(shell("run", tiny_file, "--out", "."), "holds other files")
    one_sentence(
        shell("run", tiny_file, TRAIN_ONLY, "--out", tiny_file / "x"), "Not a directory", "--out"
    )
    one_sentence(shell("report", "nowhere"), "nowhere: no such folder")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only to root")
def test_a_read_only_place_is_one_sentence(shell, tiny_file):
    Path("locked").mkdir(mode=0o500)
    said = shell("run", tiny_file, TRAIN_ONLY, "--out", "locked/new")
    one_sentence(
        said, "locked/new: cannot be written (Permission denied)", "choose another place with --out"
    )


def test_a_full_disk_stops_the_run_and_nothing_is_lost(shell, tiny_file, small_files):
    small_files(100_000)
    said = shell("run", tiny_file, TRAIN_ONLY, "--out", "new")
    small_files(-1)
    one_sentence(
        said,
        "new/stages/0-train/",
        "cannot be written (File too large)",
        "free some space",
        "--resume",
    )
    assert shell("run", tiny_file, TRAIN_ONLY, "--out", "new", "--resume").code == 0


def test_a_loss_that_is_not_finite_is_one_sentence(shell, tiny_file):
    said = shell("run", tiny_file, TRAIN_ONLY, "stage.0.lr=1e30", "--out", "new")
    one_sentence(said, "recipe.stage[0]: the loss is", "lower lr", "last good checkpoint is kept")


def test_debug_shows_the_traceback(shell):
    from fedpress.errors import RecipeError

    with pytest.raises(RecipeError, match="no recipe 'digit'"):
        shell("--debug", "check", "digit")


def test_the_version_is_printed(shell):
    assert shell("--version").out == f"fedpress {package.__version__}\n"


def test_recipes_are_listed_and_copied_but_never_over_a_file(shell):
    said = shell("recipes")
    assert "digits\n  A small ResNet on" in said.out
    assert "cifar10-cpu" in said.out
    assert shell("recipes", "--copy", "digits").out.startswith("digits.toml: edit it")
    assert 'name = "digits"' in Path("digits.toml").read_text()
    one_sentence(
        shell("recipes", "--copy", "digits"), "digits.toml: this file exists; move it away first"
    )
    one_sentence(shell("recipes", "--copy", "digit"), "did you mean 'digits'")


def test_the_schema_is_printed_as_json(shell):
    assert "stage" in json.loads(shell("check", "--schema").out)["properties"]


def test_a_check_is_told_to_people_and_to_programs(shell, tiny_file):
    said = shell("check", tiny_file)
    assert said.code == 0
    assert "data: 3 clients; 180 private" in said.out
    assert "everything fits together; start it with: fedpress run" in said.out
    said = shell("check", tiny_file, "stage.train.epochs=2", "--device", "cpu")
    assert f"start it with: fedpress run {tiny_file} stage.train.epochs=2 --device cpu" in said.out
    page = json.loads(shell("check", tiny_file, "--json").out)
    assert page["data"]["private"] == 180
    assert [stage["name"] for stage in page["stages"]] == ["train", "prune", "federate"]
    assert 0 < page["stages"][2]["epsilon"] <= 8
    assert all(
        set(client) == {"examples"} for client in page["data"]["clients"].values()
    )  # labels are protected
    page = json.loads(shell("check", tiny_file, TRAIN_ONLY, "--json").out)
    assert all(
        sum(client["labels"]) == client["examples"] for client in page["data"]["clients"].values()
    )


def test_rows_of_an_unknown_class_are_told_in_the_report_too(shell, tmp_path):
    rows = [f"{who},{i % 7},{i % 2}" for who in ("open", "a", "b") for i in range(30)]
    (tmp_path / "d.csv").write_text("who,x,ill\n" + "\n".join([*rows, "a,3,secret"]))
    (tmp_path / "r.toml").write_text(
        '[data]\nsource = "csv"\npath = "d.csv"\nlabel_column = "ill"\nclient_column = "who"\ntest_share = 0\n'
        'public_clients = ["open"]\ntest_clients = ["b"]\nvalidation = 0\n'
        '[model]\narchitecture = "mlp"\narguments = { in_features = 1, hidden = [4], num_classes = 2 }\n'
        '[[stage]]\nkind = "train"\nepochs = 1\n'
    )
    said = shell("run", "r.toml", "--out", "run")
    assert said.code == 0, said.err
    told = "rows of an unknown class or word are left out: 1 of the clients"
    assert told in said.out
    page = (tmp_path / "run/report.html").read_text()
    assert f"data: {told}." in page
    assert "secret" not in page


def test_own_data_beside_the_recipe_is_found(shell, tiny_file, monkeypatch):
    folder = tiny_file.parent / "project"
    folder.mkdir()
    (folder / "networks.py").write_text(NETWORKS)
    (folder / "own.toml").write_text(tiny_file.read_text())
    monkeypatch.delitem(sys.modules, "networks", raising=False)
    own = ["model={architecture='networks:decides'}", TRAIN_ONLY]
    assert shell("check", "project/own.toml", *own).code == 0


@pytest.mark.recipe
def test_privacy_questions_are_answered_in_words_and_json(shell):
    mechanism = ["--sampling-prob", 0.5, "--steps", 20, "--delta", 1e-3]
    noise = json.loads(shell("privacy", "noise", "--epsilon", 8, *mechanism, "--json").out)
    assert noise.keys() == {"noise_multiplier"}
    spent = shell(
        "privacy", "epsilon", "--noise-multiplier", noise["noise_multiplier"], *mechanism, "--json"
    )
    assert json.loads(spent.out) == {"epsilon": pytest.approx(8, abs=0.01)}
    assert re.fullmatch(r"epsilon [\d.]+ at delta 0.001\n", shell(
        "privacy", "epsilon", "--noise-multiplier", 1, *mechanism).out)  # fmt: skip
    assert re.fullmatch(
        r"noise multiplier [\d.]+\n", shell("privacy", "noise", "--epsilon", 8, *mechanism).out
    )


@pytest.mark.recipe
def test_printed_noise_keeps_the_budget_and_no_printed_epsilon_is_too_small(shell):
    for budget, prob in ((8, 0.5), (2, 0.5), (1, 0.01)):
        mechanism = ["--sampling-prob", prob, "--steps", 50, "--delta", 1e-3]
        noise = shell("privacy", "noise", "--epsilon", budget, *mechanism).out.split()[-1]
        spent = ["privacy", "epsilon", "--noise-multiplier", noise, *mechanism]
        exact = json.loads(shell(*spent, "--json").out)["epsilon"]
        assert exact <= budget
        assert exact <= float(shell(*spent).out.split()[1]) < 1.002 * exact


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epsilon", 0),
        ("epsilon", -1),
        ("epsilon", "nan"),
        ("sampling-prob", 2),
        ("delta", 0),
        ("delta", 1),
        ("steps", 0),
    ],
)
def test_privacy_questions_out_of_range_are_one_sentence(shell, name, value):
    asked = {"epsilon": 8, "sampling-prob": 0.5, "delta": 1e-3, "steps": 5} | {name: value}
    words = [word for key, given in asked.items() for word in (f"--{key}", given)]
    one_sentence(shell("privacy", "noise", *words), name.replace("-", "_"))


def test_no_noise_is_an_infinite_epsilon_that_json_can_say(shell):
    words = ["--sampling-prob", 0.5, "--noise-multiplier", 0, "--steps", 5, "--delta", 1e-3]
    said = shell("privacy", "epsilon", *words, "--json")
    assert json.loads(said.out, parse_constant=pytest.fail) == {"epsilon": None}
    assert "inf" in shell("privacy", "epsilon", *words).out


@pytest.mark.recipe
def test_an_epsilon_that_is_a_mere_upper_bound_says_so(shell):
    rare = ["--sampling-prob", 1e-9, "--noise-multiplier", 0.3, "--steps", 1, "--delta", 1e-12]
    assert json.loads(shell("privacy", "epsilon", *rare, "--json").out)["upper_bound"] is True
    assert "an upper bound" in shell("privacy", "epsilon", *rare).out


def test_phases_in_a_file_and_a_ledger_are_composed(shell, tmp_path):
    phase = {"sampling_prob": 1, "noise_multiplier": 5, "steps": 50}
    file = tmp_path / "phases.json"
    file.write_text(json.dumps([phase]))
    assert (
        shell("privacy", "compose", file, "--delta", 1e-3).out == "epsilon 4.846 at delta 0.001\n"
    )
    charge = {"who": "population", "what": "federate", **phase}
    file.write_text(json.dumps({"version": 1, "unit": "client", "charges": [charge]}))
    said = shell("privacy", "compose", file, "--delta", 1e-3, "--json")
    assert json.loads(said.out) == {"epsilon": pytest.approx(4.8453, rel=1e-3)}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[", "not JSON"),
        ('[{"steps": 1}]', "phases.json[0].sampling_prob: is missing"),
        ('{"charges": [], "version": 9}', "ledger"),
    ],
)
def test_files_that_hold_no_phases_are_one_sentence(shell, tmp_path, text, words):
    file = tmp_path / "phases.json"
    file.write_text(text)
    one_sentence(shell("privacy", "compose", file, "--delta", 1e-3), words)
    one_sentence(
        shell("privacy", "compose", tmp_path / "nowhere.json", "--delta", 1e-3), "nowhere.json"
    )


SKELLAM = [
    "--size",
    2**16,
    "--clip-norm",
    1,
    "--clients",
    10,
    "--survivors",
    10,
    "--rounds",
    50,
    "--delta",
    1e-3,
]


def test_skellam_noise_says_what_each_bit_costs(shell):
    said = json.loads(shell("privacy", "skellam", *SKELLAM, "--noise-multiplier", 5, "--json").out)
    costs = {row["bits"]: row["epsilon"] for row in said["table"]}
    assert list(costs) == list(range(8, 25))
    assert costs[said["bits"]] == said["epsilon"] < costs[said["bits"] - 1]
    text = shell("privacy", "skellam", *SKELLAM, "--epsilon", 8).out
    assert re.match(
        r"\d+ bits, scale [\d.]+, noise multiplier [\d.]+\nepsilon 8 at delta 0.001\n\nbits  epsilon",
        text,
    )
    assert len(text.splitlines()) == 4 + len(costs)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], "got both epsilon and noise_multiplier, or none"),
        (["--epsilon", 8, "--bits", 9], "take at least"),
        (["--epsilon", 8, "--bits", 40], "bits: got 40"),
        (["--epsilon", 0], "epsilon: got 0"),
    ],
)
def test_skellam_questions_that_have_no_answer_are_one_sentence(shell, more, words):
    one_sentence(shell("privacy", "skellam", *SKELLAM, *more), words)


@pytest.mark.recipe
def test_the_accountant_answers_without_loading_torch(tmp_path):
    script = (
        "import sys; from fedpress import cli; sys.argv = sys.argv[1:]\n"
        "try: cli.main()\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'fedpress.pipeline.recipe', 'fedpress.pipeline.run'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    asked = "--sampling-prob 0.01 --noise-multiplier 1 --steps 100 --delta 1e-5 --json"
    words = ["fedpress", "privacy", "epsilon", *asked.split()]
    done = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["epsilon"] > 0


@pytest.mark.recipe
def test_ctrl_c_says_how_to_go_on_and_that_works(tmp_path, tiny_file):
    words = ["run", str(tiny_file), "stage.0.epochs=400"]

    def listen():  # a shell that starts the tests in the background makes its children deaf to Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)

    process = subprocess.Popen(
        [*COMMAND, *words],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        preexec_fn=listen,
    )
    records = tmp_path / "runs" / "tiny" / "records.jsonl"
    end = time.monotonic() + 300
    while not records.exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in said
    command = said.decode().rpartition("go on with: ")[2].split()
    assert command == ["fedpress", *words, "--out", "runs/tiny", "--resume"]
    before = len(records.read_text().splitlines())
    assert before < 400
    assert (
        subprocess.run([*COMMAND, *command[1:]], cwd=tmp_path, capture_output=True).returncode == 0
    )
    assert json.loads((tmp_path / "runs/tiny/result.json").read_text())["finished"]


PLAIN = """# my recipe
name = "plain"
[data]
source = "csv"
path = "rows.csv"
public_share = 0.3
num_clients = 2
partition = "iid"
[model]
architecture = "mlp"
arguments = { in_features = 1, num_classes = 2 }
[[stage]]
kind = "train"
epochs = 1
"""


@pytest.fixture
def plain(tmp_path) -> Path:
    """A recipe in a folder of its own, with its data beside it."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "rows.csv").write_text("a,label\n" + "".join(f"{i},{i % 2}\n" for i in range(60)))
    (folder / "plain.toml").write_text(PLAIN)
    return folder / "plain.toml"


@pytest.mark.recipe
def test_paths_in_a_recipe_count_from_the_recipe(shell, plain, tmp_path, monkeypatch):
    assert shell("check", plain).code == 0
    assert shell("run", plain, "--out", "a").code == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = shell("run", tmp_path / "a" / "recipe.toml", "--out", "b", "--from", tmp_path / "a")
    assert again.code == 0, again.err
    assert "train: already done" in again.out
    assert shell("sweep", plain, "stage.train.epochs=1,2", "--out", "s").code == 0
    assert shell("run", "--resume", tmp_path / "a").code == 0
    said = shell("train", tmp_path / "a", "epochs=1")  # the data of the run are found from anywhere
    assert said.code == 0, said.err
    (tmp_path / "teach.toml").write_text(
        PLAIN.replace("rows.csv", "mine/rows.csv") + 'teacher = "a"\n'
    )
    assert shell("check", tmp_path / "teach.toml").code == 0
    (tmp_path / "from.toml").write_text(
        PLAIN.replace("rows.csv", "mine/rows.csv").partition("[model]")[0]
        + '[model]\ncheckpoint = "a"\n[[stage]]\nkind = "measure"\n'
    )
    assert shell("check", tmp_path / "from.toml").code == 0


def test_paths_from_the_present_folder_still_count_where_nothing_lies_beside_the_recipe(
    shell, plain, tmp_path
):
    plain.with_name("rows.csv").rename(tmp_path / "rows.csv")
    assert shell("check", plain).code == 0
    (tmp_path / "rows.csv").unlink()
    one_sentence(shell("check", plain), f"no such path '{plain.with_name('rows.csv')}'")


@pytest.mark.recipe
def test_resume_needs_nothing_but_the_folder(shell, plain, tmp_path, monkeypatch):
    data = tmp_path / "moved.csv"
    plain.with_name("rows.csv").rename(data)
    words = ["run", plain, "stage.0.lr=0.01", "seed=3", "--data", "moved.csv", "--out", "r"]
    assert shell(*words).code == 0
    result = Path("r/result.json").read_text()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = tmp_path / "r"
    for words in (["--resume", run], [run, "--resume"], ["--out", run, "--resume"], [plain, "--resume", run],
                  [plain, "--out", run, "--resume"], [plain, "seed=3", "--resume", run]):  # fmt: skip
        said = shell("run", *words)
        assert said.code == 0, (words, said.err)
        assert "train: already done" in said.out
    assert (run / "result.json").read_text() == result
    one_sentence(shell("run", plain, "seed=4", "--resume", run), "belongs to another recipe")
    plain.write_text(PLAIN.replace("epochs = 1", "epochs = 2"))
    one_sentence(shell("run", plain, "--resume", run), "epochs was 1, now 2")
    one_sentence(shell("run", run), "is the folder of a run; resume it with --resume")


@pytest.mark.recipe
def test_resume_of_a_command_needs_nothing_but_the_folder(shell, plain):
    assert shell("run", plain, "--out", "a").code == 0
    assert shell("sparsify", "a", "density=0.5", "keep_first=false", "--out", "s").code == 0
    for words in (["--resume", "s"], ["--out", "s", "--resume"], ["a", "density=0.5", "keep_first=false", "--out", "s",
                  "--resume"]):  # fmt: skip
        said = shell("sparsify", *words)
        assert said.code == 0, (words, said.err)
        assert "already done" in said.out
    one_sentence(shell("quantize", "s", "--resume"), "there is no run to resume")
    assert shell("run", "--resume", "s").code == 0


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
def test_recipes_of_windows_editors_are_read_or_told(shell, plain, encoding):
    plain.write_bytes(PLAIN.replace("\n", "\r\n").replace("my recipe", "über").encode(encoding))
    said = shell("check", plain)
    if encoding == "utf-16-le":  # without a mark at its beginning
        one_sentence(said, "recipe: ")
    else:
        assert said.code == 0, said.err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[[stage]]", "[stage]", "stages are a list, so write [[stage]]"),
        ("[[stage]]", "[stage]\nkind = 'train'\n[stage]", "write [[stage]] with two brackets"),
        ('"rows.csv"', '"C:\\users\\me.csv"', "write that path in 'single quotes'"),
        ('"rows.csv"', "\u201crows.csv\u201d", "write plain quotes"),
        ("epochs = 1", "epochs = None", "leave out a key that has no value"),
    ],
)
def test_frequent_mistakes_in_toml_are_told_with_their_cure(shell, plain, old, new, message):
    plain.write_text(PLAIN.replace(old, new), "utf-8")
    one_sentence(shell("check", plain), "recipe", message)


def test_a_recipe_in_latin_1_is_told(shell, plain):
    plain.write_bytes(PLAIN.replace("my recipe", "\u00fcber").encode("latin-1"))
    one_sentence(
        shell("check", plain), "line 1 is not UTF-8, which TOML must be", "save it as UTF-8"
    )


@pytest.mark.recipe
def test_the_module_is_the_command_line(tmp_path):
    asked = [sys.executable, "-m", "fedpress", "privacy", "epsilon", "--steps", "10"]
    asked += ["--sampling-prob", "1.0", "--noise-multiplier", "5", "--delta", "1e-3"]
    done = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    wrong = subprocess.run([*asked[:3], "runn"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "Usage: python -m fedpress" in wrong.stderr
