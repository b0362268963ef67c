"""Drafts a recipe for a function of the user's own, with a stub of it and a test."""

from __future__ import annotations

import json

from fedpress.core import consent
from fedpress.errors import DataError
from fedpress.pipeline.drafting.base import Draft, name_of

FUNCTION = """name = {name}
description = {description}

[data]
source = {source}  # a function in {file}, beside this recipe
public_share = 0.1  # of each client's rows, for training before the federation

[model]
architecture = "mlp"  # its sizes follow from the data

[[stage]]
kind = "train"
epochs = 10
batch_size = 32

[[stage]]
kind = "federate"
num_rounds = 10
lr = 0.1
batch_size = 32

[[stage]]
kind = "export"
"""

STUB = '''"""Reads your data for fedpress."""

import numpy as np


def {function}(path=None, seed=0):
    """Returns the examples of each client: {{name: (x, y)}}.

    x: float32 numbers [n, ...], or uint8 images [n, channels, height, width].
    y: class numbers from 0 up [n], or words [n]; floats [n] for a regression.
    All clients have the same shapes and types, and no NaN. `path` is data.path of the recipe.
    """
    clients = {{}}
    # Replace these made-up numbers by your own.
    for number in range(5):
        chance = np.random.default_rng((seed, number))
        x = chance.normal(size=(100, 6)).astype(np.float32)
        y = np.where(x[:, 0] + x[:, 1] > 0, "high", "low")
        clients[f"client {{number}}"] = (x, y)
    return clients
'''

TEST = '''"""Checks that the data are as fedpress expects them."""

import numpy as np
from {module} import {function}


def test_every_client_has_examples_of_one_shape_and_a_target_for_each():
    clients = {function}()
    assert clients
    shapes = set()
    for x, y in clients.values():
        x, y = np.asarray(x), np.asarray(y)
        assert len(x) == len(y) > 0
        assert x.dtype == np.uint8 or np.isfinite(x).all()
        shapes.add((x.shape[1:], x.dtype, y.shape[1:]))
    assert len(shapes) == 1


def test_the_same_seed_gives_the_same_examples():
    first, second = {function}(seed=3), {function}(seed=3)
    assert all(np.array_equal(first[name][0], second[name][0]) for name in first)
'''


def of_function(name: str) -> Draft:
    """Drafts a recipe for `module:function`, a stub of the function, and a test of it.

    Raises:
        DataError: if the name is none, or the module is a part of a package.
    """
    if not consent.NAME.fullmatch(name):
        raise DataError(
            f"got '{name}'", place="data", cure="give a file, a folder, or module:function"
        )
    module, function = name.split(":")
    file = f"{module}.py"
    if "." in module:
        raise DataError(
            f"'{module}' is a part of a package", place="data", cure="give a plain module:function"
        )
    text = FUNCTION.format(
        name=json.dumps(name_of(module)),
        description=json.dumps(f"learns from the data of {name}"),
        source=json.dumps(name),
        file=file,
    )
    files = {
        file: STUB.format(function=function),
        f"test_{file}": TEST.format(module=module, function=function),
    }
    return Draft(text, files, (f"{file}: replace the made-up numbers by your own",))
