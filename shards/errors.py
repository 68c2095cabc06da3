"""Errors of the core; every message says what to do next."""


class ShardsError(Exception):
    """Base of all errors that the core raises on purpose."""


class RecipeError(ShardsError, ValueError):
    """A recipe that cannot be trained; the message names the field."""


class ModuleError(RecipeError):
    """The module of engine `sisa` cannot be imported or built, is not the recipe's, or does not fit the data."""


class DivergedError(RecipeError):
    """Training gave a loss or a weight that is not a number."""


class CommandError(RecipeError):
    """The training command of engine `external` is not allowed, failed, or wrote no valid artefact."""


class MemoryShortageError(ShardsError):
    """Memory ran out; the message says which fields to turn down."""


class InputError(RecipeError):
    """An input that no model of the recipe can read; the message holds nothing of it."""


class ManifestMismatchError(ShardsError):
    """Records at hand are not the ones that the manifest commits to."""


class BackboneError(ShardsError):
    """The backbone is not there, or is not the one that the recipe names."""


class ArtifactDigestError(ShardsError):
    """An artefact's bytes are not the ones its digest promises; it must not be served."""


class ReplayMismatchError(ShardsError):
    """A stage trained again on the same platform gave another digest: retrain-equal is broken."""
