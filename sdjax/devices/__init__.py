"""Meshes and processes, and what compiled programs cost on them."""
