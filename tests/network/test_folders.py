"""The folders of a network: what init, add and renew write is read, and each mistake is named."""

import tomllib

import pytest
import tomli_w

from fedpress.errors import NetworkError
from fedpress.network import folders, keys
from fedpress.network.folders import ClientFolder, ServerFolder, host_and_port


@pytest.fixture
def made(tmp_path):
    """Returns the folder of a network with two clients."""
    out = tmp_path / "network"
    folders.init(out, ["a", "b"], "server.example", 9443)
    return out


def refused(call, *arguments):
    with pytest.raises(NetworkError) as caught:
        call(*arguments)
    assert caught.value.cure
    return caught.value


def change(path, **keys_of):
    path.write_text(tomli_w.dumps({**tomllib.loads(path.read_text()), **keys_of}))


def test_what_init_writes_is_what_server_and_clients_read(made):
    server = ServerFolder.read(made / "server")
    assert (server.config.host, server.config.port) == ("server.example", 9443)
    for name in "ab":
        client = ClientFolder.read(made / "clients" / name)
        assert client.config.name == name
        assert host_and_port(client.config.server) == ("server.example", 9443)
        public = (made / "clients" / name / "node.pub").read_text().strip()
        assert server.config.clients[name] == public
        assert (client.path / "ca.crt").read_bytes() == (made / "server" / "ca.crt").read_bytes()


def test_no_secret_of_one_machine_lies_in_the_folder_of_another(made):
    secrets = {path: path.read_bytes() for path in made.rglob("*") if path.suffix == ".key"}
    assert len(secrets) == 4
    for path, secret in secrets.items():
        others = [p for p in made.rglob("*") if p.is_file() and p != path]
        assert not any(secret in other.read_bytes() for other in others)
    assert not list((made / "server").glob("ca.key"))


def test_an_address_of_version_6_has_brackets(tmp_path):
    folders.init(tmp_path / "n", ["a"], "2001:db8::1", 1)
    client = ClientFolder.read(tmp_path / "n" / "clients" / "a")
    assert client.config.server == "[2001:db8::1]:1"


def test_a_further_client_is_listed_with_its_key(made):
    before = ServerFolder.read(made / "server").config.clients
    folders.add(made, "c")
    after = ServerFolder.read(made / "server").config.clients
    assert {name: after[name] for name in before} == before
    assert after["c"] == (made / "clients" / "c" / "node.pub").read_text().strip()
    assert "there is a client 'c'" in str(refused(folders.add, made, "c"))


def test_a_client_that_was_forgotten_in_server_toml_is_told(made):
    (made / "clients" / "c").mkdir()
    error = refused(folders.add, made, "c")
    assert error.place == str(made / "clients" / "c")
    (made / "clients" / "c").rmdir()
    folders.add(made, "c")


def test_an_expired_certificate_is_renewed_by_the_command_that_the_error_names(made):
    home = made / "authority"
    authority = keys.Authority.read(home / "ca.key", home / "ca.crt")
    server = made / "server"
    authority.sign_server("server.example", server / "server.key", server / "server.crt", days=0)
    error = refused(ServerFolder.read, server)
    assert "expired" in error.problem
    assert "fedpress network renew" in error.cure
    folders.renew(made)
    assert ServerFolder.read(server).config.host == "server.example"


def test_a_network_without_its_authority_cannot_renew(made):
    (made / "authority" / "ca.key").unlink()
    assert "ca.key" in refused(folders.renew, made).place


@pytest.mark.parametrize(
    ("names", "host", "port", "place"),
    [
        ([], "h", 1, "clients"),
        (["a", "a"], "h", 1, "clients"),
        (["../a"], "h", 1, "clients"),
        ([""], "h", 1, "clients"),
        ([".a"], "h", 1, "clients"),
        (["a b"], "h", 1, "clients"),
        (["a" * 61], "h", 1, "clients"),
        (["a"], "", 1, "host"),
        (["a"], "https://h", 1, "host"),
        (["a"], "h:9443", 1, "host"),
        (["a"], "hütte", 1, "host"),
        (["a"], "h h", 1, "host"),
        (["a"], "h", 0, "port"),
        (["a"], "h", 65536, "port"),
    ],
)
def test_init_writes_nothing_if_it_cannot_write_all(tmp_path, names, host, port, place):
    assert refused(folders.init, tmp_path / "n", names, host, port).place == place
    assert not (tmp_path / "n").exists()


def test_init_never_writes_over_keys(made):
    key = (made / "authority" / "ca.key").read_bytes()
    assert refused(folders.init, made, ["a"], "h", 1).place == str(made)
    assert (made / "authority" / "ca.key").read_bytes() == key


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("name = ", "not TOML"),
        ("name = 3\nserver = 'h:1'\n", "name"),
        ("server = 'h:1'\n", "name"),
        ("name = 'a'\nserver = 'h:1'\nthreds = 2\n", "threds"),
        ("name = 'a'\nserver = 'h:1'\nthreads = 0\n", "threads"),
        ("name = 'a'\nserver = 'h'\n", "got 'h'"),
        ("name = 'a'\nserver = 'h:99999'\n", "got 'h:99999'"),
    ],
)
def test_a_mistake_in_client_toml_names_the_file_and_the_key(made, text, problem):
    path = made / "clients" / "a" / "client.toml"
    path.write_text(text)
    error = refused(ClientFolder.read, path.parent)
    assert error.place.startswith(str(path))
    assert problem in error.problem


@pytest.mark.parametrize(
    ("keys_of", "where"),
    [
        ({"port": 0}, "port"),
        ({"prot": 1}, "prot"),
        ({"clients": ["a"]}, "clients"),
        ({"clients": {"a": "AAAA"}}, "clients.a"),
        ({"clients": {"a": 3}}, "clients.a"),
    ],
)
def test_a_mistake_in_server_toml_names_the_file_and_the_key(made, keys_of, where):
    path = made / "server" / "server.toml"
    change(path, **keys_of)
    error = refused(ServerFolder.read, path.parent)
    assert error.place.startswith(str(path))
    assert where in str(error)


def test_two_clients_with_one_key_are_named(made):
    path = made / "server" / "server.toml"
    clients = tomllib.loads(path.read_text())["clients"]
    change(path, clients={"a": clients["a"], "b": f"{clients['a']} copied@there"})
    error = refused(ServerFolder.read, path.parent)
    assert error.place == f"{path}: clients.b"
    assert "key of 'a'" in error.problem


@pytest.mark.parametrize(
    ("folder", "kind", "names"),
    [
        ("server", ServerFolder, ("server.toml", "ca.crt", "server.crt", "server.key")),
        ("clients/a", ClientFolder, ("client.toml", "ca.crt", "node.key")),
    ],
)
def test_a_missing_file_is_named(made, folder, kind, names):
    for name in names:
        path = made / folder / name
        content = path.read_bytes()
        path.unlink()
        error = refused(kind.read, made / folder)
        assert name in str(error)
        path.write_bytes(content)
    kind.read(made / folder)


def test_a_folder_that_is_none_says_which_to_give(tmp_path, made):
    for path in (tmp_path / "missing", made, made / "clients" / "a", made / "server" / "ca.crt"):
        error = refused(ServerFolder.read, path)
        assert "--network" in error.cure


@pytest.mark.parametrize("text", ["", ":1", "h", "h:", "h:x", "h:0", "h:65536", "h:-1", "9443"])
def test_what_is_no_host_and_port_is_refused(text):
    assert refused(host_and_port, text).place == "server"
