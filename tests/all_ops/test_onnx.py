"""What ``torch.onnx.export`` says of every op."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import export

from tests.common.ops import PUBLIC, OpCase, every


class Call(nn.Module):
    """A call of an op as a module."""

    def __init__(self, case: OpCase, inputs: dict[str, Any]) -> None:
        super().__init__()
        self.case, self.inputs = case, inputs

    def forward(self, *tensors: Tensor) -> Any:
        names = [name for name, value in self.inputs.items() if isinstance(value, Tensor)]
        return self.case.run({**self.inputs, **dict(zip(names, tensors, strict=True))})


@every(case for case in PUBLIC if "cache" not in case.example)
def test_onnx_is_refused_in_words(case: OpCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``torch.onnx.export`` asks for the graph; the package that it writes ONNX with need not be there."""
    inputs = case.inputs(torch.float32, torch.device("cpu"))
    tensors = tuple(value for value in inputs.values() if isinstance(value, Tensor))
    call = Call(case, inputs)
    export(call, tensors)
    monkeypatch.setattr("torch.onnx.is_in_onnx_export", lambda: True)
    for strict in (False, True):
        with pytest.raises(Exception, match=r"topgather: \w+ cannot be exported to ONNX.*torch.export.export"):
            export(call, tensors, strict=strict)
