"""The KV-cache server's library: values, storage, transports, engine, wire."""

__version__ = "0.1.0"
