"""Modules of the user's own: imported by path, checked against the recipe, built from a seed."""

import hashlib
import importlib
import importlib.util
import random
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from shards.errors import ArtifactDigestError, ModuleError
from shards.recipe import Module

_imported: dict[str, str] = {}
"""Python module -> digest of the source that this process runs."""


def source_digest(path: str) -> str:
    """SHA-256 of the source file of `package.module:Class`: the value for `recipe.module.digest`.

    It covers that file alone. What the file imports belongs to the environment, which is to be pinned.

    Raises:
        ModuleError: there is no such source file.
    """
    return hashlib.sha256(_source(_split(path)[0]).read_bytes()).hexdigest()


def load_class(module: Module) -> type[nn.Module]:
    """The class that a recipe names. Its source is compared with the recipe's digest before any of it runs (the
    packages around it do run).

    Raises:
        ModuleError: it cannot be imported, is another source than the recipe's, or no `torch.nn.Module`.
    """
    name, attribute = _split(module.path)
    found = source_digest(module.path)
    if found != module.digest:
        raise ModuleError(
            f"module.digest: the source of {name} here has digest {found[:12]}, the recipe names "
            f"{module.digest[:12]}: install the recipe's source, or train anew on this one under a new recipe"
        )
    if _imported.get(name, found) != found:
        raise ModuleError(f"module.path: this process runs an earlier source of {name}: start it again")
    try:
        value = getattr(importlib.import_module(name), attribute, None)
    except Exception as error:  # importing runs the user's code, which may raise anything
        raise ModuleError(f"module.path: {name} cannot be imported: {type(error).__name__}: {error}") from error
    _imported[name] = found
    if not isinstance(value, type) or not issubclass(value, nn.Module):
        raise ModuleError(f"module.path: {module.path} is not a subclass of torch.nn.Module; name the class")
    if value.__module__ != name:
        raise ModuleError(f"module.path: {attribute} is defined in {value.__module__}: name it by that, for its digest")
    return value


def build(module: Module, seed: int) -> nn.Module:
    """The module as its constructor makes it from the seed.

    Raises:
        ModuleError: see `load_class`; or the constructor fails, or leaves sizes to be found from data.
    """
    kind = load_class(module)
    with seeded(seed):
        try:
            made = kind(**module.arguments)
        except Exception as error:  # the user's code
            raise ModuleError(
                f"module.arguments: {module.path} cannot be built from them: {type(error).__name__}: {error}"
            ) from error
    if any(is_lazy(tensor) for tensor in (*made.parameters(), *made.buffers())):
        raise ModuleError(f"module.path: {module.path} has lazy layers, which data would size: give sizes as arguments")
    if not any(tensor.requires_grad for tensor in made.parameters()):
        raise ModuleError(f"module.path: {module.path} has no parameter to train")
    return made


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name, tied ones once; what a stage's artefact holds."""
    return {name: tensor.detach() for name, tensor in (*module.named_parameters(), *module.named_buffers())}


@torch.no_grad()
def restore(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put an artefact's tensors in place.

    Raises:
        ArtifactDigestError: they are not those of the module.
    """
    own = state_of(module)
    if {name: tensor.shape for name, tensor in own.items()} != {name: each.shape for name, each in tensors.items()}:
        raise ArtifactDigestError(
            "the parent's tensors are not the module's: its constructor must always build the same"
        )
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


@contextmanager
def seeded(seed: int) -> Generator[None]:
    """Within, the global streams of torch, NumPy and Python begin at the seed; afterwards they are as before."""
    ours, theirs = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global stream is what is meant
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(ours)
            np.random.set_state(theirs)  # noqa: NPY002


def _split(path: str) -> tuple[str, str]:
    name, _, attribute = path.partition(":")
    if not attribute.isidentifier() or not all(part.isidentifier() for part in name.split(".")):
        raise ModuleError(f"module.path must be of the form package.module:Class, not {path!r}")
    return name, attribute


def _source(name: str) -> Path:
    try:
        spec = importlib.util.find_spec(name)
    except Exception as error:  # finding a module runs the packages around it
        raise ModuleError(f"module.path: {name} cannot be found: {type(error).__name__}: {error}") from error
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise ModuleError(
            f"module.path: there is no source of {name} here: install it where stages are trained and served, "
            "or put its directory on PYTHONPATH"
        )
    return Path(spec.origin)
