"""torch's compiler is imported when something compiles, and not at the first optimizer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

_MARK = "__dynamo_disable"
"""Where torch keeps, on a function that must not be compiled, the variant that it calls."""


def postpone_compiler() -> None:
    """Lets this process use optimizers and dispatch modes without importing torch's compiler.

    torch marks some functions as not to be compiled, such as `Optimizer.add_param_group`. At the
    first call of such a function it imports the compiler (`torch._dynamo`, with sympy and
    torch.distributed), which takes about as long as `import torch`. As long as nobody has imported
    the compiler, nothing is compiled, and the mark may wait. Once it is imported, the functions
    are marked at their next call, as torch would have done.

    `Optimizer.step` imports the compiler too, so that compiled code is split there; it waits in the
    same way. Results do not change. Classes that are imported after this call are not covered.
    """
    for function in _marked():
        _postpone(function)
    for one in _subclasses(Optimizer):
        step = vars(one).get("step")
        # This name only: a step of another form is left as it is, and may import the compiler.
        if getattr(getattr(step, "__code__", None), "co_name", "") == "_use_grad":
            one.step = _plain_step(step)


def _plain_step(step: Any) -> Any:
    """Returns an optimizer's `step` that does not split compiled code before there can be any."""

    @wraps(step)
    def plain(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" in sys.modules:
            return step(self, *args, **kwargs)
        # The rest of what torch's wrapper does.
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return step.__wrapped__(self, *args, **kwargs)

    return plain


def _marked() -> Iterator[Callable[..., Any]]:
    """Yields the functions of optimizers and dispatch modes that torch marks."""
    yield from (value for value in vars(Optimizer).values() if callable(value))
    for one in _subclasses(TorchDispatchMode):
        if callable(dispatch := vars(one).get("__torch_dispatch__")):
            yield dispatch


def _subclasses(base: type) -> Iterator[Any]:
    """Yields all classes below `base` that are imported."""
    below: list[type] = base.__subclasses__()
    for one in below:
        yield one
        yield from _subclasses(one)


def _postpone(marked: Callable[..., Any]) -> None:
    """Makes a marked function call the plain one, until the compiler has been imported."""
    plain = getattr(marked, "__wrapped__", None)
    # Other wrappers of torch have `__wrapped__` too. Only the inner function of `_disable_dynamo`
    # reads the mark, and what others do with it is not known.
    code = getattr(marked, "__code__", None)
    if plain is None or hasattr(plain, _MARK) or _MARK not in getattr(code, "co_consts", ()):
        return

    def call(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return plain(*args, **kwargs)
        if getattr(plain, _MARK, None) is call:
            delattr(plain, _MARK)  # so that torch marks the function now
        return marked(*args, **kwargs)

    setattr(plain, _MARK, call)
