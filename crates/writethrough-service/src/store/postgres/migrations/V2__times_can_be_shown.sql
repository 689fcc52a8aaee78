-- Times that RFC 3339 can write. Rows that are there already are left alone, whatever they hold.
ALTER TABLE items
    ADD CONSTRAINT created_at_can_be_shown
        CHECK (created_at >= '0001-01-01 00:00:00+00' AND created_at < '10000-01-01 00:00:00+00') NOT VALID,
    ADD CONSTRAINT updated_at_can_be_shown
        CHECK (updated_at >= '0001-01-01 00:00:00+00' AND updated_at < '10000-01-01 00:00:00+00') NOT VALID;
