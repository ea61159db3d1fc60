"""Shadow reads: a read asked of both stores, and of whatever else answers it, and compared.

It runs in the application, off the callers' threads.
"""
