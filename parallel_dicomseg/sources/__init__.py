"""Annotation sources: one module each, known by name to registry.py."""
