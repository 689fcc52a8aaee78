-- The epoch row, its guard and its changes. See docs/CONSISTENCY.md.
CREATE SCHEMA IF NOT EXISTS writethrough;

CREATE TABLE writethrough.epoch (
    singleton boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    number bigint NOT NULL,
    -- The run_id of the Redis server that is the cache; null: nobody uses the cache.
    cached_on text,
    -- No read lease on an older epoch can be out any more.
    settled boolean NOT NULL,
    -- When a node last proposed a bypass or reported a broken cache connection; a hint.
    trouble_at timestamptz
);

-- Numbers begin at the second of installation, so that a database made anew does not trust what
-- an earlier one left in the same Redis.
INSERT INTO writethrough.epoch (number, settled)
VALUES (extract(epoch FROM clock_timestamp())::bigint, true);

CREATE VIEW writethrough.sighting AS
SELECT number, cached_on, settled,
       extract(epoch FROM clock_timestamp() - trouble_at)::float8 AS trouble_seconds
FROM writethrough.epoch;

-- The advisory lock that writes share and a change of the epoch holds alone.
CREATE FUNCTION writethrough.lock_id() RETURNS bigint
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS 'SELECT 8607057786497689602';

-- True while the epoch is still the one in which the write was announced; keeps it so until the
-- transaction ends. Every statement of a plpgsql function takes a new snapshot in READ COMMITTED,
-- so the check sees an epoch that was changed while this call waited for the lock.
CREATE FUNCTION writethrough.guard(expected bigint) RETURNS boolean
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE AS $$
DECLARE
    found bigint;
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'writethrough.guard needs READ COMMITTED, not %',
            current_setting('transaction_isolation') USING ERRCODE = 'feature_not_supported';
    END IF;
    PERFORM pg_advisory_xact_lock_shared(writethrough.lock_id());
    SELECT number INTO found FROM writethrough.epoch;
    IF found IS DISTINCT FROM expected THEN
        RAISE EXCEPTION 'epoch % is over', expected USING ERRCODE = 'WT001';
    END IF;
    RETURN true;
END $$;

-- Compare-and-set of the epoch. Waits only briefly for writes under way, because new writes queue
-- up behind it; the caller tries again.
CREATE FUNCTION writethrough.propose(expected bigint, server text, is_settled boolean)
RETURNS SETOF writethrough.sighting
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET lock_timeout = '100ms' AS $$
BEGIN
    IF EXISTS (SELECT FROM writethrough.epoch WHERE number = expected) THEN
        PERFORM pg_advisory_xact_lock(writethrough.lock_id());
        UPDATE writethrough.epoch
        SET number = number + 1, cached_on = server, settled = is_settled,
            trouble_at = CASE WHEN server IS NULL THEN clock_timestamp() ELSE trouble_at END
        WHERE number = expected;
    END IF;
    RETURN QUERY SELECT * FROM writethrough.sighting;
END $$;
