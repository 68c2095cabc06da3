class StandaloneError(Exception):
    """`expunge up` cannot go on; the message says why and what to do next."""
