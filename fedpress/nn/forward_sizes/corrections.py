"""Hooks that correct or record the numbers in a module's torch calls while its forward runs.

Example: after pruning, `x.view(n, 4, 8)` in the user's code must become `x.view(n, 4, 6)`. The hook
replaces the 8 by 6 in each call. A call is named by its place in the code (see `places`), and a
number by its position among the numbers of the call.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from fedpress.nn.forward_sizes.arguments import (
    COUNTED_IN_OLD_FILES,
    SIZED,
    Number,
    Numbers,
    numbers_of,
    with_numbers,
)
from fedpress.nn.forward_sizes.places import find_call_site, has_place


class CorrectingMode(TorchFunctionMode):
    """While this mode is active, it corrects the numbers in the calls of one module.

    Args:
        module: the module whose calls are corrected.
        corrections: name of the call -> position of the number -> correction.
        recorded: dictionary that receives the uncorrected numbers of each call; None: no recording.
    """

    def __init__(
        self,
        module: nn.Module,
        corrections: Mapping[str, Mapping[int, Number]],
        recorded: dict[str, list[Any]] | None,
    ) -> None:
        super().__init__()
        self.module = module
        self.corrections = corrections
        self.recorded = recorded
        self.count = 0  # number of calls so far, by which files of older versions name a call
        self.occurrences: Counter[str] = Counter()  # number of calls so far at each place

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls `func` with corrected numbers, if this call has corrections."""
        options = kwargs or {}
        site = find_call_site(func) if func in SIZED else None
        # A module inside this one is corrected by its own mode.
        if site is None or site.module is not self.module:
            return func(*args, **options)

        call = f"{site.place}#{self.occurrences[site.place]}"
        self.occurrences[site.place] += 1
        if func in COUNTED_IN_OLD_FILES:
            args, options = self._corrected(func, args, options, str(self.count))
            self.count += 1
        # Recorded before the correction: the numbers that the code itself passes.
        if self.recorded is not None:
            self.recorded[call] = numbers_of(func, args, options)
        # A correction of this call alone replaces the correction of all calls at its place.
        key = call if call in self.corrections else site.place
        args, options = self._corrected(func, args, options, key)
        return func(*args, **options)

    def _corrected(self, func: Any, args: Any, options: Any, key: str) -> Any:
        """Returns the arguments of a call; numbers with a correction under `key` are corrected."""
        corrections = self.corrections.get(key)
        if not corrections:
            return args, options
        return with_numbers(func, args, options, corrections)


class CorrectionHook:
    """A forward pre-hook: it starts a `CorrectingMode` before the module's forward."""

    def __init__(
        self, corrections: Mapping[str, Mapping[int, Number]], *, record: bool = False
    ) -> None:
        self.corrections = {call: dict(row) for call, row in corrections.items()}
        self.recorded: dict[str, list[Any]] | None = {} if record else None

    def __call__(self, module: nn.Module, _: Any) -> None:
        """Starts the correction of this forward; `end_correction` ends it."""
        mode = CorrectingMode(module, self.corrections, self.recorded)
        mode.__enter__()  # type: ignore[no-untyped-call]
        _active().append(mode)

    def add_(self, call: str, new: Mapping[int, Number]) -> None:
        """Adds corrections of a call; they act after the corrections that the call has already.

        `call` is a place, which means all calls there, or `place#0`, the first call there. Since
        corrections of a single call replace those of its place, corrections of a place are also
        added to each single call.
        """
        place, _, _ = call.partition("#")
        keys = [call]
        if call == place:
            keys += [key for key in self.corrections if key.startswith(place + "#")]
        else:
            # Corrections of a single call replace those of its place, so they start as a copy.
            self.corrections.setdefault(call, dict(self.corrections.get(place, {})))
        for key in keys:
            row = self.corrections.setdefault(key, {})
            for position, number in new.items():
                row[position] = _composed(row.get(position), number)


def end_correction(module: nn.Module, args: Any, output: Any) -> None:
    """A forward hook: it ends the correction. It is called even if the module's forward fails."""
    if _active() and _active()[-1].module is module:
        _active().pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]


_LOCAL = threading.local()
"""Holds the stack of active modes of each thread: modules with corrections may be nested."""


def _active() -> list[CorrectingMode]:
    if not hasattr(_LOCAL, "modes"):
        _LOCAL.modes = []
    modes: list[CorrectingMode] = _LOCAL.modes
    return modes


def set_numbers_(
    model: nn.Module, numbers: Mapping[str, Mapping[Any, Mapping[int, Number]]]
) -> None:
    """Adds corrections of numbers in the calls of the named modules.

    Example: after a second pruning, the new corrections act after those of the first one.

    Args:
        model: changed in place.
        numbers: name of the module -> name of the call -> position of the number -> correction.

    Raises:
        AttributeError: if `model` has no such module, or its code has no such call any more.
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
        # A module has only one hook: with two, its calls would be counted and corrected twice.
        if hook is None:
            hook = CorrectionHook({})
            module.register_forward_pre_hook(hook)
            module.register_forward_hook(end_correction, always_call=True)
        for call, corrections in calls.items():
            hook.add_(str(call), corrections)


def numbers_in(model: nn.Module) -> Numbers:
    """Returns all corrections in `model`: module -> call -> position -> correction."""
    numbers: Numbers = {}
    for name, module in model.named_modules():
        for hook in _hooks(module):
            if hook.corrections:
                numbers[name] = {call: dict(row) for call, row in hook.corrections.items()}
    return numbers


def record_numbers_(model: nn.Module, names: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """Starts to record the numbers that the code of the named modules passes to torch.

    Returns:
        A dictionary that is filled when the model runs: module -> `place#n` -> numbers.
    """
    recorded: dict[str, dict[str, list[Any]]] = {}
    set_numbers_(model, {name: {} for name in names})
    for name in names:
        hook = next(_hooks(model.get_submodule(name)))
        hook.recorded = recorded.setdefault(name, {})
    return recorded


def _hooks(module: nn.Module) -> Iterator[CorrectionHook]:
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, CorrectionHook):
            yield hook


def _composed(old: Number | None, new: Number) -> Number:
    """Returns the correction that has the effect of `old` followed by `new`."""
    # A plain number or a list of indices is itself the result, so `old` has no effect on it.
    if isinstance(new, int) or old is None or len(new) == 3:
        return new
    if isinstance(old, int):
        return old * new[0] // new[1]
    assert len(old) == 2, "indices are not corrected by a multiple"
    return old[0] * new[0], old[1] * new[1]
