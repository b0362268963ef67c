"""The contract with Flower: every private name that is used, by name, signature and behaviour.

Another version of Flower fails here by the name that has moved, and not somewhere in a round.
"""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import HEARTBEAT_MIN_INTERVAL, HEARTBEAT_PATIENCE, SUPERLINK_NODE_ID
from flwr.supercore.constant import TaskType
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects
from flwr.supercore.task_identity import TaskIdentity

from fedpress.transport import flower
from fedpress.transport.flower.server import BUNDLE

# Names that are called, with the arguments that are given to them.
CALLED = {
    "flwr.app.message.remove_content_from_message": ("message",),
    "flwr.cli.build.build_fab_from_files": ("files",),
    "flwr.common.serde.message_to_proto": ("message",),
    "flwr.supercore.heartbeat.HeartbeatSender": ("heartbeat_fn",),
    "flwr.supercore.inflatable.inflatable_object.get_all_nested_objects": ("obj",),
    "flwr.supercore.inflatable.inflatable_object.get_object_body": ("object_content", "cls"),
    "flwr.supercore.inflatable.inflatable_object.get_object_children_ids_from_object_content": (
        "object_content",
    ),
    "flwr.supercore.inflatable.inflatable_object.get_object_tree": ("obj",),
    "flwr.supercore.inflatable.inflatable_object.get_object_type_from_object_content": (
        "object_content",
    ),
    "flwr.supercore.inflatable.inflatable_object.iterate_object_tree": ("tree",),
    "flwr.supercore.inflatable.inflatable_object.no_object_id_recompute": (),
    "flwr.supercore.inflatable.inflatable_protobuf_utils.make_pull_object_fn_protobuf": (
        "pull_object_protobuf",
        "node",
        "run_id",
    ),
    "flwr.supercore.inflatable.inflatable_protobuf_utils.make_push_object_fn_protobuf": (
        "push_object_protobuf",
        "node",
        "run_id",
        "session_id",
    ),
    "flwr.supercore.inflatable.inflatable_utils.inflate_object_from_contents": (
        "object_id",
        "object_contents",
    ),
    "flwr.supercore.inflatable.inflatable_utils.pull_objects": ("object_ids", "pull_object_fn"),
    "flwr.supercore.inflatable.inflatable_utils.push_objects": (
        "objects",
        "push_object_fn",
        "object_ids_to_push",
    ),
    "flwr.supercore.interceptors.RuntimeTokenHttpInterceptor": ("token",),
    "flwr.supercore.interceptors.RuntimeVersionHttpInterceptor": ("component_name",),
    "flwr.supercore.interceptors.SuperExecAuthHttpInterceptor": (
        "master_secret",
        "protected_methods",
    ),
    "flwr.supercore.primitives.asymmetric.generate_key_pairs": (),
    "flwr.supercore.primitives.asymmetric.public_key_to_bytes": ("public_key",),
    "flwr.supercore.primitives.asymmetric.sign_message": ("private_key", "message"),
    "flwr.superlink.cli.flower_superlink": (),
}
# Clients of Flower's APIs, with the requests that are sent.
CLIENTS = {
    "flwr.supercore.control.ControlHttpClient": ("RegisterNode", "StartRun"),
    "flwr.supercore.runtime.RuntimeHttpClient": (
        "AcquireTask",
        "ConfirmMessageReceived",
        "GetNodes",
        "PullMessages",
        "PullObject",
        "PullTaskInput",
        "PushMessages",
        "PushObject",
        "SendTaskHeartbeat",
    ),
    "flwr.supernode.fleet_http_client.FleetHttpClient": (
        "ActivateNode",
        "ConfirmMessageReceived",
        "DeactivateNode",
        "PullMessages",
        "PullObject",
        "PushMessages",
        "PushObject",
        "RegisterNode",
        "SendNodeHeartbeat",
    ),
}


def named(path):
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def imported():
    """Returns all that the files of the folder import from Flower, with its module."""
    found = set()
    for path in Path(flower.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flwr"):
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return sorted(found)


@pytest.mark.parametrize("path", imported())
def test_flower_has_what_is_imported(path):
    named(path)


@pytest.mark.parametrize("path", sorted(CALLED))
def test_flower_takes_the_arguments_that_are_given(path):
    taken = inspect.signature(named(path)).parameters
    assert [name for name in CALLED[path] if name not in taken] == [], f"{path}{tuple(taken)}"


@pytest.mark.parametrize("path", sorted(CLIENTS))
def test_flower_knows_the_requests_that_are_sent(path):
    kind = named(path)
    assert [name for name in CLIENTS[path] if not callable(getattr(kind, name, None))] == []
    assert "from_server_address" in dir(kind)


def test_everything_that_is_called_is_in_the_contract():
    functions = {path for path in imported() if inspect.isfunction(named(path))}
    assert functions <= set(CALLED)


def test_a_message_keeps_its_content_and_name_through_its_objects():
    # Read by every new message. Nothing resets them: a process has one task.
    TaskIdentity.task_id, TaskIdentity.run_id = 3, 5
    TaskIdentity.node_id = SUPERLINK_NODE_ID
    content = RecordDict({"head": ConfigRecord({"what": "call"})})
    message = Message(content, dst_node_id=7, message_type="query")
    contents = {name: one.deflate() for name, one in get_all_nested_objects(message).items()}
    tree = get_object_tree(message)
    assert {one.object_id for one in iterate_object_tree(tree)} == set(contents)
    again = inflate_object_from_contents(message.object_id, contents)
    assert again.content["head"]["what"] == "call"
    assert (again.metadata.dst_node_id, again.metadata.run_id) == (7, 5)
    # The name that `NodeLink` notes, so that an answer can refer to it.
    again.metadata.__dict__["_message_id"] = tree.object_id
    assert again.metadata.message_id == message.object_id


def test_pulling_asks_once_for_an_object_that_is_taken():
    asked = []

    def pull(name):
        asked.append(name)
        return b"content"

    assert pull_objects(["a", "b"], pull) == {"a": b"content", "b": b"content"}
    assert sorted(asked) == ["a", "b"]
    assert pull_objects([], pull) == {}


def test_an_empty_bundle_is_built_from_files():
    bundle, _ = build_fab_from_files(dict(BUNDLE))
    assert bundle.startswith(b"PK")


def test_the_superlink_asks_extensions_for_middleware():
    from flwr.superlink import extensions

    assert callable(extensions.get_middleware)


def test_the_names_of_superlink_and_its_node_are_numbers_and_enums():
    assert SUPERLINK_NODE_ID == 1
    assert HEARTBEAT_MIN_INTERVAL * HEARTBEAT_PATIENCE <= 20
    assert TaskType.SERVER_APP
