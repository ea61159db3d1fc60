"""The preflight: whether a plan is safe, and why not.

Each reason is a sentence that says what to do. Nothing here changes a store.
"""
