"""The matrix of single settings as data: by what a session shows that a setting is at its worst, and what it has to show.

Those that no value shows (timeouts, what a commit waits for, a random part of an index) are looked at by name, as all are, in
`tests/unit/test_settings.py`.
"""

from __future__ import annotations

from typing import NamedTuple


class Shown(NamedTuple):
    """A setting, an expression of SQL whose text goes by it, and that text in every session of ours."""

    name: str
    expression: str
    text: str


SHOWN = (
    Shown("TimeZone", "(timestamptz '2024-03-31 01:30:00.000001Z')::text", "2024-03-31 01:30:00.000001+00"),
    Shown("DateStyle", "(date '2024-02-03')::text", "2024-02-03"),
    Shown("IntervalStyle", "(interval '1 mon -1 day 00:00:01')::text", "1 mon -1 days +00:00:01"),
    Shown("extra_float_digits", "('0.1'::float8 + '0.2'::float8)::text", "0.30000000000000004"),
    Shown("bytea_output", "decode('00ff5c', 'hex')::text", r"\x00ff5c"),
    Shown("client_encoding", "chr(9730)", "☂"),
    Shown("array_nulls", "(('{NULL}'::text[])[1] IS NULL)::text", "true"),
    Shown("timezone_abbreviations", "extract(epoch FROM timestamptz '1970-01-01 02:00 IST')::integer::text", "0"),
    Shown("quote_all_identifiers", "('pg_catalog.pg_class'::regclass)::text", "pg_class"),
    Shown("standard_conforming_strings", r"length('a\b')::text", "3"),
    Shown("transform_null_equals", "((1 = NULL) IS NULL)::text", "true"),
    Shown("search_path", "(1 = 1)::text", "true"),
    Shown("default_transaction_isolation", "current_setting('transaction_isolation')", "read committed"),
    Shown("default_transaction_read_only", "current_setting('transaction_read_only')", "off"),
    Shown("default_transaction_deferrable", "current_setting('transaction_deferrable')", "off"),
)
