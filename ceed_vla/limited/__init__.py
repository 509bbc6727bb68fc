"""Untrusted tokenizers and chat templates, used in a child process of limited time and memory.

`process` starts the child. `child` is the program of the child and imports nothing of this package.
Each other file is one kind of work.
"""
