"""Converts `clients={name: data, ...}` of `fedpress.federate` to a federated data set."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedpress.core.examples import Arrays, Preprocess
from fedpress.core.inputs import Inputs, dtype_of, inputs_text, join, map_inputs, signature_of
from fedpress.core.random_source import public_stream
from fedpress.data import FederatedData
from fedpress.errors import Argument, DataError
from fedpress.pipeline.commands.given import (
    TEST_SHARE,
    as_taken,
    check_taken,
    classes_in,
    named_task,
    naming_parts,
    pair_of,
    task_of_targets,
)
from fedpress.tasks import Binary, Classification, Task

PAIR = "a pair (inputs, labels), a torch Dataset or a DataLoader"
"""What the data of one client may be, for errors."""


@dataclass(frozen=True)
class Clients:
    """The data of a federation in memory.

    Each part is a pair (inputs, labels), a Dataset or a DataLoader.

    Attributes:
        clients: name -> private examples of that client.
        test: test set. None: 20% of each client's examples become the test set.
        public: public examples, for stages that train or calibrate on them. None: there are none.
        task: the task, as in `data.task` of a recipe, such as "regression". None: derived from the
            labels and the model.
        classes: names of the classes; None: "0", "1" and so on, one for each output of the model.
        place: name of the argument that holds the clients, for errors.
    """

    clients: Mapping[str, Any]
    test: Any = None
    public: Any = None
    task: str | Mapping[str, Any] | None = None
    classes: Sequence[str] | None = None
    place: str = "clients"

    def federated(
        self, preprocess: Preprocess, model: nn.Module | None, saved: Task | None
    ) -> FederatedData:
        """Makes the federated data set.

        The task and the number of classes follow from the model, the user's arguments, and the
        dtype and shape of the labels. The values of the labels are private and are not used. So
        there may be a class without any example.

        Args:
            preprocess: standardisation of the network's inputs.
            model: the model to be federated; None if it is not known yet.
            saved: task of a saved model; None for other models.

        Raises:
            DataError: if there are no clients, if a part has no examples or no labels, if clients
                have examples of different shapes or dtypes, or if labels and model fit no task.
            RecipeError: if there is no task of the name `self.task`.
        """
        if not isinstance(self.clients, Mapping) or not self.clients:
            raise DataError(
                f"got {type(self.clients).__name__}, expected a dictionary of at least one client",
                place=self.place,
                cure='give {"north": (inputs, labels), "south": dataset}',
            )
        raw = {name: _pair(self._place_of(name), data) for name, data in self.clients.items()}
        # All clients must agree with the first one. Shape and dtype are not private.
        first_x, first_y = next(iter(raw.values()))
        for name, (x, _) in raw.items():
            if signature_of(x) != signature_of(first_x):
                raise DataError(
                    f"examples of {inputs_text(x)}, but the first client has examples of "
                    f"{inputs_text(first_x)}",
                    place=self._place_of(name),
                    cure="give all clients examples of the same shape and dtype",
                )
        shape: tuple[int, ...] | None = None
        as_floats = False
        if model is not None:
            taken, shape = as_taken(first_x, model, preprocess)
            as_floats = dtype_of(taken) != dtype_of(first_x)
            if shape is None:
                check_taken(first_x, model, preprocess, self._place_of(next(iter(raw))))
        shared = self._shared()
        task = saved or self._task(first_y, shape, shared[1] if shared else None)

        def arrays(x: Inputs, y: Tensor) -> Arrays:
            rows = map_inputs(x, Tensor.float) if as_floats else x
            return Arrays(rows, y.to(torch.int64 if task.targets == "classes" else torch.float32))

        private = {str(name): arrays(*pair) for name, pair in raw.items()}
        none = arrays(first_x[:0], first_y[:0])
        public = arrays(*shared) if shared else none
        if self.test is not None:
            parts = _Parts(private, arrays(*_pair("test", self.test)))
        else:
            parts = _put_aside(private)
        names = task.names if task.targets == "classes" else ()
        with naming_parts(self._arguments()):
            return FederatedData(
                name="data in memory",
                clients=parts.clients,
                public=public,
                validation=none,
                test=parts.test,
                num_classes=len(names),
                class_names=names,
                preprocess=preprocess,
                task=task,
                test_owners=parts.test_owners,
                test_owner_names=parts.test_owner_names,
            )

    def _arguments(self) -> dict[str, str]:
        """Returns part of the data set -> name of the argument that it came from."""
        arguments = {f"client '{name}'": self._place_of(name) for name in self.clients}
        arguments["public part"] = "public"
        # Without `test=`, the test set is a share of the clients' examples.
        own_test = self.test is not None and self.place == "clients"
        arguments["test part"] = "test" if own_test else self.place
        return arguments

    def _shared(self) -> tuple[Inputs, Tensor] | None:
        """Reads the public examples; None if there are none."""
        return None if self.public is None else _pair("public", self.public)

    def _place_of(self, name: str) -> str:
        return f"clients[{name!r}]" if self.place == "clients" else self.place

    def _task(self, y: Tensor, outputs: tuple[int, ...] | None, public: Tensor | None) -> Task:
        """Finds the task from the labels' dtype and shape and from the model's outputs.

        A task that the user names may compute values, such as their mean, from public targets.

        Raises:
            DataError: if labels and outputs fit no task, or the number of classes is not known.
        """
        if self.task is not None:
            return named_task(self.task, y, outputs, self.classes, public=public)
        found = task_of_targets(y, outputs)
        if found is not None and not (found.kind == "binary" and self.classes):
            return found
        if found is not None:
            return Binary(tuple(self.classes or ()))
        count = classes_in(outputs) or len(self.classes or ())
        # If there are more or fewer names than outputs, the list or the model is wrong.
        if self.classes and len(self.classes) != count:
            raise DataError(
                f"{len(self.classes)} names, but the model has {count} outputs",
                place="classes",
                cure="give one name for each output",
            )
        if y.is_floating_point() or count < 2:
            shape = list(y.shape)[1:]
            gives = "unknown" if outputs is None else f"{list(outputs)}"
            raise DataError(
                f"the label of one example has type {y.dtype} and shape {shape}, but the model's "
                f"output has shape {gives}",
                place=self.place,
                cure=(
                    "for a classification, give whole numbers below the number of outputs; for a "
                    "regression, floats in the shape of the outputs; or name another task with ",
                    Argument("task", "multilabel"),
                ),
            )
        return Classification(tuple(self.classes or map(str, range(count))))


def _pair(place: str, data: Any) -> tuple[Inputs, Tensor]:
    """Reads one data set.

    Raises:
        DataError: if it has no examples or no labels, or not as many labels as inputs.
    """
    try:
        x, y = pair_of(data)
    except DataError as error:
        error.place = place
        raise
    # Clients train on labels, so inputs alone are not enough here.
    if y is None or not len(x):
        raise DataError(
            "it has no labels" if len(x) else "it has no examples",
            place=place,
            cure=f"give {PAIR}",
        )
    if len(x) != len(y):
        raise DataError(
            f"{len(x)} inputs but {len(y)} labels",
            place=place,
            cure="give one label for each input",
        )
    return x, y


@dataclass(frozen=True)
class _Parts:
    """Clients and test set; what each field holds is in `FederatedData`."""

    clients: Mapping[str, Arrays]
    test: Arrays
    test_owners: Tensor | None = None
    test_owner_names: tuple[str, ...] = ()


def _put_aside(private: Mapping[str, Arrays]) -> _Parts:
    """Makes 20% of each client's examples the test set; each client keeps at least one example."""
    kept: dict[str, Arrays] = {}
    tests: dict[str, Arrays] = {}
    for name, arrays in private.items():
        # The name is part of the stream, so a client's test rows do not depend on other clients.
        order = public_stream(0, "test examples of a client", name).permutation(len(arrays))
        # Rounded down, so a client with fewer than five examples keeps all of them.
        count = int(TEST_SHARE * len(arrays))
        tests[name] = arrays.take(order[:count])
        kept[name] = arrays.take(order[count:])
    joined = Arrays(
        join([part.x for part in tests.values()]), torch.cat([part.y for part in tests.values()])
    )
    if not len(joined):
        warnings.warn(
            "no client has five examples, so there is no test set and nothing is measured; give "
            "test=",
            stacklevel=3,
        )
        return _Parts(kept, joined)
    names = tuple(name for name, part in tests.items() if len(part))
    sizes = torch.tensor([len(tests[name]) for name in names])
    return _Parts(kept, joined, torch.arange(len(sizes)).repeat_interleave(sizes), names)
