"""The commands of a deployment: what they write and say, and that a mistake is told with its cure."""

import socket

import numpy as np
import pytest

pytest.importorskip("flwr")

from fedpress.api import begin
from fedpress.cli.server import public_alone
from fedpress.network.folders import ClientFolder, ServerFolder
from fedpress.pipeline.start import load_data
from tests.stages.statistics import hospitals as statistics


@pytest.fixture
def made(shell, tmp_path):
    """Makes a network with two clients in the working folder."""
    said = shell("network", "init", "--host", "server.example", "--clients", "a,b")
    assert said.code == 0
    return said


@pytest.fixture
def own(tmp_path):
    """Returns a file with examples of digits."""
    path = tmp_path / "own.npz"
    y = np.arange(20) % 10
    np.savez(path, x=np.zeros((20, 1, 8, 8), dtype=np.uint8), y=y)
    return path


def test_init_says_what_goes_where(made, tmp_path):
    assert "network/server: copy it to server.example; open port 9443 there" in made.out
    assert "network/clients/a: copy it to the machine of a" in made.out
    assert "authority: keep it off line" in made.out
    assert "Traceback" not in made.err


def test_clients_are_counted_or_named(shell, tmp_path):
    assert shell("network", "init", "--host", "h", "--clients", "2", "--out", "n").code == 0
    assert {path.name for path in (tmp_path / "n" / "clients").iterdir()} == {
        "client-1",
        "client-2",
    }


def test_add_and_renew_leave_folders_that_are_read(shell, made, tmp_path):
    assert shell("network", "add", "c").code == 0
    assert shell("network", "renew").code == 0
    assert set(ServerFolder.read(tmp_path / "network" / "server").config.clients) == {"a", "b", "c"}
    ClientFolder.read(tmp_path / "network" / "clients" / "c")


INIT = ("network", "init", "--host", "h", "--clients")
WRONG = [
    ((*INIT, "0", "--out", "n"), "clients"),
    ((*INIT, ",", "--out", "n"), "clients"),
    ((*INIT, "a,a", "--out", "n"), "clients"),
    ((*INIT, "a/b", "--out", "n"), "clients"),
    ((*INIT, "1"), "network"),
    ((*INIT, "1", "--port", "0", "--out", "n"), "port"),
    (("network", "init", "--host", "https://h", "--clients", "1", "--out", "n"), "host"),
    (("network", "add", "a"), "'a'"),
    (("network", "add", "../c"), "clients"),
    (("network", "add", "c", "--network", "none"), "server.toml"),
    (("network", "renew", "--network", "none"), "server.toml"),
    (("server", "digits"), "--network"),
    (("server", "digits", "--network", "network/server", "--insecure"), "network"),
    (("server", "digits", "--network", "none"), "server.toml"),
    (("server", "none.toml", "--insecure"), "none.toml"),
    (("client",), "--data"),
    (("client", "--data", "none.npz", "--insecure", "--name", "a"), "none.npz"),
    (("client", "--data", "own.npz"), "--network"),
    (("client", "--data", "own.npz", "--network", "network/clients/a", "--insecure"), "network"),
    (("client", "--data", "own.npz", "--network", "none"), "client.toml"),
    (("client", "--data", "own.npz", "--insecure"), "--name"),
    (("client", "--data", "own.npz", "--insecure", "--name", "a", "--server", "h:1"), "insecure"),
    (("client", "--data", "own.npz", "--insecure", "--name", "a", "--server", "h"), "host:port"),
    (("client", "--data", "own.npz", "--check", "none.toml"), "none.toml"),
    (("client", "--data", "own.txt", "--check", "digits"), ".safetensors"),
]


@pytest.mark.parametrize(("words", "named"), WRONG, ids=[" ".join(words) for words, _ in WRONG])
def test_a_mistake_is_an_error_of_one_sentence_and_exit_code_2(
    shell, made, own, tmp_path, words, named
):
    (tmp_path / "own.txt").write_text("x")
    said = shell(*words)
    assert said.code == 2
    assert said.err.startswith("error: ")
    assert named in said.err
    assert "Traceback" not in said.err
    assert "; " in said.err  # problem; cure


def test_a_port_in_use_is_told_before_a_run_begins(shell, tmp_path, tiny_file):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = shell("server", tiny_file, "--insecure", "--port", port, "--out", "run")
    assert said.code == 2
    assert f"127.0.0.1:{port}" in said.err
    assert not (tmp_path / "run").exists()


def test_split_writes_a_file_for_each_client_and_never_over_another(shell, tmp_path, tiny_file):
    said = shell("network", "split", tiny_file)
    assert said.code == 0
    assert {path.name for path in (tmp_path / "clients").iterdir()} == {
        "c0.safetensors",
        "c1.safetensors",
        "c2.safetensors",
    }
    again = shell("network", "split", tiny_file)
    assert again.code == 2
    assert "clients" in again.err
    assert "--out" in again.err
    checked = shell("client", "--data", "clients/c0.safetensors", "--check", tiny_file)
    assert checked.code == 0
    assert "examples of shape" in checked.out


def test_split_refuses_examples_that_a_query_has_still_to_complete(shell, tmp_path):
    text = statistics.written(tmp_path / "tables") + statistics.FIRST
    (tmp_path / "private.toml").write_text(text)
    said = shell("network", "split", "private.toml")
    assert said.code == 2
    assert "recipe.data.statistics: the clients' examples follow from the answer" in said.err
    assert not (tmp_path / "clients").exists()


@pytest.fixture
def hospitals(tmp_path):
    """Returns a recipe whose clients' table is not here, and the table of the server."""
    table = tmp_path / "public.csv"
    rows = [f"{at}.5,{'ill' if at % 2 else 'healthy'}" for at in range(40)]
    table.write_text("\n".join(["age,outcome", *rows]))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'name = "r"\n[data]\nsource = "csv"\npath = "all.csv"\nlabel_column = "outcome"\n'
        'client_column = "hospital"\npublic_clients = ["open"]\n[model]\narchitecture = "mlp"\n'
        'arguments = { in_features = 1, num_classes = 2 }\n[[stage]]\nkind = "federate"\nnum_rounds = 1\n'
    )
    return recipe, table


def test_a_file_of_public_rows_takes_the_place_of_the_recipes_clients(hospitals):
    recipe, table = hospitals
    data = load_data(begin.load(str(recipe), public_alone(table))[1])
    assert len(data.public) > 20
    # The server leaves the only client's example out.
    assert not data.without_clients().clients


def test_a_server_checks_its_part_without_the_file_of_the_clients(shell, hospitals):
    recipe, table = hospitals
    said = shell("check", recipe)
    assert said.code == 2
    assert "all.csv'; check the path; " in said.err
    assert "if the clients have the data, give --public FILE" in said.err
    said = shell("check", recipe, "--public", table)
    assert said.code == 0
    assert "0 clients" in said.out
    assert "fedpress server checks this stage" in " ".join(said.out.split())
    assert "fedpress server" in said.out.splitlines()[-1]
    # The line makes the clients' check see another name of a column.
    assert 'write under [data]: feature_columns = ["age"]' in said.out
    recipe.write_text(recipe.read_text().replace("[data]", '[data]\nfeature_columns = ["age"]'))
    said = shell("check", recipe, "--public", table)
    assert said.code == 0
    assert "write under" not in said.out
