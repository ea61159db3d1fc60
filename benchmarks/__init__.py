"""The benchmarks: the product against what one would use without it, on one server, in one run.

Each benchmark ends with one line of JSON. Only ratios of one run mean something: machines differ, and so do their days.
"""
