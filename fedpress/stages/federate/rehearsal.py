"""One private step of every kind of client on public or made-up examples, before any epsilon is spent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from fedpress.core.examples import Arrays
from fedpress.core.inputs import Inputs, NamedInputs, form_of, parts_of, told
from fedpress.core.random_source import RandomSource, public_stream
from fedpress.errors import Argument, RecipeError, TrainingError
from fedpress.stages.federate.client import ClientHalf
from fedpress.tasks import Task

EXAMPLES = 4
"""A tiny batch: the check must be cheap for a large network."""


def rehearse(clients: Sequence[ClientHalf], public: Sequence[Arrays], task: Task) -> None:
    """Lets one client of each kind take a private step on examples of its kind: of their shape and type.

    No private value is read. Without examples of a kind in the `public` parts they are made up, of
    values that its type may hold.

    Raises:
        RecipeError: if the step fails, with the cause.
    """
    for client in _one_of_each_kind(clients):
        like, problems = client.arrays, list[tuple[str, Exception]]()
        for what, arrays in trial_examples(like, public, task, client.common.model):
            try:
                client.rehearse(arrays)
            except Exception as problem:  # whatever somebody's own network raises
                problems.append((what, problem))
            else:
                break
        else:
            what, cause = problems[0]
            kind = f"{what} examples of shape {told(like.x)}"
            cure: list[str | Argument] = [
                "no epsilon was spent; mend the model, so that it runs on single examples"
            ]
            if what == "made-up":
                share = Argument("data.public_share", 0.1)
                cure += [", or give public examples of this kind by ", share, " to try it on"]
            said = str(cause).partition("\n")[0]
            if isinstance(cause, TrainingError):  # its cure is the one below
                said = cause.problem
            raise RecipeError(
                f"a private step fails on {kind}: {type(cause).__name__}: {said}",
                place="privacy",
                cure=cure,
            ) from cause


def _one_of_each_kind(clients: Sequence[ClientHalf]) -> list[ClientHalf]:
    kinds: dict[tuple[object, ...], ClientHalf] = {}
    for client in clients:
        x, y = client.arrays.x, client.arrays.y
        kinds.setdefault((form_of(x), y.shape[1:], y.dtype), client)
    return list(kinds.values())


def trial_examples(
    like: Arrays, public: Sequence[Arrays], task: Task, model: nn.Module
) -> Iterator[tuple[str, Arrays]]:
    """Yields examples of the kind of `like` to try, one after another until one works; only its type is looked at."""
    for part in public:
        same = form_of(part.x) == form_of(like.x) and part.y.dtype == like.y.dtype
        if len(part) and same:
            spread = torch.linspace(0, len(part) - 1, min(EXAMPLES, len(part))).long()
            yield "public", part.take(spread)
            return
    chance, targets = public_stream(0, "rehearsal"), task.made_up(EXAMPLES, like.y)
    for x in _made_up_inputs(like.x, _vocabulary(model), chance):
        yield "made-up", Arrays(x, targets)


def _made_up_inputs(like: Inputs, vocabulary: int | None, chance: RandomSource) -> Iterator[Inputs]:
    """Yields inputs like `like`; of several inputs at last whole numbers of 1, such as the length of one word."""
    tries = {
        name: list(_made_up((EXAMPLES, *part.shape[1:]), part.dtype, vocabulary, chance))
        for name, part in parts_of(like).items()
    }
    if not isinstance(like, NamedInputs):
        yield from tries[""]
        return
    for at in (0, -1):
        yield NamedInputs({name: found[at] for name, found in tries.items()})
    yield NamedInputs(
        {
            name: found[0] if found[0].is_floating_point() else torch.ones_like(found[0])
            for name, found in tries.items()
        }
    )


def _made_up(
    shape: tuple[int, ...], dtype: torch.dtype, vocabulary: int | None, chance: RandomSource
) -> Iterator[Tensor]:
    if dtype == torch.bool:
        yield torch.ones(shape, dtype=dtype)
        return
    if dtype == torch.uint8:
        yield chance.integers(256, *shape).to(dtype)
    elif dtype.is_floating_point and vocabulary is None:
        yield chance.normal(*shape).to(dtype)
    # A number may be the name of something, such as a token: then a small whole one is valid.
    high = min(vocabulary or 2, 256 if dtype == torch.uint8 else 1 << 31)
    yield chance.integers(high, *shape).to(dtype)


def _vocabulary(model: nn.Module) -> int | None:
    """Returns how many tokens every embedding of `model` knows, None if it has none."""
    sizes = [
        m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)
    ]
    return min(sizes, default=None)
