"""Shared parts of the models of transformers: a language model behind a prefix of embeddings,
published weights and files.
"""
