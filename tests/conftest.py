import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    # raised inside torch when forward-mode derivatives are used for the first time
    torch_itself = "ignore:`torch.jit.script` is:DeprecationWarning"
    config.addinivalue_line("filterwarnings", torch_itself)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # each worker of pytest-xdist begins with its part of the slow tests, and quick ones can be
    # taken over by another at the end; else one core waits for the other's last
    slow = [item for item in items if "slow" in item.keywords]
    quick = [item for item in items if "slow" not in item.keywords]
    n = getattr(config, "workerinput", {}).get("workercount", 1)
    size = -(-len(quick) // n)
    items[:] = [item for k in range(n) for item in (*slow[k::n], *quick[k * size : (k + 1) * size])]
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
