"""``ceed-vla improve``: adapters that learn from the outcomes of episodes (S-GRPO, ExIt)."""
