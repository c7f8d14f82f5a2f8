"""ckptc, the checkpoint compiler.

The package is the pipeline; a stage imports only stages before it:

    spec -> ops -> ir -> plan -> compile -> storage -> run -> api -> cli

`ckptc.api` is the interface for programs. Its names are here, too, and are loaded when they are first asked for.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckptc.api import (
        Diagnostic,
        InputError,
        Plan,
        compile,
        compile_export,
        convert,
        diff,
        export,
        load,
        run,
        verify,
    )

__version__ = "0.1.0"
__all__ = [
    "Diagnostic",
    "InputError",
    "Plan",
    "compile",
    "compile_export",
    "convert",
    "diff",
    "export",
    "load",
    "run",
    "verify",
]
_STAGES = ("compile", "run")  # functions of the interface that have the names of stages


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module `ckptc` has no attribute `{name}`")
    return import_module(f"ckptc.{name}") if name in _STAGES else getattr(import_module("ckptc.api"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


class CallableStage(ModuleType):
    """A stage that has the name of a function of the interface: `ckptc.compile` and `ckptc.run` are both, since Python
    puts the package `ckptc.compile` in the place of a function of that name as soon as it is loaded."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._function(*args, **options)

    @property
    def _function(self) -> Any:
        return getattr(import_module("ckptc.api"), self.__name__.rpartition(".")[2])

    @property
    def __signature__(self) -> Any:
        from inspect import signature

        return signature(self._function)
