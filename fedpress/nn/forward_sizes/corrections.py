"""Hooks that correct the numbers in a module's calls while it runs, or record them."""

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
from fedpress.nn.forward_sizes.places import find_call_site, has_place


class CorrectingMode(TorchFunctionMode):
    """While it is active, corrects the numbers in the calls of one module.

    Args:
        module: whose calls are corrected.
        corrections: call -> position -> correction.
        seen: where the numbers that the code passed are recorded, if they are wanted.
    """

    def __init__(
        self,
        module: nn.Module,
        corrections: Mapping[str, Mapping[int, Number]],
        seen: dict[str, list[Any]] | None,
    ):
        super().__init__()
        self.module = module
        self.corrections = corrections
        self.seen = seen
        self.count = 0  # of calls so far, by which older files name a call
        self.occurrences: Counter[str] = Counter()  # of calls at each place

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls `func` with corrected numbers, if this call has corrections."""
        options = kwargs or {}
        site = find_call_site(func) if func in SIZED else None
        # Modules inside this one have modes of their own.
        if site is None or site.module is not self.module:
            return func(*args, **options)

        call = f"{site.place}#{self.occurrences[site.place]}"
        self.occurrences[site.place] += 1
        if func in COUNTED:
            args, options = self._corrected(func, args, options, str(self.count))
            self.count += 1
        # Recorded before it is corrected: what the code itself passes.
        if self.seen is not None:
            self.seen[call] = numbers_of(func, args, options)
        # A correction of this call alone replaces that of all calls at its place.
        key = call if call in self.corrections else site.place
        args, options = self._corrected(func, args, options, key)
        return func(*args, **options)

    def _corrected(self, func: Any, args: Any, options: Any, key: str) -> Any:
        """Returns the arguments with the corrections of the call `key`, if there are any."""
        corrections = self.corrections.get(key)
        if not corrections:
            return args, options
        return with_numbers(func, args, options, corrections)


class CorrectionHook:
    """The hook before a module's forward: it starts a `CorrectingMode`."""

    def __init__(
        self, corrections: Mapping[str, Mapping[int, Number]], *, watch: bool = False
    ) -> None:
        self.corrections = {call: dict(row) for call, row in corrections.items()}
        self.seen: dict[str, list[Any]] | None = {} if watch else None

    def __call__(self, module: nn.Module, _: Any) -> None:
        """Starts to correct."""
        mode = CorrectingMode(module, self.corrections, self.seen)
        mode.__enter__()  # type: ignore[no-untyped-call]
        _active().append(mode)

    def put_(self, call: str, new: Mapping[int, Number]) -> None:
        """Adds corrections of a call, on top of those it has.

        Corrections of a whole place are added to each of its calls that has some of its own.
        """
        place, _, _ = call.partition("#")
        keys = [call]
        if call == place:
            keys += [key for key in self.corrections if key.startswith(place + "#")]
        else:
            # Its own corrections will replace those of the place, so they begin with a copy.
            self.corrections.setdefault(call, dict(self.corrections.get(place, {})))
        for key in keys:
            row = self.corrections.setdefault(key, {})
            for position, number in new.items():
                row[position] = _composed(row.get(position), number)


def end_correction(module: nn.Module, args: Any, output: Any) -> None:
    """The hook after a module's forward, called even if that fails: its mode ends."""
    if _active() and _active()[-1].module is module:
        _active().pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]


_LOCAL = threading.local()
"""The active modes of this thread, a stack: modules run inside each other, and in threads."""


def _active() -> list[CorrectingMode]:
    if not hasattr(_LOCAL, "modes"):
        _LOCAL.modes = []
    modes: list[CorrectingMode] = _LOCAL.modes
    return modes


def set_numbers_(
    model: nn.Module, numbers: Mapping[str, Mapping[Any, Mapping[int, Number]]]
) -> None:
    """Corrects `numbers` in the calls of the named modules, on top of the corrections they have.

    Raises:
        AttributeError: if `model` lacks one of the modules, or the code of one no longer has such a
            call.
    """
    for name, calls in numbers.items():
        module = model.get_submodule(name)
        missing = next((call for call in calls if not has_place(module, str(call))), None)
        if missing is not None:
            where = f"'{name}'" if name else "the model itself"
            place = missing.split(" ")[0]
            raise AttributeError(
                f"the code of {where} has changed: there is no call at {place} any more"
            )
        hook = next(_hooks(module), None)
        # One hook for each module, so that its calls are counted once.
        if hook is None:
            hook = CorrectionHook({})
            module.register_forward_pre_hook(hook)
            module.register_forward_hook(end_correction, always_call=True)
        for call, corrections in calls.items():
            hook.put_(str(call), corrections)


def numbers_in(model: nn.Module) -> Numbers:
    """Returns the corrections of the modules of `model`."""
    numbers: Numbers = {}
    for name, module in model.named_modules():
        for hook in _hooks(module):
            if hook.corrections:
                numbers[name] = {call: dict(row) for call, row in hook.corrections.items()}
    return numbers


def watch_(model: nn.Module, names: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """Records from now on the numbers that modules pass: module -> `place#n` -> numbers."""
    seen: dict[str, dict[str, list[Any]]] = {}
    set_numbers_(model, {name: {} for name in names})
    for name in names:
        hook = next(_hooks(model.get_submodule(name)))
        hook.seen = seen.setdefault(name, {})
    return seen


def _hooks(module: nn.Module) -> Iterator[CorrectionHook]:
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, CorrectionHook):
            yield hook


def _composed(old: Number | None, new: Number) -> Number:
    """Returns the correction that is `old` followed by `new`, as after pruning twice."""
    # A number or a list of indices replaces whatever was there.
    if isinstance(new, int) or old is None or len(new) == 3:
        return new
    if isinstance(old, int):
        return old * new[0] // new[1]
    assert len(old) == 2, "indices are not corrected by a multiple"
    return old[0] * new[0], old[1] * new[1]
