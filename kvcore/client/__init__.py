"""The typed client of the server."""

from kvcore.client.client import KVClient as KVClient
