"""Keys and certificates: what is written is read again, and every wrong file is named."""

import stat
import subprocess

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from fedpress.errors import NetworkError
from fedpress.network import keys


@pytest.fixture(scope="module")
def authority():
    return keys.Authority.new()


@pytest.fixture
def files(authority, tmp_path):
    """Returns ca.crt, server.crt and server.key of one network."""
    ca, certificate, key = tmp_path / "ca.crt", tmp_path / "server.crt", tmp_path / "server.key"
    authority.write(tmp_path / "ca.key", ca)
    authority.sign_server("server.example", key, certificate)
    return ca, certificate, key


def ed25519_files(folder):
    """Writes a key of another kind, in both formats."""
    key = ed25519.Ed25519PrivateKey.generate()
    raw = serialization.NoEncryption()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, raw)
    ssh = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, raw)
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    keys.write_private(folder / "other.pem", pem)
    keys.write_private(folder / "other.ssh", ssh)
    return public.decode()


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_private_files_are_for_their_owner_alone(files, tmp_path):
    keys.write_node_key(tmp_path)
    keys.identity_of(tmp_path)
    for name in ("ca.key", "server.key", "node.key", "identity.key"):
        assert mode(tmp_path / name) == 0o600, name


def test_an_authority_is_read_as_it_was_written(files, tmp_path, authority):
    read = keys.Authority.read(tmp_path / "ca.key", files[0])
    assert read.certificate == authority.certificate
    read.sign_server("other.example", files[2], files[1])
    keys.check_server(*files)


@pytest.mark.parametrize(
    ("host", "kind"),
    [("server.example", "hostname"), ("192.0.2.1", "ip"), ("2001:db8::1", "ip")],
)
def test_openssl_accepts_the_certificate_for_its_host_and_for_localhost(
    authority, tmp_path, host, kind
):
    ca, certificate, key = tmp_path / "ca.crt", tmp_path / "server.crt", tmp_path / "server.key"
    authority.write(tmp_path / "ca.key", ca)
    authority.sign_server(host, key, certificate)
    for name, value in ((kind, host), ("hostname", "localhost"), ("ip", "127.0.0.1")):
        words = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver"]
        words += [f"-verify_{name}", value, "-CAfile", str(ca), str(certificate)]
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_a_certificate_says_for_how_long_it_is_valid(authority, tmp_path):
    for days in (397, 5, 0):
        authority.sign_server("a", tmp_path / "k", tmp_path / "c", days=days)
        assert days - 1 < keys.days_left(tmp_path / "c") <= days


def test_a_node_key_is_read_again_and_others_get_the_public_part(tmp_path):
    public = keys.write_node_key(tmp_path)
    key = keys.read_node_key(tmp_path / "node.key")
    assert (tmp_path / "node.pub").read_text() == f"{public}\n"
    assert public.startswith("ecdsa-sha2-nistp384 ")
    found = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    assert found.decode() == public
    assert keys.check_public(f"{public} somebody@there\n", "x") == public


def test_a_node_key_that_others_may_read_is_refused_until_the_cure_is_done(tmp_path):
    keys.write_node_key(tmp_path)
    path = tmp_path / "node.key"
    path.chmod(0o640)
    with pytest.raises(NetworkError, match="other users") as caught:
        keys.read_node_key(path)
    assert caught.value.place == str(path)
    subprocess.run(caught.value.cure.split(), check=True)
    keys.read_node_key(path)


def test_a_wrong_node_key_is_named(tmp_path):
    ed25519_files(tmp_path)
    empty = tmp_path / "empty"
    keys.write_private(empty, b"")
    for path, problem in (
        (tmp_path / "missing", "cannot be read"),
        (empty, "cannot be read"),
        (tmp_path / "other.ssh", "elliptic curve"),
    ):
        with pytest.raises(NetworkError, match=problem) as caught:
            keys.read_node_key(path)
        assert caught.value.place == str(path)
        assert caught.value.cure


def test_a_wrong_public_key_is_named(tmp_path):
    for text in (
        "",
        "ecdsa-sha2-nistp384",
        "ecdsa-sha2-nistp384 AAAA",
        "é",
        ed25519_files(tmp_path),
    ):
        with pytest.raises(NetworkError) as caught:
            keys.check_public(text, "server.toml: clients.a")
        assert caught.value.place == "server.toml: clients.a"
        assert "node.pub" in caught.value.cure


def test_a_wrong_authority_is_named(files, tmp_path):
    ed25519_files(tmp_path)
    for path in (tmp_path / "missing", files[0], tmp_path / "other.pem"):
        with pytest.raises(NetworkError) as caught:
            keys.Authority.read(path, files[0])
        assert caught.value.place == str(path)


def test_a_server_with_files_of_two_networks_is_refused(files, tmp_path):
    keys.check_server(*files)
    ca, certificate, key = files
    other = tmp_path / "other"
    other.mkdir()
    keys.Authority.new().sign_server("server.example", other / "key", other / "crt")
    keys.Authority.new().write(other / "ca.key", other / "ca.crt")
    for given, place in (
        ((ca, certificate, other / "key"), other / "key"),
        ((ca, other / "crt", other / "key"), other / "crt"),
        ((other / "ca.crt", certificate, key), certificate),
        ((key, certificate, key), key),
        ((ca, certificate, certificate), certificate),
        ((ca, tmp_path / "missing", key), tmp_path / "missing"),
    ):
        with pytest.raises(NetworkError) as caught:
            keys.check_server(*given)
        assert caught.value.place == str(place)


def test_an_identity_is_drawn_once(tmp_path):
    first = keys.identity_of(tmp_path)
    assert len(first) == 32
    assert keys.identity_of(tmp_path) == first
    (tmp_path / "identity.key").write_bytes(b"short")
    with pytest.raises(NetworkError, match="5 bytes, expected 32"):
        keys.identity_of(tmp_path)
