-- Who follows which channel, in the old store; changeover makes the new table.
CREATE TABLE public.follows (
    from_user bigint NOT NULL,
    to_channel bigint NOT NULL,
    note text,
    blocked_on text,  -- a time of UTC, kept as text: 'YYYY-MM-DD HH24:MI:SS'
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (from_user, to_channel)
);

INSERT INTO public.follows
SELECT i % 50 + 1, i / 50 + 1,
    CASE i % 4 WHEN 0 THEN NULL WHEN 1 THEN '' WHEN 2 THEN 'NULL' ELSE 'Zoë ☂ ' || i END,
    CASE WHEN i % 3 = 0 THEN to_char(timestamp '2019-01-01' + i * interval '7 hours', 'YYYY-MM-DD HH24:MI:SS') END,
    timestamptz '2018-01-01 00:00:00Z' + i * interval '11 hours'
FROM generate_series(0, 999) AS i;

ANALYZE public.follows;
