"""Prometheus metrics, read from the server's counters at each scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvcore.errors import SetupError
from kvcore.status import L1Status

if TYPE_CHECKING:
    from prometheus_client import Metric


@contextmanager
def serve_metrics(
    host: str,
    port: int,
    counters: Callable[[], dict[str, int]],
    l1: Callable[[], L1Status],
) -> Iterator[None]:
    """Serve http://`host`:`port`/metrics on its own thread while the context lasts.

    Raises:
        SetupError: the port is taken, or the host is not an address of this machine.
    """
    # The import takes 77 ms; only servers with metrics pay them.
    from prometheus_client import CollectorRegistry, start_http_server
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    class Collector:
        """Converts the counters to metrics at each scrape."""

        def collect(self) -> Iterator[Metric]:
            for name, value in counters().items():
                yield CounterMetricFamily(f"kvcore_{name}", _words(name), value=value)
            use = l1()
            for name in use.__struct_fields__:
                value = getattr(use, name)
                yield GaugeMetricFamily(f"kvcore_l1_{name}", _words(name), value=value)

    registry = CollectorRegistry()
    registry.register(Collector())
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise SetupError(
            f"cannot serve metrics at {host}:{port}: {error.strerror}"
        ) from None
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _words(name: str) -> str:
    return name.replace("_", " ")
