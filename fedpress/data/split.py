"""From rows to a federated data set: test, public and validation rows are set aside, the rest is dealt to clients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedpress import seeds
from fedpress.arrays import Arrays, Preprocess
from fedpress.data.dataset import FederatedData
from fedpress.data.examples import Examples
from fedpress.data.partition import Ask, Iid, Natural, Pool
from fedpress.data.settings import DataSettings
from fedpress.errors import DataError, did_you_mean


def split(examples: Examples, settings: DataSettings, seed: int) -> FederatedData:
    """Shares out the rows as `DataSettings` says; the same seed gives the same rows to the same client.

    Raises:
        DataError: if there are too few rows for what is asked.
    """
    partition = settings.partition or (Iid() if examples.owners is None else Natural())
    rows = torch.arange(len(examples.train))
    test, rows = _set_aside_test(examples, rows, settings, seed)
    public, rows = _set_aside(examples, rows, settings.public_clients, settings.public_share or 0.0, seed, "public")
    pool = Pool(
        examples.train.y[rows],
        None if examples.owners is None else examples.owners[rows],
        examples.owner_names,
        frozenset(settings.public_clients + settings.test_clients),
    )
    ask = Ask(settings.num_clients, settings.examples_per_client)
    dealt = partition.deal(pool, ask, seeds.generator(seed, "data", "clients"))
    if settings.public_share is None and not settings.public_clients and partition.rest_is_public:
        public = _without(rows, torch.cat(list(dealt.values())))
    validation, public = _set_aside_validation(public, settings, seed)
    return _assemble(examples, settings, {name: rows[index] for name, index in dealt.items()}, public, validation, test)


def _assemble(
    examples: Examples,
    settings: DataSettings,
    clients: dict[str, Tensor],
    public_rows: Tensor,
    validation_rows: Tensor,
    test: Tensor | Arrays,
) -> FederatedData:
    """Encodes all rows with what was learned from the public ones."""
    raw = examples.train.take(public_rows)
    encode = examples.fit(raw.x)
    public = Arrays(encode(raw.x), raw.y)

    def part(rows: Tensor) -> Arrays:
        arrays = examples.train.take(rows)
        return Arrays(encode(arrays.x), arrays.y)

    given = Preprocess(settings.mean, settings.std)
    channels = public.x.shape[1] if public.x.dim() > 1 else 1
    if settings.mean and len(settings.mean) != channels:
        raise DataError(f"data.mean has {len(settings.mean)} values but the examples have {channels} channels")
    return FederatedData(
        name=examples.name,
        clients={name: part(rows) for name, rows in clients.items()},
        public=public,
        validation=part(validation_rows),
        test=part(test) if isinstance(test, Tensor) else Arrays(encode(test.x), test.y),
        num_classes=len(examples.class_names),
        class_names=examples.class_names,
        preprocess=given if settings.mean or len(public) == 0 else Preprocess.fit(public.x),
    )


def _set_aside_test(
    examples: Examples, rows: Tensor, settings: DataSettings, seed: int
) -> tuple[Tensor | Arrays, Tensor]:
    if examples.test is not None:
        return examples.test, rows
    share = 0.0 if settings.test_clients else settings.test_share
    closed = settings.test_clients or settings.public_clients  # who is public gives all rows to the public part
    if settings.test_clients:
        test, rest = _set_aside(examples, rows, settings.test_clients, share, seed, "test")
    else:
        kept, rest = _set_aside(examples, rows, closed, 0.0, seed, "test") if closed else (rows[:0], rows)
        test, rest = _set_aside(examples, rest, (), share, seed, "test")
        rest = torch.cat([kept, rest]).sort().values
    if len(test) == 0:
        raise DataError(
            f"data '{examples.name}': the test set has no rows out of {len(rows)}; raise test_share or name test_clients"
        )
    return test, rest


def _set_aside(
    examples: Examples, rows: Tensor, names: Sequence[str], share: float, seed: int, part: str
) -> tuple[Tensor, Tensor]:
    """Splits `rows` into those of the clients `names` (or a share of each client's rows) and the others."""
    if names:
        taken = rows[_owned_by(examples, rows, names, part)]
    elif share:
        groups = torch.zeros_like(rows) if examples.owners is None else examples.owners[rows]
        drawn = []
        for group in groups.unique().tolist():
            own = rows[groups == group]
            word = examples.owner_names[group] if examples.owner_names else ""
            order = torch.randperm(len(own), generator=seeds.generator(seed, "data", part, word))
            drawn.append(own[order[: round(share * len(own))]])
        taken = torch.cat(drawn)
    else:
        taken = rows[:0]
    kept = torch.ones(len(examples.train), dtype=torch.bool)
    kept[taken] = False
    return taken, rows[kept[rows]]


def _owned_by(examples: Examples, rows: Tensor, names: Sequence[str], part: str) -> Tensor:
    if examples.owners is None:
        raise DataError(f"data.{part}_clients is given but the data does not name its clients; use {part}_share")
    for name in names:
        if name not in examples.owner_names:
            near = did_you_mean(name, list(examples.owner_names))
            known = ", ".join(examples.owner_names[:8]) + (", ..." if len(examples.owner_names) > 8 else "")
            raise DataError(f"data.{part}_clients: no client '{name}' in the data (it has {known}){near}")
    wanted = torch.tensor([examples.owner_names.index(name) for name in names])
    return torch.isin(examples.owners[rows], wanted)


def _set_aside_validation(public: Tensor, settings: DataSettings, seed: int) -> tuple[Tensor, Tensor]:
    asked = settings.validation
    count = asked if isinstance(asked, int) else round(asked * len(public))
    if count > len(public) or (count == len(public) > 0):
        raise DataError(
            f"data.validation: asked for {count} rows of the public part, which has {len(public)}; lower validation, "
            "or declare more rows public with public_share or public_clients"
        )
    order = public[torch.randperm(len(public), generator=seeds.generator(seed, "data", "validation"))]
    return order[:count], order[count:]


def _without(rows: Tensor, positions: Tensor) -> Tensor:
    kept = torch.ones(len(rows), dtype=torch.bool)
    kept[positions] = False
    return rows[kept]
