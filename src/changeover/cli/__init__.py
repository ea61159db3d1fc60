"""The command line: `changeover …`.

`main` has the commands, `flags` those of the migration flag, and `command` what all of them share: options, answer and exit code.
"""
