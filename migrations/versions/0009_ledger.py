"""The ledger: events as numbered leaves of a Merkle tree, what opens them, and the tree heads that were signed."""

from typing import LiteralString

from alembic import op

revision = "0009"
down_revision = "0008"

TABLES: LiteralString = """
-- Events without a leaf yet. A trigger fills it, so that nothing can be recorded without being due for the ledger.
CREATE TABLE ledger_queue (
    id bigint PRIMARY KEY  -- of event_pending
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 10000);

CREATE TABLE ledger_leaf (
    index bigint PRIMARY KEY CHECK (index >= 0),
    event_id uuid NOT NULL UNIQUE,
    hash bytea NOT NULL CHECK (octet_length(hash) = 32),
    leaf bytea NOT NULL CHECK (octet_length(leaf) BETWEEN 1 AND 65535)
);
-- Roots of full subtrees of 256^level leaves: what proofs and tiles need besides the leaves.
CREATE TABLE ledger_node (
    level int CHECK (level >= 1),
    position bigint CHECK (position >= 0),
    hash bytea NOT NULL CHECK (octet_length(hash) = 32),
    PRIMARY KEY (level, position)
);
-- Salt and content of a leaf. Erased when its retention ends: the leaf then says a kind and a time, and nothing else.
CREATE TABLE ledger_opening (
    index bigint PRIMARY KEY,
    opening bytea NOT NULL,
    recorded_at timestamptz NOT NULL
);
CREATE INDEX ledger_opening_age ON ledger_opening USING brin (recorded_at);  -- codespell:ignore brin

-- One row, whose lock makes one sequencer of many (rule 14); locked last of all.
CREATE TABLE ledger_head (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    size bigint NOT NULL DEFAULT 0 CHECK (size >= 0),
    peaks bytea[] NOT NULL DEFAULT '{}'
);
INSERT INTO ledger_head DEFAULT VALUES;

-- Heads that were signed: one for a size, for ever (rule 16).
CREATE TABLE tree_head (
    size bigint PRIMARY KEY CHECK (size >= 1),
    root bytea NOT NULL CHECK (octet_length(root) = 32),
    note text NOT NULL,
    signed_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
"""

APPEND_ONLY: LiteralString = """
CREATE FUNCTION refuse_rewriting() RETURNS trigger LANGUAGE plpgsql SET search_path = public, pg_temp AS $$ BEGIN
    RAISE EXCEPTION 'rows of % are never changed or removed: the ledger is append-only', TG_TABLE_NAME
        USING ERRCODE = 'restrict_violation';
END $$;
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON ledger_leaf
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_rewriting();
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON ledger_node
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_rewriting();
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON tree_head
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_rewriting();
CREATE TRIGGER append_only BEFORE DELETE OR TRUNCATE ON ledger_head
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_rewriting();

CREATE FUNCTION require_growth() RETURNS trigger LANGUAGE plpgsql SET search_path = public, pg_temp AS $$ BEGIN
    IF NEW.size <= OLD.size THEN
        RAISE EXCEPTION 'the ledger only grows: % is not above %', NEW.size, OLD.size
            USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER only_grows BEFORE UPDATE ON ledger_head FOR EACH ROW EXECUTE FUNCTION require_growth();

CREATE FUNCTION require_no_gap() RETURNS trigger LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE first bigint; last bigint; rows bigint;
BEGIN
    SELECT min(fresh.index), max(fresh.index), count(*) INTO first, last, rows FROM fresh;
    IF rows > 0 AND (last - first + 1 <> rows
                     OR (first > 0 AND NOT EXISTS (SELECT FROM ledger_leaf l WHERE l.index = first - 1))) THEN
        RAISE EXCEPTION 'leaves % to % would leave a gap', first, last USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER no_gap AFTER INSERT ON ledger_leaf REFERENCING NEW TABLE AS fresh
    FOR EACH STATEMENT EXECUTE FUNCTION require_no_gap();
"""

QUEUE: LiteralString = """
CREATE FUNCTION queue_events() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    INSERT INTO ledger_queue (id) SELECT fresh.id FROM fresh;
    RETURN NULL;
END $$;
CREATE TRIGGER queue_events AFTER INSERT ON event_pending REFERENCING NEW TABLE AS fresh
    FOR EACH STATEMENT EXECUTE FUNCTION queue_events();

CREATE FUNCTION require_leaves() RETURNS trigger LANGUAGE plpgsql SET search_path = public, pg_temp AS $$ BEGIN
    IF EXISTS (SELECT FROM gone JOIN event_pending e USING (id)
               WHERE NOT EXISTS (SELECT FROM ledger_leaf l WHERE l.event_id = e.event_id)) THEN
        RAISE EXCEPTION 'an event leaves the queue as a leaf of the ledger only' USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER require_leaves AFTER DELETE ON ledger_queue REFERENCING OLD TABLE AS gone
    FOR EACH STATEMENT EXECUTE FUNCTION require_leaves();

INSERT INTO ledger_queue (id) SELECT id FROM event_pending;
"""

ERASE: LiteralString = """
-- The one way to an opening's end: by age, and never a young one, whoever calls it. The event goes with it.
-- A request that has not ended, such as one that a hold stops for years, keeps what its certificate is made of: its own
-- events, and those of the model servers since it came.
CREATE FUNCTION erase_openings(days int, most int) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE unended uuid[]; since timestamptz; indexes bigint[]; erased bigint;
BEGIN
    IF days < 30 THEN
        RAISE EXCEPTION 'openings are kept for 30 days at least' USING ERRCODE = 'restrict_violation';
    END IF;
    SELECT array_agg(DISTINCT d.request_id), min(d.created_at) INTO unended, since
    FROM request_target t JOIN deletion_request d USING (request_id)
    WHERE t.state NOT IN ('completed', 'rejected', 'revoked', 'expired', 'duplicate', 'lifted');
    indexes := ARRAY(
        SELECT o.index FROM ledger_opening o
        JOIN ledger_leaf l ON l.index = o.index
        LEFT JOIN event_pending e ON e.event_id = l.event_id
        WHERE o.recorded_at < clock_timestamp() - make_interval(days => days)
          AND (e.request_id = ANY(unended)) IS NOT TRUE
          AND (e.kind LIKE 'replica.%' AND e.created_at >= since) IS NOT TRUE
        ORDER BY o.index LIMIT most);
    DELETE FROM event_pending e USING ledger_leaf l WHERE l.index = ANY(indexes) AND e.event_id = l.event_id;
    DELETE FROM ledger_opening o WHERE o.index = ANY(indexes);
    GET DIAGNOSTICS erased = ROW_COUNT;
    RETURN erased;
END $$;
REVOKE ALL ON FUNCTION erase_openings FROM PUBLIC;
"""

GRANTS: LiteralString = """
GRANT SELECT, DELETE ON ledger_queue TO expunge_app;
GRANT SELECT, INSERT ON ledger_leaf, ledger_node, ledger_opening, tree_head TO expunge_app;
GRANT SELECT, UPDATE ON ledger_head TO expunge_app;
GRANT EXECUTE ON FUNCTION erase_openings TO expunge_app;
"""


def upgrade() -> None:
    for statements in (TABLES, APPEND_ONLY, QUEUE, ERASE, GRANTS):
        op.execute(statements)
