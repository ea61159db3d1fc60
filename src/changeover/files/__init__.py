"""The work folder and the log files in it.

Each folder has the rights that the spec states. Each failure of a folder is one sentence that names the folder.
"""
