"""The transform: what fills each target column, in both directions.

One set of expressions serves backfill, replay and verification, so that they can't drift.
"""
