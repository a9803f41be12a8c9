"""Caches in a GPU's memory: reached by CUDA IPC, copied by streams of our own."""
