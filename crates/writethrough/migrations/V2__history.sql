-- The history of the database that the epoch belongs to, and a test of what the guard rests on. See
-- docs/CONSISTENCY.md.

-- Nodes of the version before this one keep their values under other names, so they must not write
-- beside nodes of this one: the number moves on, and what they poll is gone.
DROP FUNCTION writethrough.propose(bigint, text, boolean);
DROP VIEW writethrough.sighting;

ALTER TABLE writethrough.epoch
    -- A random id, part of every cache key; a new history of the database gets a new one.
    ADD COLUMN history text,
    -- The history that the row was written in: the cluster, and its timeline, which a promoted
    -- standby and a restored backup change.
    ADD COLUMN system_identifier text,
    ADD COLUMN timeline text;

CREATE FUNCTION writethrough.new_history() RETURNS text
LANGUAGE sql VOLATILE AS $$ SELECT right(id, 12) || left(id, 4) FROM (SELECT gen_random_uuid()::text AS id) AS made $$;

-- The server's own timeline. pg_control_checkpoint() shows a new one only after a checkpoint.
CREATE FUNCTION writethrough.timeline() RETURNS text
LANGUAGE sql VOLATILE AS $$ SELECT substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) $$;

UPDATE writethrough.epoch
SET number = number + 1, cached_on = NULL, settled = false,
    history = writethrough.new_history(),
    system_identifier = (SELECT system_identifier::text FROM pg_control_system()),
    timeline = writethrough.timeline();

ALTER TABLE writethrough.epoch
    ALTER COLUMN history SET NOT NULL,
    ALTER COLUMN system_identifier SET NOT NULL,
    ALTER COLUMN timeline SET NOT NULL;

-- What a node polls.
CREATE VIEW writethrough.row_seen AS
SELECT number, cached_on, settled,
       extract(epoch FROM clock_timestamp() - trouble_at)::float8 AS trouble_seconds,
       history,
       epoch.system_identifier = server.system_identifier::text
           AND timeline = writethrough.timeline() AS in_its_history
FROM writethrough.epoch, pg_control_system() AS server;

-- As before, and refused too while the row is of another history. A session belongs to one cluster,
-- so the identifier, which costs a look into a file, is asked for once in each session.
-- Null is for writers in a mode without epochs: then it answers null and checks nothing.
CREATE OR REPLACE FUNCTION writethrough.guard(expected bigint) RETURNS boolean
LANGUAGE plpgsql VOLATILE STRICT PARALLEL UNSAFE AS $$
DECLARE
    cluster text := current_setting('writethrough.system_identifier', true);
    found bigint;
    in_its_history boolean;
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'writethrough.guard needs READ COMMITTED, not %',
            current_setting('transaction_isolation') USING ERRCODE = 'feature_not_supported';
    END IF;
    IF coalesce(cluster, '') = '' THEN
        SELECT system_identifier::text INTO cluster FROM pg_control_system();
        PERFORM set_config('writethrough.system_identifier', cluster, false);
    END IF;
    PERFORM pg_advisory_xact_lock_shared(writethrough.lock_id());
    SELECT number, system_identifier = cluster AND timeline = writethrough.timeline()
    INTO found, in_its_history FROM writethrough.epoch;
    IF found IS NULL THEN
        RAISE EXCEPTION 'the epoch row is missing' USING ERRCODE = 'WT002';
    END IF;
    IF found IS DISTINCT FROM expected THEN
        RAISE EXCEPTION 'epoch % is over', expected USING ERRCODE = 'WT001';
    END IF;
    IF NOT in_its_history THEN
        RAISE EXCEPTION 'epoch % belongs to another history of the database', expected
            USING ERRCODE = 'WT001';
    END IF;
    RETURN true;
END $$;

-- Compare-and-set of the epoch. Waits only briefly for writes under way, because new writes queue
-- up behind it; the caller tries again.
CREATE FUNCTION writethrough.propose(expected bigint, server text, is_settled boolean)
RETURNS SETOF writethrough.row_seen
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET lock_timeout = '100ms' AS $$
BEGIN
    IF EXISTS (SELECT FROM writethrough.row_seen WHERE number = expected AND in_its_history) THEN
        PERFORM pg_advisory_xact_lock(writethrough.lock_id());
        UPDATE writethrough.epoch
        SET number = number + 1, cached_on = server, settled = is_settled,
            trouble_at = CASE WHEN server IS NULL THEN clock_timestamp() ELSE trouble_at END
        WHERE number = expected;
    END IF;
    RETURN QUERY SELECT * FROM writethrough.row_seen;
END $$;

-- The first epoch of another history: bypass, not settled, above every number that was ever used.
-- For a database that is in another history than its row, and for one whose number went back.
CREATE FUNCTION writethrough.begin_history(expected bigint, above bigint, leap bigint)
RETURNS SETOF writethrough.row_seen
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET lock_timeout = '100ms' AS $$
BEGIN
    IF EXISTS (SELECT FROM writethrough.row_seen WHERE number = expected) THEN
        PERFORM pg_advisory_xact_lock(writethrough.lock_id());
        UPDATE writethrough.epoch
        SET number = greatest(number, above) + leap, cached_on = NULL, settled = false,
            history = writethrough.new_history(),
            system_identifier = (SELECT system_identifier::text FROM pg_control_system()),
            timeline = writethrough.timeline(),
            trouble_at = clock_timestamp()
        WHERE number = expected;
    END IF;
    RETURN QUERY SELECT * FROM writethrough.row_seen;
END $$;

-- For the test of a server: two connections find out whether a lock that one holds alone makes the
-- other wait, and whether a function sees what was committed while it waited. One row for each test.
CREATE TABLE writethrough.self_test (
    lock bigint PRIMARY KEY,
    number bigint NOT NULL
);

CREATE FUNCTION writethrough.self_test_guard(tested bigint) RETURNS bigint
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE AS $$
DECLARE
    found bigint;
BEGIN
    PERFORM pg_advisory_xact_lock_shared(tested);
    SELECT number INTO found FROM writethrough.self_test WHERE lock = tested;
    RETURN found;
END $$;
