-- The old store's tables, with a few orders.
CREATE TABLE orders (
    id uuid PRIMARY KEY,
    customer text NOT NULL,
    placed timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE items (
    order_id uuid NOT NULL REFERENCES orders,
    line integer NOT NULL,
    sku text NOT NULL,
    price numeric(12,2) NOT NULL,
    PRIMARY KEY (order_id, line)
);
INSERT INTO orders (id, customer) SELECT gen_random_uuid(), 'customer ' || n FROM generate_series(1, 300) n;
INSERT INTO items SELECT id, line, 'sku ' || line, line * 1.25 FROM orders, generate_series(1, 2) line;
