"""Spark and the Java that it needs.

Whoever needs Spark or Java asks here. Nothing of PySpark is imported before it is used, so the base install can import all of it.
"""
