"""The server's settings: which of them change what a session of ours reads, writes or waits for, and the value of each there.

Every setting that a role, a database or a session can be given is named here: pinned, or with the reason why it is not. Server,
`ALTER DATABASE`, `ALTER ROLE`, the environment and a DSN may all change them. In a session of the application's own nothing of
this is set; statements of ours there pin by `SET LOCAL` what they depend on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import NamedTuple

from psycopg import sql


class Kind(Enum):
    """Whose statements a session runs."""

    OURS = "ours alone"
    BESIDE = "ours, on a thread of the router in the application's process, as the application's role"
    CALLERS = "the application's own, in a session that the router opened"


OWN = frozenset({Kind.OURS, Kind.BESIDE})
EVERY = frozenset(Kind)


class Setting(NamedTuple):
    """A pinned setting: its name, its value as the server prints it, and why it is pinned."""

    name: str
    value: str
    why: str
    kinds: frozenset[Kind] = OWN
    since: int = 0
    """The first server that knows it (`server_version_num`); an unknown name would end the connection as it begins."""


PINNED = (
    # how a value reads as text, and is read from it
    Setting("TimeZone", "UTC", "a timestamptz reads in it", kinds=EVERY),
    Setting("DateStyle", "ISO, YMD", "dates and timestamps read in it", kinds=EVERY),
    Setting("IntervalStyle", "postgres", "intervals read in it", kinds=EVERY),
    Setting("extra_float_digits", "1", "below 1 floats lose digits", kinds=EVERY),
    Setting("bytea_output", "hex", "bytea reads in it", kinds=EVERY),
    Setting("client_encoding", "UTF8", "texts arrive in it", kinds=EVERY),
    Setting("array_nulls", "on", "off makes an element NULL the text NULL", kinds=EVERY),
    Setting("xmlbinary", "base64", "bytea inside xml reads in it"),
    Setting("xmloption", "content", "document refuses xml that is a fragment"),
    Setting("lc_monetary", "C", "money reads, and is read, by it"),
    Setting("lc_numeric", "C", "to_char in a check reads by it"),
    Setting("lc_time", "C", "to_char in a check reads by it"),
    Setting("timezone_abbreviations", "Default", "a timestamptz with an abbreviation is read by it"),
    Setting("quote_all_identifiers", "off", "types and tables are told by the names that the server prints"),
    # what a statement means
    Setting("standard_conforming_strings", "on", "a backslash in a literal is a backslash"),
    Setting("backslash_quote", "safe_encoding", "a quote behind a backslash is read by it"),
    Setting("transform_null_equals", "off", "on makes = NULL true for NULL"),
    Setting("search_path", "public", "operators and types are pg_catalog's first, then public's; ours are named with their schema"),
    Setting("gin_fuzzy_search_limit", "0", "above 0 an index gives a random part of its rows"),
    Setting("exit_on_error", "off", "on ends the session with any error, a lock not granted too"),
    Setting("default_table_access_method", "heap", "tables that prepare makes are of it, and the ledger locks rows"),
    Setting("client_min_messages", "notice", "debug levels send messages without end"),
    # what a statement sees and may do
    Setting("row_security", "off", "a row that a policy hides is refused, and not left out; never in a router",
            kinds=frozenset({Kind.OURS})),
    Setting("default_transaction_isolation", "read committed", "the gate is proved for it", kinds=EVERY),
    Setting("default_transaction_read_only", "off", "we write"),
    Setting("default_transaction_deferrable", "off", "a snapshot that waits is not the one that was exported"),
    Setting("synchronous_commit", "on", "what the ledger says was done must outlive a crash"),
    # how long anything may take
    Setting("statement_timeout", "0", "a chunk, a batch or a comparison may take long"),
    Setting("lock_timeout", "0", "where a lock must make way, the statement says so by SET LOCAL"),
    Setting("idle_in_transaction_session_timeout", "0", "a session that holds a snapshot is idle in its transaction"),
    Setting("idle_session_timeout", "0", "a lease is a session that waits", since=140000),
    Setting("transaction_timeout", "0", "a snapshot is held for as long as it is read", since=170000),
    Setting("wal_sender_timeout", "1min", "a stream is answered in time for this one"),
)  # fmt: skip
"""What sessions of ours pin: psycopg's, the walsender's and those of Spark's JDBC reader."""

OUTPUT = ("TimeZone", "DateStyle", "IntervalStyle", "extra_float_digits", "bytea_output")
"""Those by which a carried value reads as text: the triggers that log changes set them for themselves."""


class Asked(NamedTuple):
    """A setting that only a superuser may change: `check` looks at what it is for our role."""

    name: str
    wrong: str
    """The condition under which it stands against the plan, of its value `setting`."""
    consequence: str
    reason: bool
    """Whether the plan is refused; else it is told."""


ASKED = (
    Asked("zero_damaged_pages", "setting = 'on'", "a damaged page reads as empty, and its rows would be missing in silence", True),
    Asked("ignore_checksum_failure", "setting = 'on'", "a damaged page is read as if it were whole", True),
    Asked("old_snapshot_threshold", "setting::int >= 0", "a snapshot that is read for longer is lost, and a new one taken", False),
    Asked("idle_replication_slot_timeout", "setting::int > 0",
          "a slot that capture does not read for so long is dropped: `prepare --anew` then begins anew", False),
)  # fmt: skip


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


LEFT: Mapping[str, tuple[str, ...]] = {
    "who we are, or what runs beside us: the operator's choice, alike in every kind of session": _names(
        "application_name local_preload_libraries session_preload_libraries dynamic_library_path extension_control_path"
        " extension_destdir output_plugin_libraries event_triggers createrole_self_grant jit_provider"
    ),
    "where new tables and temporary files lie: the operator's choice, and no value depends on it": _names(
        "default_tablespace temp_tablespaces default_toast_compression allow_in_place_tablespaces file_copy_method"
    ),
    "a superuser's alone; what of ours must fire is ENABLE ALWAYS": _names("session_replication_role"),
    "the words of messages alone; kinds of errors are told by SQLSTATE": _names("lc_messages"),
    "the transaction's own, set with each one; a default for it is pinned": _names(
        "transaction_isolation transaction_read_only transaction_deferrable"
    ),
    "no carried value and no statement of ours is read in or written out by it": _names(
        "default_text_search_config icu_validation_level check_function_bodies escape_string_warning lo_compat_privileges"
        " password_encryption scram_iterations md5_password_warnings allow_system_table_mods"
    ),
    "refuses loudly, or takes more time, and leaves no row out": _names(
        "restrict_nonsystem_relation_kind temp_file_limit max_stack_depth ignore_system_indexes post_auth_delay deadlock_timeout"
        " synchronize_seqscans wal_consistency_checking backtrace_functions"
    ),
    "when a silent network counts as broken: the operator's choice, and we connect again": _names(
        "client_connection_check_interval tcp_keepalives_count tcp_keepalives_idle tcp_keepalives_interval tcp_user_timeout"
    ),
    "memory and input: speed alone": _names(
        "work_mem maintenance_work_mem temp_buffers hash_mem_multiplier logical_decoding_work_mem gin_pending_list_limit"
        " backend_flush_after effective_io_concurrency maintenance_io_concurrency io_combine_limit vacuum_buffer_usage_limit"
        " commit_delay commit_siblings wal_compression wal_init_zero wal_recycle wal_skip_threshold"
    ),
    "the planner's way, and never its answer: speed alone": _names(
        "constraint_exclusion cursor_tuple_fraction default_statistics_target from_collapse_limit join_collapse_limit"
        " plan_cache_mode recursive_worktable_factor effective_cache_size cpu_index_tuple_cost cpu_operator_cost cpu_tuple_cost"
        " min_parallel_index_scan_size min_parallel_table_scan_size parallel_setup_cost parallel_tuple_cost random_page_cost"
        " seq_page_cost enable_async_append enable_bitmapscan enable_distinct_reordering enable_gathermerge"
        " enable_group_by_reordering enable_hashagg enable_hashjoin enable_incremental_sort enable_indexonlyscan"
        " enable_indexscan enable_material enable_memoize enable_mergejoin enable_nestloop enable_parallel_append"
        " enable_parallel_hash enable_partition_pruning enable_partitionwise_aggregate enable_partitionwise_join"
        " enable_presorted_aggregate enable_self_join_elimination enable_seqscan enable_sort enable_tidscan geqo geqo_effort"
        " geqo_generations geqo_pool_size geqo_seed geqo_selection_bias geqo_threshold jit jit_above_cost"
        " jit_inline_above_cost jit_optimize_above_cost jit_expressions jit_tuple_deforming jit_dump_bitcode"
        " jit_debugging_support jit_profiling_support max_parallel_maintenance_workers max_parallel_workers"
        " max_parallel_workers_per_gather parallel_leader_participation force_parallel_mode debug_parallel_query"
        " debug_discard_caches debug_logical_replication_streaming logical_replication_mode"
    ),
    "vacuum's alone": _names(
        "vacuum_failsafe_age vacuum_freeze_min_age vacuum_freeze_table_age vacuum_multixact_failsafe_age"
        " vacuum_multixact_freeze_min_age vacuum_multixact_freeze_table_age vacuum_cost_delay vacuum_cost_limit"
        " vacuum_cost_page_dirty vacuum_cost_page_hit vacuum_cost_page_miss vacuum_truncate"
        " vacuum_max_eager_freeze_failure_rate"
    ),
    "the server's own log and statistics": _names(
        "compute_query_id debug_pretty_print debug_print_parse debug_print_plan debug_print_rewritten log_connections"
        " log_disconnections log_duration log_error_verbosity log_executor_stats log_lock_failures log_lock_waits"
        " log_min_duration_sample log_min_duration_statement log_min_error_statement log_min_messages"
        " log_parameter_max_length log_parameter_max_length_on_error log_parser_stats log_planner_stats"
        " log_replication_commands log_statement log_statement_sample_rate log_statement_stats log_temp_files"
        " log_transaction_sample_rate stats_fetch_consistency trace_notify trace_sort track_activities"
        " track_cost_delay_timing track_counts track_functions track_io_timing track_wal_io_timing update_process_title"
    ),
}
"""Settings that are left as they are, by the reason."""


def pinned(kind: Kind = Kind.OURS) -> dict[str, str]:
    """Return what a session pins as it begins: all that every server knows.

    Args:
        kind: Whose statements the session runs.

    Returns:
        The settings' values by name.
    """
    return {setting.name: setting.value for setting in PINNED if not setting.since and kind in setting.kinds}


def later(version: int, kind: Kind = Kind.OURS) -> dict[str, str]:
    """Return what a session pins once its server's version is known."""
    return {setting.name: setting.value for setting in PINNED if 0 < setting.since <= version and kind in setting.kinds}


def output() -> dict[str, str]:
    """Return the settings by which carried values read as text.

    Returns:
        The settings' values by name.
    """
    return {setting.name: setting.value for setting in PINNED if setting.name in OUTPUT}


def statements(settings: Mapping[str, str]) -> sql.Composed:
    """Return SET statements for a session; lists are written as their parts.

    Args:
        settings: The values by name.

    Returns:
        One SET a setting, with semicolons between.
    """
    return sql.SQL("; ").join(sql.SQL("SET {}").format(assignment(name, value)) for name, value in settings.items())


def assignment(name: str, value: str) -> sql.Composed:
    """Return `name TO value`, as SET and the SET of a function take it.

    Args:
        name: The setting.
        value: Its value; a list has commas between.

    Returns:
        The clause.
    """
    return sql.SQL("{} TO {}").format(sql.Identifier(name), sql.SQL(", ").join(map(sql.Literal, value.split(", "))))


def deviations(expected: Mapping[str, str]) -> sql.Composed:
    """Return a query for the settings that a session has otherwise than wanted: name, value; whatever the search_path is.

    Args:
        expected: The wanted values by name.

    Returns:
        The query.
    """
    rows: Sequence[sql.Composed] = [
        sql.SQL("({}, {})").format(sql.Literal(name), sql.Literal(value)) for name, value in expected.items()
    ]
    return sql.SQL(
        "SELECT name, pg_catalog.current_setting(name, true) FROM (VALUES {}) AS wanted (name, value)"
        " WHERE NOT coalesce(pg_catalog.current_setting(name, true) OPERATOR(pg_catalog.=) value, false)"
    ).format(sql.SQL(", ").join(rows))


ASK = sql.SQL("SELECT format('%s %s', setting, unit) FROM pg_settings WHERE name = {} AND {}")


def question(asked: Asked) -> sql.Composed:
    """Return the query that has a row where a setting stands against the plan.

    Args:
        asked: The setting, and the condition that stands against the plan.

    Returns:
        The query, which has one row or none.
    """
    return ASK.format(sql.Literal(asked.name), sql.SQL(asked.wrong))
