import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    # raised inside torch when forward-mode derivatives are used for the first time
    torch_itself = "ignore:`torch.jit.script` is:DeprecationWarning"
    config.addinivalue_line("filterwarnings", torch_itself)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "slow" not in item.keywords)  # else one core waits for the last
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
