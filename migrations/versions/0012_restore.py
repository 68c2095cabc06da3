"""Restore: a database that was put back stays shut until it was compared; what ends by age."""

from typing import LiteralString

from alembic import op

revision = "0012"
down_revision = "0011"

# Programs are stopped while migrations run, and the do-not-train list is short.
TABLES: LiteralString = """
-- squawk-ignore-file constraint-missing-not-valid, adding-not-nullable-field, adding-field-with-default
-- squawk-ignore-file disallowed-unique-constraint, require-concurrent-index-creation, adding-serial-primary-key-field
ALTER TYPE version_cause ADD VALUE IF NOT EXISTS 'restore' AFTER 'rollback';
ALTER TABLE do_not_train ADD COLUMN entry_id uuid NOT NULL DEFAULT gen_random_uuid() PRIMARY KEY;
CREATE INDEX do_not_train_page ON do_not_train (since DESC, entry_id DESC);

-- One row: which running database was compared with the tree heads outside, and why it may do nothing. No row: nothing
-- was ever compared, since nothing was ever signed.
CREATE TABLE vetting (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    database text NOT NULL,                -- database_identity() when it was compared
    published bigint NOT NULL DEFAULT 0,   -- leaves in the store's files: a checkpoint with fewer is of an older store
    quarantine text,                       -- what is wrong, for the operator; NULL: nothing
    progress jsonb                         -- of a restore under way
);
-- What a restore could not bring back, for the operator.
CREATE TABLE restore_loss (
    loss_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    what text NOT NULL CHECK (what ~ '^[a-z_]+$'),
    body jsonb NOT NULL,
    UNIQUE (what, body)
);
GRANT SELECT, INSERT, UPDATE ON vetting TO expunge_app;
GRANT SELECT, INSERT, DELETE ON restore_loss TO expunge_app;
"""

GATE: LiteralString = """
-- Another one after each start of the server, and for each copy of a database.
CREATE FUNCTION database_identity() RETURNS text LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT extract(epoch FROM pg_postmaster_start_time())::text || ' '
        || (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())::text || ' '
        || 'ledger_head'::regclass::oid::text
$$;
-- An operator intervention (class 57), which programs take as a store that is away: they try again later.
CREATE FUNCTION require_open() RETURNS trigger LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE found vetting%ROWTYPE;
BEGIN
    IF coalesce(current_setting('expunge.mode', true), '') IN ('applying', 'restoring') THEN RETURN NULL; END IF;
    SELECT * INTO found FROM vetting;
    IF found.quarantine IS NOT NULL THEN
        RAISE EXCEPTION 'in quarantine: %', found.quarantine USING ERRCODE = '57Q01';
    ELSIF found.database IS NOT NULL AND found.database <> database_identity() THEN
        RAISE EXCEPTION 'this database was not compared with the ledger''s files since it started'
            USING ERRCODE = '57Q02';
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER require_open BEFORE INSERT ON event_pending FOR EACH STATEMENT EXECUTE FUNCTION require_open();
CREATE TRIGGER require_open BEFORE INSERT ON ledger_leaf FOR EACH STATEMENT EXECUTE FUNCTION require_open();
CREATE TRIGGER require_open BEFORE INSERT ON tree_head FOR EACH STATEMENT EXECUTE FUNCTION require_open();
CREATE TRIGGER require_open BEFORE INSERT OR UPDATE OF covers ON lease
    FOR EACH STATEMENT EXECUTE FUNCTION require_open();
"""

RETENTION: LiteralString = """
-- Entries and certificates end by age alone, and never young ones, whoever calls it.
CREATE FUNCTION erase_certificates(days int) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE erased bigint;
BEGIN
    IF days < 30 THEN
        RAISE EXCEPTION 'certificates are kept for 30 days at least' USING ERRCODE = 'restrict_violation';
    END IF;
    DELETE FROM certificate c WHERE c.issued_at < clock_timestamp() - make_interval(days => days);
    GET DIAGNOSTICS erased = ROW_COUNT;
    RETURN erased;
END $$;
CREATE FUNCTION erase_do_not_train() RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE erased bigint;
BEGIN
    DELETE FROM do_not_train d WHERE d.until < clock_timestamp();
    GET DIAGNOSTICS erased = ROW_COUNT;
    RETURN erased;
END $$;
REVOKE ALL ON FUNCTION erase_certificates, erase_do_not_train FROM PUBLIC;
GRANT EXECUTE ON FUNCTION erase_certificates, erase_do_not_train TO expunge_app;
"""


def upgrade() -> None:
    for statements in (TABLES, GATE, RETENTION):
        op.execute(statements)
