"""Errors of the core; every message says what to do next."""


class ShardsError(Exception):
    """Base of all errors that the core raises on purpose."""


class RecipeError(ShardsError, ValueError):
    """A recipe that cannot be trained; the message names the field."""


class ManifestMismatchError(ShardsError):
    """Records at hand are not the ones that the manifest commits to."""


class BackboneError(ShardsError):
    """The backbone is not there, or is not the one that the recipe names."""


class ArtifactDigestError(ShardsError):
    """An artefact's bytes are not the ones its digest promises; it must not be served."""


class ReplayMismatchError(ShardsError):
    """A stage trained again on the same platform gave another digest: retrain-equal is broken."""
