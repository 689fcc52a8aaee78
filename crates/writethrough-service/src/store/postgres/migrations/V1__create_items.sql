CREATE TABLE items (
    id          uuid PRIMARY KEY,
    name        text NOT NULL CHECK (char_length(name) BETWEEN 1 AND 255),
    description text,
    price       numeric(10, 2) NOT NULL CHECK (price BETWEEN 0 AND 99999999.99),
    created_at  timestamptz NOT NULL DEFAULT now(),
    updated_at  timestamptz NOT NULL DEFAULT now(),
    version     bigint NOT NULL DEFAULT 1 CHECK (version > 0)
);

-- The order of the list, newest first; the id makes it total.
CREATE INDEX items_newest_first ON items (created_at DESC, id DESC);

INSERT INTO items (id, name, description, price) VALUES
    ('550e8400-e29b-41d4-a716-446655440001', 'Sample item 1', 'The first of three rows to try things on.', 19.99),
    ('550e8400-e29b-41d4-a716-446655440002', 'Sample item 2', 'The second one.', 29.99),
    ('550e8400-e29b-41d4-a716-446655440003', 'Sample item 3', NULL, 39.99);
