import pytest
import torch


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA GPU on this machine")
    for item in items:
        if item.get_closest_marker("gpu") and "fastgemm" in item.path.parts:
            item.add_marker(skip)


@pytest.fixture
def rng():
    """A seeded generator on the CPU."""
    return torch.Generator().manual_seed(1234)
