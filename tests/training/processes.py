"""Forked processes, for tests of killed runs and of workers that share files."""

import os
import threading
import traceback
from collections.abc import Callable

import torch
from tqdm import tqdm


def start_process(task: Callable[[], object]) -> int:
    """Starts a task in a forked process and returns its id.

    The process has one thread, because OpenMP's other threads do not survive a fork. It has a lock of its own for
    progress bars, because the one that forked processes share stays locked if it is killed while it writes.
    """
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            tqdm.set_lock(threading.RLock())
            task()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return child


def wait_for(child: int) -> int:
    """Waits for a process and returns its exit code, or minus the number of the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_in_child(task: Callable[[], object]) -> int:
    """Runs a task in a forked process to its end; returns as ``wait_for``."""
    return wait_for(start_process(task))
