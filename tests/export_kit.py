"""Requests in every state for tests of exports, written into the tables as the programs leave them."""

import psycopg
from api_client import Api

FILL = """
WITH made AS (
    INSERT INTO deletion_request (request_id, kind, state, outcome, subject_commitment, regime, reference,
                                  received_at, due_at, created_at, created_by)
    SELECT gen_random_uuid(), CASE WHEN n %% 10 = 9 THEN 'restrict' ELSE 'erase' END::deletion_kind,
           s.state::deletion_state, s.outcome::deletion_outcome, sha256(n::text::bytea),
           (ARRAY['gdpr', 'ccpa', 'voluntary', NULL])[1 + n %% 4], 'CANARY-' || n,
           t.at, t.at + interval '30 days', t.at + interval '1 minute', k.prefix
    FROM generate_series(1, %(count)s) n
    CROSS JOIN LATERAL (SELECT timestamptz '2026-01-01' + make_interval(hours => n::int) AS at) t
    CROSS JOIN LATERAL (
        SELECT ('{completed,completed,completed,deactivated,rejected,revoked,failed}'::text[])[1 + n %% 7],
               ('{erased,no_match,partial}'::text[])[1 + n %% 7]
    ) s (state, outcome)
    CROSS JOIN (SELECT prefix FROM api_key LIMIT 1) k
    RETURNING *
), targets AS (
    INSERT INTO request_target (request_id, model_id, state, outcome, version, deactivated_at, erased_at, completed_at)
    SELECT request_id, m.model_id, state, outcome,
           CASE WHEN state IN ('completed', 'deactivated') AND outcome IS DISTINCT FROM 'no_match' THEN 2 END,
           CASE WHEN state IN ('completed', 'deactivated') AND outcome IS DISTINCT FROM 'no_match'
                THEN d.created_at + interval '0.04 seconds' END,
           CASE WHEN outcome IN ('erased', 'partial') THEN d.created_at + interval '5 days' END,
           CASE WHEN state = 'completed' THEN d.created_at + interval '6 days' END
    FROM made d CROSS JOIN model m
)
INSERT INTO event_pending (kind, request_id, body, created_at)
SELECT 'target.' || state, request_id,
       jsonb_build_object('actor', created_by, 'reason_code', CASE state WHEN 'rejected' THEN 'insuf_verification'
                                                                         ELSE 'asked_again' END),
       created_at + interval '2 days'
FROM made WHERE state IN ('rejected', 'revoked')
"""


def fill(api: Api, owner_url: str, count: int) -> None:
    """A model, and requests received hourly from the first of January 2026 on."""
    api.dataset()
    api.model()
    with psycopg.connect(owner_url) as connection:
        connection.execute(FILL, {"count": count})
        connection.execute("ANALYZE deletion_request")
