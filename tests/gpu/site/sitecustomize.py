"""Start-up code of every Python process of `make gpu`, including servers and workers.

On SIGUSR1 a process writes its threads' stacks. Over the stub of the driver, torch has
a GPU.
"""

import faulthandler
import os
import signal
import sys

faulthandler.enable()
if "STACKS" in os.environ:
    _stacks = open(f"{os.environ['STACKS']}/{os.getpid()}", "w")  # noqa: SIM115
    _stacks.write(" ".join(sys.orig_argv) + "\n")
    _stacks.flush()
    faulthandler.register(signal.SIGUSR1, _stacks, all_threads=True)
if "TORCH_OVER_STUB" in os.environ:
    import torch_over_stub  # noqa: F401
