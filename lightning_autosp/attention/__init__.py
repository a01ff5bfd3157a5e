"""Sequence-parallel attention: one file a method, and what attention masks prove to be."""
