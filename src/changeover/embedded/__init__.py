"""A PostgreSQL server of our own, for the demo, the tests and the benchmarks.

The server listens on the loopback address alone, and its folder belongs to an unprivileged user. No step of a migration needs it.
"""
