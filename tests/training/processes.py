"""Forked processes, for tests of runs that are killed and of workers that share a table."""

import os
from collections.abc import Callable

import torch


def start(task: Callable[[], object]) -> int:
    """Starts a task in a forked process of one thread (OpenMP's others do not survive a fork); gives its number."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            task()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return child


def wait(child: int) -> int:
    """Its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def in_child(task: Callable[[], object]) -> int:
    """Runs a task in a process of its own, to its end; gives ``wait``'s number."""
    return wait(start(task))
