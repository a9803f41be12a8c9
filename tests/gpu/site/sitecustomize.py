"""What every Python of `make gpu` starts with, its servers and workers included.

On SIGUSR1 each tells where its threads are. Over the stub of a driver, torch has a GPU.
"""

import faulthandler
import os
import signal
import sys

faulthandler.enable()
if "STACKS" in os.environ:
    _told = open(f"{os.environ['STACKS']}/{os.getpid()}", "w")  # noqa: SIM115
    _told.write(" ".join(sys.orig_argv) + "\n")
    _told.flush()
    faulthandler.register(signal.SIGUSR1, _told, all_threads=True)
if "TORCH_OVER_STUB" in os.environ:
    import torch_over_stub  # noqa: F401
