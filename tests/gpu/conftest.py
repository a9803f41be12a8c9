"""A GPU, or the stub of a driver that `.ci/stub` puts in its place."""

from __future__ import annotations

import pytest

from kvcore.errors import SetupError


def open_devices() -> tuple:
    """Open the devices of this process, once the tests are known to be wanted."""
    from kvcore.transport.cuda.driver import open_devices

    return open_devices()


@pytest.fixture(scope="session")
def devices() -> tuple:
    """Every GPU there is."""
    try:
        return open_devices()
    except SetupError as error:
        pytest.skip(error.message)


@pytest.fixture
def device(devices: tuple) -> object:
    """The first GPU."""
    return devices[0]
