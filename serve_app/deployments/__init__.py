"""Thin Ray Serve shells around the plain classes. Nothing here decides anything."""
