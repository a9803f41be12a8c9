"""Reuse of documents at any position, composed of the engine."""
