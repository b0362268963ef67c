"""Splits the rows of a source into public rows, validation rows, test rows and clients' rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedpress import tasks
from fedpress.core.examples import Arrays, Preprocess, no_statistics
from fedpress.core.inputs import Inputs, NamedInputs
from fedpress.core.random_source import public_stream
from fedpress.data.dataset import FederatedData
from fedpress.data.dealing import PartitionSize, Pool
from fedpress.data.examples import InputRows, SourceRows, TargetRows
from fedpress.data.partition import Iid, Natural
from fedpress.data.settings import DataSettings
from fedpress.data.windows import overlap, split_by_time
from fedpress.errors import DataError, renaming, suggestion
from fedpress.tasks import Task


def split_rows(examples: SourceRows, settings: DataSettings, seed: int) -> FederatedData:
    """Splits the rows in the order that `DataSettings` describes; equal seeds give equal splits.

    Raises:
        DataError: if there are too few rows for the sizes in the settings, or the settings do not
            fit the data: for example, they name a client that it does not have.
    """
    partition = settings.partition
    if partition is None:
        partition = Iid() if examples.owners is None else Natural()
    if examples.spans is not None and not isinstance(partition, Natural):
        _refuse_shared_readings(examples.spans, settings)
    # Clients that the settings name are taken out with all their rows, before the shares.
    rows = torch.arange(len(examples.train))
    if examples.is_test is not None:
        rows = rows[~examples.is_test]
    public, rows = _split_off_clients(examples, rows, settings.public_clients, "public_clients")
    test, rows = _split_off_test(examples, rows, settings, seed)
    if settings.public_share is not None:
        public, rows = _split_off_share(examples, rows, settings.public_share, seed, "public")
    pool = Pool(
        examples.train.y[rows],
        None if examples.owners is None else examples.owners[rows],
        examples.owner_names,
        frozenset(settings.public_clients + settings.test_clients),
    )
    ask = PartitionSize(settings.num_clients, settings.examples_per_client)
    dealt = partition.deal(pool, ask, public_stream(seed, "data", "clients"))
    # Without public_share and public_clients, the rows that are dealt to no client are public.
    if settings.public_share is None and not settings.public_clients and partition.rest_is_public:
        public = _without(rows, torch.cat(list(dealt.values())))
    if settings.public_lacks:
        public = _without_classes(examples, settings, public)
    validation, public = _split_off_validation(examples, public, settings, seed)
    parts = Parts({name: rows[index] for name, index in dealt.items()}, public, validation, test)
    return _assemble(examples, settings, parts)


@dataclass(frozen=True)
class Parts:
    """The row positions of every part of a data set.

    Attributes:
        clients: client name -> positions of its rows.
        public: positions of the public rows, without validation rows.
        validation: positions of the validation rows.
        test: positions of the test rows, or the examples of the source's own test set.
    """

    clients: dict[str, Tensor]
    public: Tensor
    validation: Tensor
    test: Arrays | Tensor


def _split_off_test(
    examples: SourceRows, rows: Tensor, settings: DataSettings, seed: int
) -> tuple[Arrays | Tensor, Tensor]:
    """Chooses the test set.

    Returns:
        The source's own test set or the positions of the test rows; and the positions of all other
        rows.
    """
    if settings.test_clients:
        return _split_off_clients(examples, rows, settings.test_clients, "test_clients")
    if examples.test is not None:
        return examples.test, rows
    if examples.is_test is not None:
        return torch.nonzero(examples.is_test).flatten(), rows
    test, rest = _split_off_share(examples, rows, settings.test_share, seed, "test")
    # Without this check, stages would silently have no test metric.
    if len(test) == 0:
        raise DataError(
            f"{settings.test_share:g} of {len(rows)} rows is less than one row for the test set",
            place="test_share",
            cure="raise it, name test_clients, or a client_column with more rows of each client",
        )
    return test, rest


def _split_off_clients(
    examples: SourceRows, rows: Tensor, names: Sequence[str], key: str
) -> tuple[Tensor, Tensor]:
    """Splits `rows` into rows of the natural clients `names`, and all other rows."""
    if not names:
        return rows[:0], rows
    if examples.owners is None:
        raise DataError(
            "the data does not name its clients",
            place=key,
            cure=(
                "give client_column (tables) or a source that names them, or use "
                f"{key.split('_')[0]}_share instead"
            ),
        )
    for name in names:
        if name not in examples.owner_names:
            known = ", ".join(examples.owner_names[:8])
            if len(examples.owner_names) > 8:
                known += ", ..."
            raise DataError(
                f"no client '{name}' in the data (it has {known})",
                place=key,
                cure=suggestion(name, list(examples.owner_names)) or "name one that it has",
            )
    wanted = torch.tensor([examples.owner_names.index(name) for name in names])
    taken = torch.isin(examples.owners[rows], wanted)
    return rows[taken], rows[~taken]


def _split_off_share(
    examples: SourceRows, rows: Tensor, share: float, seed: int, stream: str
) -> tuple[Tensor, Tensor]:
    """Splits off a random share of each natural client's rows.

    If the source names no clients, all rows count as the rows of one client.

    Args:
        examples: the rows of the source.
        rows: positions of the rows to split.
        share: share of each client's rows, from 0 to 1.
        seed: seed of the split.
        stream: name of the stream of random numbers: "test" or "public".

    Returns:
        The positions of the drawn rows, and of all other rows.
    """
    if examples.spans is not None:
        # Neighbouring windows share readings, so they are not drawn at random: the past is public,
        # and the future is for testing.
        taken, rest = split_by_time(examples.spans, rows, share, last=stream == "test")
        if len(rows) and not len(rest) and share < 1:
            raise _nothing_left(f"{stream}_share")
        return taken, rest
    owners = torch.zeros_like(rows) if examples.owners is None else examples.owners[rows]
    drawn = [torch.zeros(0, dtype=torch.int64)]
    for owner in owners.unique().tolist():
        own = torch.nonzero(owners == owner).flatten()
        # The random stream depends on the client's name, so that it is the same if others join.
        name = examples.owner_names[owner] if examples.owner_names else ""
        order = public_stream(seed, "data", stream, name).permutation(len(own))
        # The small addition is needed because 0.29 * 100 is slightly below 29 in floating point.
        count = int(share * len(own) + 1e-9)
        drawn.append(own[order[:count]])
    taken = torch.cat(drawn)
    return rows[taken], _without(rows, taken)


def _without_classes(examples: SourceRows, settings: DataSettings, public: Tensor) -> Tensor:
    """Returns the public rows that are of none of the classes in `public_lacks`."""
    # Classes that follow from the public rows would be without those that are taken away.
    if examples.kind != "classes" or (examples.targets is not None and settings.classes is None):
        raise DataError(
            "the classes are not known before the public rows are",
            place="public_lacks",
            cure="name all classes with classes = [...]",
        )
    found = _targets(examples, settings, public)
    for name in settings.public_lacks:
        if name not in found.names:
            raise DataError(
                f"no class '{name}' (known: {', '.join(found.names)})",
                place="public_lacks",
                cure=suggestion(name, list(found.names)) or "name one of them",
            )
    numbers = torch.tensor([found.names.index(name) for name in settings.public_lacks])
    return public[~torch.isin(found.y[public], numbers)]


def _split_off_validation(
    examples: SourceRows, public: Tensor, settings: DataSettings, seed: int
) -> tuple[Tensor, Tensor]:
    """Splits the public rows into validation rows and other rows."""
    asked = settings.validation
    count = asked if isinstance(asked, int) else int(asked * len(public))
    # At least one public row must remain for training and for fitting mean and std.
    if count and count >= len(public):
        raise DataError(
            f"asked for {count} rows of the public part, which has {len(public)}",
            place="validation",
            cure=(
                "lower validation, or declare more rows public with public_share or public_clients"
            ),
        )
    if examples.spans is not None:
        share = count / max(len(public), 1)
        held, rest = split_by_time(examples.spans, public, share, last=True)
        if len(public) and not len(rest):
            raise _nothing_left("validation")
        return held, rest
    # A random stream of its own, so that draws for other parts do not change the order.
    order = public[public_stream(seed, "data", "validation").permutation(len(public))]
    return order[:count], order[count:]


def _nothing_left(key: str) -> DataError:
    """Returns the error for series so short that a split leaves no window for the other parts."""
    return DataError(
        "no window is left for the other parts, because those that share rows with this one are in "
        "no part",
        place=key,
        cure=f"lower {key}, or series.window, its lags or its horizon, or name whole series with "
        "test_clients and public_clients",
    )


def _refuse_shared_readings(spans: Tensor, settings: DataSettings) -> None:
    """Refuses to deal windows that share readings to different clients."""
    # One client with all rows shares them with nobody.
    alone = settings.num_clients == 1 and settings.examples_per_client is None
    if overlap(spans) and not alone:
        # The key that asks for the deal; without one, 10 clients are the default.
        asks = (settings.partition, settings.num_clients, settings.examples_per_client)
        keys = ("partition", "num_clients", "examples_per_client")
        given = [key for key, value in zip(keys, asks, strict=True) if value is not None]
        raise DataError(
            "windows share rows, so they cannot be dealt to different clients",
            place=given[0] if given else "series",
            cure="give client_column, or num_clients = 1, or set series.stride to the rows that a "
            "window, its lags and its horizon take together",
        )


def _without(rows: Tensor, positions: Tensor) -> Tensor:
    kept = torch.ones(len(rows), dtype=torch.bool)
    kept[positions] = False
    return rows[kept]


def _assemble(examples: SourceRows, settings: DataSettings, parts: Parts) -> FederatedData:
    """Computes targets and inputs, which depend on the public rows, and collects all parts."""
    found = _targets(examples, settings, torch.cat([parts.public, parts.validation]))
    # Validation rows are public too, but means and words must not be fitted on them: validation
    # has to show how good the model is on new rows.
    if examples.inputs is None:
        inputs = InputRows(examples.train.x, torch.zeros(len(examples.train), dtype=torch.bool))
    else:
        inputs = examples.inputs(parts.public[found.known[parts.public]])
    # A row without a target or without inputs is dropped.
    usable = found.known & ~inputs.left_out
    _check_clients(parts, usable)
    asked = {f"client/{name}": rows for name, rows in parts.clients.items()}
    asked |= {"public": parts.public, "validation": parts.validation}
    # No row of the source's own test set is dropped.
    if isinstance(parts.test, Tensor):
        asked["test"] = parts.test
    kept = {name: rows[usable[rows]] for name, rows in asked.items()}
    part = {name: Arrays(x, found.y[kept[name]]) for name, x in inputs.of_parts(kept).items()}
    left_out: dict[str, int] = {}
    for name, rows in asked.items():
        word = "clients" if name.startswith("client/") else name
        left_out[word] = left_out.get(word, 0) + len(rows) - len(kept[name])

    owners, owner_names = _owners_of_test(examples, settings, kept.get("test"))
    public = part["public"]
    preprocess = _preprocess(public.x, settings)
    task = _task(examples, settings, found.names, public.y)
    class_names = found.names if examples.kind == "classes" else ()
    data = FederatedData(
        name=examples.name,
        clients={name: part[f"client/{name}"] for name in parts.clients},
        public=public,
        validation=part["validation"],
        test=parts.test if isinstance(parts.test, Arrays) else part["test"],
        num_classes=len(class_names),
        class_names=class_names,
        preprocess=preprocess,
        task=task,
        awaits_statistics=settings.statistics == "private",
        preparation=inputs.preparation
        and inputs.preparation.with_standardisation(preprocess, found.names, task.to_json()),
        columns=examples.facts(parts.public) if examples.facts is not None else (),
        test_owners=owners,
        test_owner_names=owner_names,
    )
    return data if examples.targets is None else replace(data, left_out=left_out)


def _targets(examples: SourceRows, settings: DataSettings, public: Tensor) -> TargetRows:
    """Returns the targets of all rows; `public` are the positions of the public rows."""
    if examples.targets is not None:
        return examples.targets(public)
    if settings.classes is not None:
        raise DataError(
            f"source '{settings.source}' has classes of its own",
            place="classes",
            cure="leave classes out",
        )
    return TargetRows.of_classes(examples.train.y, examples.class_names)


def _owners_of_test(
    examples: SourceRows, settings: DataSettings, rows: Tensor | None
) -> tuple[Tensor | None, tuple[str, ...]]:
    """Returns the natural client of each test row [n], and the names of these clients.

    Args:
        examples: the rows of the source.
        settings: the `[data]` table.
        rows: positions of the test rows; None: the source has a test set of its own.
    """
    natural = settings.partition is None or isinstance(settings.partition, Natural)
    # A row that the source itself counts as a test row (`is_test`) may have no client.
    if not natural or rows is None or examples.owners is None or examples.is_test is not None:
        return None, ()
    known, owners = examples.owners[rows].unique(return_inverse=True)
    return owners, tuple(examples.owner_names[at] for at in known.tolist())


def _check_clients(parts: Parts, usable: Tensor) -> None:
    """Checks that every client has at least one row that is not dropped."""
    for name, rows in parts.clients.items():
        if len(rows) and not bool(usable[rows].any()):
            raise DataError(
                "all its rows are dropped, because their classes or words are on no list",
                place=f"client '{name}'",
                cure=(
                    "name all of them with classes = [...] or words = {...}, set unknown = "
                    '"other", or leave this client out'
                ),
            )


def _task(
    examples: SourceRows, settings: DataSettings, names: tuple[str, ...], public: Tensor
) -> Task:
    """Makes the task of the recipe, or the default task for this kind of targets."""
    given = settings.task
    if given is None:
        given = examples.default_task or tasks.DEFAULT[examples.kind]
    kind = tasks.kind_of(given)
    wanted = tasks.find(kind).targets
    if wanted != examples.kind:
        fits = ", ".join(name for name, row in tasks.TASKS.items() if row.targets == examples.kind)
        raise DataError(
            f"{kind} learns from {wanted}, but '{examples.name}' gives {examples.kind}",
            place="task",
            cure=f"set one of {fits}, or give other data",
        )
    return tasks.make(given, names, public)


def _preprocess(public: Inputs, settings: DataSettings) -> Preprocess:
    """Returns the standardisation of the recipe, or one fitted on the public rows."""
    # Token ids are indices and have no mean.
    are_ids = isinstance(public, Tensor) and public.dtype == torch.int64
    asked_later = settings.statistics == "private"
    if not settings.mean and (are_ids or asked_later or not len(public)):
        return Preprocess()
    if not settings.mean:
        with renaming({"x": "public part"}):
            return Preprocess.fit(public)
    if isinstance(public, NamedInputs):
        raise no_statistics()
    if len(settings.mean) not in (1, public.shape[1]):
        raise DataError(
            f"{len(settings.mean)} values for examples of {public.shape[1]} channels",
            place="mean",
            cure="give one mean and one std for each channel, or for all channels",
        )
    return Preprocess(settings.mean, settings.std)
