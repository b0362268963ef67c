import subprocess
import sys
from importlib.util import find_spec

import pytest

from fedpress.errors import NetworkError, RecipeError
from fedpress.transport import LocalTransport
from fedpress.transport.engine import engine_settings, open_engine
from fedpress.transport.ray import settings as ray_module
from fedpress.wire import Message, pack


class Side:
    def handle(self, request):
        return pack(Message("bytes"))

    def answer(self, message):
        return Message("message")


@pytest.mark.parametrize(
    ("engine", "kind"),
    [
        ("local", "message"),
        ({"kind": "local", "bytes": "computed"}, "message"),
        ({"kind": "local", "bytes": "real"}, "bytes"),
    ],
)
def test_the_local_engine_is_the_local_transport(engine, kind):
    with open_engine(engine_settings(engine)) as opened:
        transport = opened.connect({"b": Side(), "a": Side()}, dict)
    assert isinstance(transport, LocalTransport)
    assert transport.clients() == ["b", "a"]
    request = transport.send("a", Message("m"))
    assert transport.receive([request])[2].kind == kind


@pytest.mark.parametrize(
    ("engine", "sentence"),
    [
        (
            "rya",
            r"engine: got 'rya', expected auto, local, processes, stacked or ray; did you mean 'ray'\?",
        ),
        ({}, r"engine: got no kind, .* or ray; give engine=\"auto\""),
        ({"kind": "local", "actors": 2}, r"engine.actors: no such setting .* give engine=\"ray\""),
        ({"kind": "local", "bytes": "true"}, r"engine.bytes: got 'true', expected 'computed' or"),
        ({"kind": "ray", "bytes": "real"}, r"engine.bytes: no such .* give engine=\"local\""),
        ({"kind": "ray", "actor": 2}, r"engine.actor: .* did you mean 'actors'\?"),
        (
            {"kind": "ray", "actors": 0},
            r"engine.actors: got 0, expected a number greater than or equal to 1",
        ),
        ({"kind": "ray", "cpus_per_client": 0}, r"engine.cpus_per_client: got 0"),
        ({"kind": "ray", "address": "ray://a:1"}, r"engine.address: .* expected auto or HOST:PORT"),
    ],
)
def test_wrong_settings_are_named_with_a_cure(engine, sentence):
    with pytest.raises(RecipeError, match=sentence):
        engine_settings(engine)


def test_a_missing_ray_is_told_before_any_work(monkeypatch):
    monkeypatch.setattr(ray_module, "find_spec", lambda name: None)
    with pytest.raises(NetworkError, match=r'engine: Ray is not installed; pip install "fedpress'):
        engine_settings("ray")


@pytest.mark.recipe
@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is installed")
def test_the_command_ends_with_2_without_ray(tmp_path):
    words = ["run", "digits", "--engine", "ray", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-m", "fedpress", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert 'Ray is not installed; pip install "fedpress[ray]"' in done.stderr
    assert not (tmp_path / "run").exists()


def test_one_thread_of_torch_for_each_cpu_of_a_client(monkeypatch):
    monkeypatch.setattr(ray_module, "find_spec", lambda name: True)
    for cpus, threads in {0.25: 1, 1: 1, 2.5: 2}.items():
        assert engine_settings({"kind": "ray", "cpus_per_client": cpus}).threads == threads
