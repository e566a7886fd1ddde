"""glmjax: train, quantize and serve GLM-130B-style bilingual language models in JAX."""

import importlib
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from glmjax import errors, show
  from glmjax.api import Plan, Training, load, plan, run, train

__version__ = "0.1.0"
# What people call (docs/api.md); loaded when first used.
__all__ = ["Plan", "Training", "errors", "load", "plan", "run", "show", "train"]
_MODULES = ("errors", "plan", "show", "train")  # plan and train are called as well


class CallablePackage(types.ModuleType):
  """A package that is called as well: glmjax.train.loop is a module, glmjax.train(...) the API's function.

  Python binds a package's name to it whenever anything inside is imported, so that the function cannot have the name to
  itself.
  """

  def __call__(self, *arguments: Any, **named: Any) -> Any:
    """Calls the API's function of this package's name; help(glmjax.api) describes it."""
    api = importlib.import_module("glmjax.api")
    return getattr(api, self.__name__.rpartition(".")[2])(*arguments, **named)


def __getattr__(name: str) -> Any:
  if name in _MODULES:
    return importlib.import_module(f"glmjax.{name}")
  if name in __all__:
    return getattr(importlib.import_module("glmjax.api"), name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
