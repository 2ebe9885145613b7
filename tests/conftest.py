import os

os.environ["OMP_NUM_THREADS"] = "1"  # tests run in parallel processes; set before torch is imported, also for scripts

import pytest
import torch
from hypothesis import settings

settings.register_profile("tests", derandomize=True, deadline=None)  # the same examples in every run, on any machine
settings.load_profile("tests")


@pytest.fixture(autouse=True)
def seed_torch() -> None:
    """Gives each test the same random numbers in every run and in every order."""
    torch.manual_seed(0)
