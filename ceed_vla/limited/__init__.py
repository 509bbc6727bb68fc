"""Work on what others made, such as tokenizers and chat templates, in a child with limits of time
and memory.

`process` starts the child; `child` is what it runs, which needs nothing of this package; each other
file is one kind of work.
"""
