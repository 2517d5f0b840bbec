"""What several files of this folder's tests take."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from topgather._common import cuda as _cuda


@pytest.fixture
def native(cuda_device: torch.device) -> Iterator[Any]:
    """The module that holds the kernels, its budget for waves put back."""
    module = _cuda.native_module()
    before = module.moba_cuda_set_budget(0)
    module.moba_cuda_set_budget(before)
    yield module
    module.moba_cuda_set_budget(before)
