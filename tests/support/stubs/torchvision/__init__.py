"""Stands in for torchvision, whose builds do not fit the CPU's torch.

vLLM's classes of vision-language models import it, and call it for images alone. On a search path
this package has any submodule, each of them any class, and each class any attribute.
"""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__version__ = "0.28.0"


class AnyClass(type):
    """A class whose attributes are their own names."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class AnyModule(ModuleType):
    """A module that has any class."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return AnyClass(name, (), {})


class Finder(MetaPathFinder, Loader):
    """Finds submodules."""

    def find_spec(self, name, path=None, target=None):
        """Return how to import ``torchvision.name``."""
        if name.startswith("torchvision."):
            return ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        """Return the module."""
        return AnyModule(spec.name)

    def exec_module(self, module):
        """Run nothing: the module is complete."""


sys.meta_path.insert(0, Finder())


def __getattr__(name: str) -> ModuleType:
    if name.startswith("__"):
        raise AttributeError(name)
    return importlib.import_module(f"torchvision.{name}")
