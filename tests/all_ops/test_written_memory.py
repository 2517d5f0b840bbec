"""An op that writes an argument reads the others as they were before, also where they share its memory."""

import pytest
import torch

from tests.common.ops import CASES, OpCase, every

pytestmark = pytest.mark.usefixtures("deterministic")


@every(case for case in CASES if case.written)
def test_arguments_that_share_memory_with_what_is_written(case: OpCase, device: torch.device) -> None:
    num_tried = 0
    for written in case.written:
        for name in case.tensors(floating=True):
            target, tensor = case.example[written], case.example[name]
            fits = tensor.dtype == target.dtype and tensor.numel() <= target.numel()
            if name in case.written or not fits or not target.is_contiguous():
                continue
            num_tried += 1
            results = []
            for is_shared in (True, False):
                inputs = case.inputs(torch.float32, device)
                rows = inputs[written].as_strided(
                    inputs[name].shape, inputs[name].contiguous().stride(), inputs[written].storage_offset()
                )
                inputs[name] = rows if is_shared else rows.clone()
                results.append(case.run(inputs))
            for result in case.written:
                assert torch.equal(results[0][result], results[1][result]), f"{name} in the memory of {written}"
    assert num_tried > 0 or not case.tensors(floating=True)
