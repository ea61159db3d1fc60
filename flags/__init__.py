"""Flags: who serves reads and writes, by stage, and the evidence that a stage asks for.

The router and all that it imports need the base install only: no Spark, no Delta, no report.
"""
