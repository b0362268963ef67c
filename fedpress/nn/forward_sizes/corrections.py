"""Hooks that let a module pass the right numbers in its calls while it runs, and note what its code passes."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from fedpress.nn.forward_sizes.arguments import (
    COUNTED,
    SIZED,
    Number,
    Numbers,
    numbers_of,
    with_numbers,
)
from fedpress.nn.forward_sizes.places import caller, has_place


class CorrectingMode(TorchFunctionMode):
    """Passes the right numbers to the calls of one module while it is active, and may note what the code passed."""

    def __init__(
        self,
        module: nn.Module,
        right: Mapping[str, Mapping[int, Number]],
        seen: dict[str, list[Any]] | None,
    ):
        super().__init__()
        self.module, self.right, self.seen = module, right, seen
        self.count, self.times = 0, Counter[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls `func`, with other numbers where this call has some."""
        options = kwargs or {}
        by = caller(func) if func in SIZED else None
        if by is None or by.module is not self.module:
            return func(*args, **options)
        place = f"{by.place}#{self.times[by.place]}"
        self.times[by.place] += 1
        if func in COUNTED:
            args, options = self._put_right(func, args, options, str(self.count))
            self.count += 1
        if self.seen is not None:
            self.seen[place] = numbers_of(func, args, options)
        args, options = self._put_right(
            func, args, options, place if place in self.right else by.place
        )
        return func(*args, **options)

    def _put_right(self, func: Any, args: Any, options: Any, key: str) -> Any:
        right = self.right.get(key)
        return with_numbers(func, args, options, right) if right else (args, options)


class CorrectionHook:
    """The hook before a module's forward: a new `CorrectingMode` with its table of right numbers."""

    def __init__(self, right: Mapping[str, Mapping[int, Number]], *, watch: bool = False) -> None:
        self.right = {call: dict(numbers) for call, numbers in right.items()}
        self.seen: dict[str, list[Any]] | None = {} if watch else None

    def __call__(self, module: nn.Module, _: Any) -> None:
        """Starts to watch."""
        mode = CorrectingMode(module, self.right, self.seen)
        mode.__enter__()  # type: ignore[no-untyped-call]
        _active().append(mode)

    def put_(self, call: str, new: Mapping[int, Number]) -> None:
        """Corrects a call further: what is said of all calls at a place holds for each of them by number too."""
        base, _, _ = call.partition("#")
        if call != base:
            self.right.setdefault(call, dict(self.right.get(base, {})))
        for key in (call, *(k for k in self.right if call == base and k.startswith(base + "#"))):
            row = self.right.setdefault(key, {})
            for position, number in new.items():
                row[position] = _after(row.get(position), number)


def end_correction(module: nn.Module, args: Any, output: Any) -> None:
    """The hook after a module's forward, which runs also when that fails: its watch ends."""
    if _active() and _active()[-1].module is module:
        _active().pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]


_LOCAL = threading.local()  # watches that have begun in this thread


def _active() -> list[CorrectingMode]:
    if not hasattr(_LOCAL, "watches"):
        _LOCAL.watches = []
    watches: list[CorrectingMode] = _LOCAL.watches
    return watches


def set_numbers_(
    model: nn.Module, numbers: Mapping[str, Mapping[Any, Mapping[int, Number]]]
) -> None:
    """Lets the named modules of `model` pass `numbers` in their calls, besides those that they already put right.

    Raises:
        AttributeError: if `model` lacks one of the modules, or the code of one no longer has such a call.
    """
    for name, calls in numbers.items():
        module = model.get_submodule(name)
        gone = next((call for call in calls if not has_place(module, str(call))), None)
        if gone is not None:
            where = f"'{name}'" if name else "the model itself"
            raise AttributeError(
                f"the code of {where} has changed: there is no call at {gone.split(' ')[0]} any more"
            )
        hook = next(_hooks(module), None)
        if hook is None:
            hook = CorrectionHook({})
            module.register_forward_pre_hook(hook)
            module.register_forward_hook(end_correction, always_call=True)
        for call, right in calls.items():
            hook.put_(str(call), right)


def numbers_in(model: nn.Module) -> Numbers:
    """Returns the numbers that the modules of `model` put right."""
    found = ((name, hook) for name, module in model.named_modules() for hook in _hooks(module))
    return {
        name: {call: dict(right) for call, right in hook.right.items()}
        for name, hook in found
        if hook.right
    }


def watch_(model: nn.Module, names: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """Notes, from now on, the numbers that the code of the named modules passes: module -> `place#n` -> numbers."""
    seen: dict[str, dict[str, list[Any]]] = {}
    set_numbers_(model, {name: {} for name in names})
    for name in names:
        hook = next(_hooks(model.get_submodule(name)))
        hook.seen = seen.setdefault(name, {})
    return seen


def _hooks(module: nn.Module) -> Iterator[CorrectionHook]:
    return (hook for hook in module._forward_pre_hooks.values() if isinstance(hook, CorrectionHook))


def _after(old: Number | None, new: Number) -> Number:
    """Returns one number for `old` and then `new`."""
    if isinstance(new, int) or old is None or len(new) == 3:
        return new
    if isinstance(old, int):
        return old * new[0] // new[1]
    assert len(old) == 2, "what is an index stays one"
    return old[0] * new[0], old[1] * new[1]
