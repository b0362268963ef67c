"""Rehearsal: tries a private training step on public or made-up examples, before the run.

Without this check, a network that cannot be trained would spend epsilon in rounds in which every
update is only noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from fedpress.core.examples import Arrays
from fedpress.core.inputs import Inputs, NamedInputs, inputs_text, signature_of, tensors_by_name
from fedpress.core.random_source import RandomSource, public_stream
from fedpress.errors import Argument, RecipeError, TrainingError
from fedpress.stages.federate.client import ClientSide
from fedpress.tasks import Task

EXAMPLES = 4
"""Size of the batch: small, so that the check is fast for a large network."""


def rehearse(clients: Sequence[ClientSide], public: Sequence[Arrays], task: Task) -> None:
    """Tries a private training step, once for each kind of examples that clients have.

    A kind is a shape and a dtype. Nothing else is read from private examples.

    Args:
        clients: all clients.
        public: public parts of the data. For a kind that no public part has, examples are made up.
        task: makes up targets for made-up examples.

    Raises:
        RecipeError: if the step fails on all trial examples of a kind; the error has the cause.
    """
    for client in _one_of_each_kind(clients):
        _rehearse_kind(client, public, task)


def _rehearse_kind(client: ClientSide, public: Sequence[Arrays], task: Task) -> None:
    """Tries a private step for one client; raises RecipeError if it fails on all trial examples."""
    like = client.arrays
    problems: list[tuple[str, Exception]] = []
    for what, arrays in trial_examples(like, public, task, client.common.model):
        try:
            client.rehearse(arrays)
        # Any exception, because a user's own network may raise anything.
        except Exception as problem:
            problems.append((what, problem))
        else:
            return

    what, cause = problems[0]
    kind = f"{what} examples of shape {inputs_text(like.x)}"
    cure: list[str | Argument] = [
        "change the model so that it runs on single examples (no epsilon was spent)"
    ]
    if what == "made-up":
        share = Argument("data.public_share", 0.1)
        cure += [", or give public examples of this kind by ", share, " to try it on"]
    said = str(cause).partition("\n")[0]
    # A TrainingError also has a cure. It is left out, because it is meant for private examples.
    if isinstance(cause, TrainingError):
        said = cause.problem
    raise RecipeError(
        f"a private step fails on {kind}: {type(cause).__name__}: {said}",
        place="privacy",
        cure=cure,
    ) from cause


def _one_of_each_kind(clients: Sequence[ClientSide]) -> list[ClientSide]:
    """Returns the first client of each shape and dtype of examples."""
    kinds: dict[tuple[object, ...], ClientSide] = {}
    for client in clients:
        x, y = client.arrays.x, client.arrays.y
        kinds.setdefault((signature_of(x), y.shape[1:], y.dtype), client)
    return list(kinds.values())


def trial_examples(
    like: Arrays, public: Sequence[Arrays], task: Task, model: nn.Module
) -> Iterator[tuple[str, Arrays]]:
    """Yields trial examples of the same shape and dtype as `like`.

    If there are public examples of this kind, one batch of them. Otherwise several made-up batches,
    because it is unknown which values the network accepts, such as floats or token ids.

    Args:
        like: private examples; only shape and dtype are read.
        public: public parts to take examples from.
        task: makes up targets for made-up examples.
        model: the network; made-up token ids are below the size of its embeddings.

    Yields:
        "public" or "made-up", and the examples.
    """
    for part in public:
        same = signature_of(part.x) == signature_of(like.x) and part.y.dtype == like.y.dtype
        if len(part) and same:
            # Spread over the whole part, because it may be sorted by class.
            spread = torch.linspace(0, len(part) - 1, min(EXAMPLES, len(part))).long()
            yield "public", part.take(spread)
            return
    chance = public_stream(0, "rehearsal")
    targets = task.made_up_targets(EXAMPLES, like.y)
    for x in _made_up_inputs(like.x, _vocabulary(model), chance):
        yield "made-up", Arrays(x, targets)


def _made_up_inputs(like: Inputs, vocabulary: int | None, chance: RandomSource) -> Iterator[Inputs]:
    """Yields made-up inputs in shape and dtype of `like`, the most plausible first."""
    tries = {}
    for name, part in tensors_by_name(like).items():
        shape = (EXAMPLES, *part.shape[1:])
        tries[name] = list(_made_up(shape, part.dtype, vocabulary, chance))
    if not isinstance(like, NamedInputs):
        yield from tries[""]
        return
    for index in (0, -1):
        yield NamedInputs({name: found[index] for name, found in tries.items()})
    # Last try: all integers are 1. One of the inputs may be a length of a sequence, which must not
    # be 0 or longer than the sequence.
    ones = {}
    for name, found in tries.items():
        ones[name] = found[0] if found[0].is_floating_point() else torch.ones_like(found[0])
    yield NamedInputs(ones)


def _made_up(
    shape: tuple[int, ...], dtype: torch.dtype, vocabulary: int | None, chance: RandomSource
) -> Iterator[Tensor]:
    """Yields made-up tensors of this shape and dtype, the most plausible values first."""
    if dtype == torch.bool:
        yield torch.ones(shape, dtype=dtype)
        return
    if dtype == torch.uint8:
        yield chance.integers(256, *shape).to(dtype)
    elif dtype.is_floating_point and vocabulary is None:
        yield chance.normal(*shape).to(dtype)
    # The values may be indices, such as token ids: then small integers are valid.
    largest = 256 if dtype == torch.uint8 else 1 << 31
    yield chance.integers(min(vocabulary or 2, largest), *shape).to(dtype)


def _vocabulary(model: nn.Module) -> int | None:
    """Returns the size of the smallest embedding of `model`; None if it has no embedding."""
    sizes = []
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            sizes.append(module.num_embeddings)
    return min(sizes, default=None)
