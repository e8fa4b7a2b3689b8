"""Developers' tools: what the checkout needs and the installed package does not."""
