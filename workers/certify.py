"""The last step: a signed certificate from committed rows, stored in the transaction that completes the target."""

from uuid import UUID

from service.evidence.certificate import issue
from service.evidence.keys import load_signing_key, public_pem
from service.evidence.verify import verify
from service.store import evidence, targets
from service.store.database import retrying, transaction
from shards.digest import canonical, sha256_hex
from workers.context import Context


class UnverifiedError(Exception):
    """What was gathered does not make a certificate that `expunge verify` accepts; nothing was stored."""


def certify_target(context: Context, request_id: UUID, model_id: int) -> bool:
    """Issue the certificate of an erased or restricted target; False when it is not this target's turn.

    Signed twice after a crash, stored once: the row is unique, and its payload comes from committed rows only.
    """
    with transaction(context.pool) as connection:
        state = evidence.find_state(connection, request_id, model_id)
        attempts = targets.raise_attempts(connection, request_id, model_id, state) if state else None
        if state is None or attempts is None:
            return False
        if attempts > context.settings.target_attempts:
            targets.mark_failed(connection, request_id, model_id, state, "AttemptsExhausted")
            return False
    with transaction(context.pool) as connection:
        found = evidence.get_evidence(connection, request_id, model_id)
    if found is None:
        return False
    key = load_signing_key(context.settings.keys_dir / "signing.pem")
    envelope = issue(found, key)
    if refused := [check.name for check in verify(envelope, public_pem(key)) if not check.passed]:
        raise UnverifiedError(f"the certificate would not verify: {', '.join(refused)}")
    digest = sha256_hex(canonical(envelope))

    def step() -> bool:
        with transaction(context.pool) as connection:
            return evidence.insert_certificate(connection, found, model_id, envelope, digest)

    return retrying(step)
