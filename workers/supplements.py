"""Supplements: once a certificate's open ends have an answer, a statement of its own says so. The certificate stays."""

from pathlib import Path

import structlog

from service.evidence.certificate import digest_of_envelope
from service.evidence.keys import load_key_set, load_signing_key, public_pem
from service.evidence.rows import EvidenceError
from service.evidence.supplement import issue_supplement
from service.evidence.verify import Trusted, verify
from service.store import additions, certificates
from service.store.additions import Due
from service.store.database import retrying, transaction
from workers.certify import UnverifiedError, published
from workers.context import Context

log = structlog.get_logger()


class Supplements:
    """One look at a time, at the caller's pace; any number may run."""

    def __init__(self, context: Context) -> None:
        """The signing key is read when it is needed."""
        self._context = context

    def look(self) -> int:
        """Add what can be added; how many supplements were issued."""
        with transaction(self._context.pool) as connection:
            due = additions.list_due(connection)
        issued = 0
        for each in due:
            try:
                issued += self.add(each)
            except (EvidenceError, UnverifiedError) as error:
                log.error("certificate.not_supplemented", request_id=str(each.request_id), error=str(error))  # noqa: TRY400
        return issued

    def add(self, due: Due) -> bool:
        """Issue the next supplement of a certificate; False when there is nothing to say yet.

        May die at any line: the supplement, what it answers and its event are one transaction.

        Raises:
            UnverifiedError: it would not verify.
            EvidenceError: a table was changed by hand.
        """
        checkpoint = published(self._context)
        if checkpoint is None:
            return False
        with transaction(self._context.pool) as connection:
            found = certificates.list_certificates(connection, due.request_id)
            (certificate,) = [each for each in found if each.model_id == due.model_id]
            before = certificates.list_supplements(connection, due.request_id, due.model_id)
            addition = additions.get_addition(connection, certificate, before, due.request_id, checkpoint=checkpoint)
        if addition is None:
            return False
        keys_dir = self._context.settings.keys_dir
        key = load_signing_key(keys_dir / "signing.pem")
        envelope = issue_supplement(addition, key)
        checks = verify(
            certificate.envelope, _trusted(keys_dir), supplements=[*(each.envelope for each in before), envelope]
        )
        if refused := [f"{check.name} ({check.detail})" for check in checks if not check.passed]:
            raise UnverifiedError(f"the supplement would not verify: {', '.join(refused)}")

        def step() -> bool:
            with transaction(self._context.pool) as connection:
                return certificates.insert_supplement(
                    connection, addition, due.model_id, envelope, digest_of_envelope(envelope)
                )

        return retrying(step)


def _trusted(keys_dir: Path) -> list[Trusted]:
    """The installation's keys: the certificate may be signed by an older one."""
    found = load_key_set(keys_dir)
    ends = [each.size for each in found.handovers]
    return [
        Trusted(public_pem(key), since, until)
        for key, since, until in zip(found.keys, [-1, *ends], [*ends, None], strict=True)
    ]
