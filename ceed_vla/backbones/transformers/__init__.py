"""What models of transformers share: a language model behind a prefix of embeddings, published
weights and files.
"""
