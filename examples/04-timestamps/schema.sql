-- `data` was text for flexibility, and holds nothing but times of UTC by now.
CREATE TABLE public.entries (
    entry_id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    data text NOT NULL
);

INSERT INTO public.entries (data)
SELECT to_char(timestamp '2022-05-04' + i * interval '5 hours 0.000003 seconds', 'YYYY-MM-DD HH24:MI:SS.US')
FROM generate_series(1, 500) AS i;

ANALYZE public.entries;
