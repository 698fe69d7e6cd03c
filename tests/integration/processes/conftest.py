import pytest
from workers import Two


@pytest.fixture(scope="session")
def two(tmp_path_factory):
    """Run a function of a test module in two processes; returns what each returned."""
    processes = Two(tmp_path_factory.mktemp("two"))
    yield processes
    processes.close()
