"""The demo: a live table moved end to end on one machine, with an application that never stops writing.

Everything that it shows is done by the functions behind the command line, on real servers; what it adds is the table, the
application, and damage on request. Nothing heavy is imported before it runs, because the application, a process of its own
that knows nothing of Spark, lives in this package as well.
"""
