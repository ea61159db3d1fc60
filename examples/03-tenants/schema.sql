-- Who follows which channel. The rows of one user move together.
CREATE TABLE public.follows (
    from_user bigint NOT NULL,
    to_channel bigint NOT NULL,
    PRIMARY KEY (from_user, to_channel)
);

INSERT INTO public.follows SELECT i % 20 + 1, i / 20 + 1 FROM generate_series(0, 399) AS i;

ANALYZE public.follows;
