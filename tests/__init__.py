"""A package by this file: a folder gives way to any other `tests` on the path."""
