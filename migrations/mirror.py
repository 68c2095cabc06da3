"""Tables whose changes are events, so that the ledger's files can rebuild them: triggers that nobody can forget."""

from collections.abc import Sequence

# ruff: noqa: S608 - names come from revisions, and from nowhere else


def mirror(table: str, columns: Sequence[str], key: Sequence[str], changes: Sequence[str]) -> str:
    """Statements that record every change of a table in the transaction of the change.

    A change holds the `columns` of inserted rows, those of updated rows that changed, and the `key` of deleted ones.
    `changes`: which of INSERT, UPDATE and DELETE are recorded. Restoring writes rows that are in the ledger already.
    """
    every, keys = ", ".join(columns), ", ".join(key)
    images = {
        "INSERT": f"SELECT jsonb_agg(to_jsonb(n)) INTO images FROM (SELECT {every} FROM fresh) n;",
        "UPDATE": f"""
        SELECT jsonb_agg((
            SELECT jsonb_object_agg(e.key, e.value) FROM jsonb_each(b.now) e
            WHERE e.key = ANY('{{{keys}}}') OR e.value IS DISTINCT FROM b.before -> e.key)) INTO images
        FROM (  -- OFFSET: each row is turned into JSON once, not once a column
            SELECT to_jsonb(n) AS now, to_jsonb(o) AS before
            FROM (SELECT {every} FROM fresh) n JOIN (SELECT {every} FROM gone) o USING ({keys}) OFFSET 0) b
        WHERE b.now <> b.before;""",
        "DELETE": f"SELECT jsonb_agg(to_jsonb(o)) INTO images FROM (SELECT {keys} FROM gone) o;",
    }
    seen = {
        "INSERT": "REFERENCING NEW TABLE AS fresh",
        "UPDATE": "REFERENCING OLD TABLE AS gone NEW TABLE AS fresh",
        "DELETE": "REFERENCING OLD TABLE AS gone",
    }
    branches = "".join(f"    IF TG_OP = '{each}' THEN {images[each]}\n    END IF;\n" for each in changes)
    triggers = "".join(
        f"CREATE TRIGGER mirror_{each.lower()} AFTER {each} ON {table} {seen[each]}\n"
        f"    FOR EACH STATEMENT EXECUTE FUNCTION mirror_{table}();\n"
        for each in changes
    )
    return f"""
-- Plans last as long as the connection: one made for a row or two would compare every pair of many.
CREATE FUNCTION mirror_{table}() RETURNS trigger LANGUAGE plpgsql
SET search_path = public, pg_temp SET enable_nestloop = off AS $$
#variable_conflict use_column
DECLARE images jsonb;
BEGIN
    IF current_setting('expunge.mode', true) = 'applying' THEN RETURN NULL; END IF;
{branches}    IF images IS NOT NULL THEN
        INSERT INTO event_pending (kind, body) VALUES ('rows.changed',
            jsonb_build_object('changes', jsonb_build_array(
                jsonb_build_object('table', TG_TABLE_NAME, 'change', lower(TG_OP), 'rows', images))));
    END IF;
    RETURN NULL;
END $$;
{triggers}"""
