"""Action vocabularies, one file each; a user's own registers itself the same way
(docs/how-to/add-an-action-vocabulary.md).
"""
