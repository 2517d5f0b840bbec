"""No CUDA source waits for the device: looked for in the text, since without a GPU nothing else shows it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEVICE_SOURCES = [
    *sorted((ROOT / "csrc").rglob("*_cuda*")),
    *sorted((ROOT / "csrc" / "cuda").glob("*")),
    *sorted((ROOT / "python" / "topgather" / "ops").glob("*_cuda.py")),
]
WAITS = re.compile(
    r"\.(item|cpu|tolist|numpy|nonzero|synchronize|is_nonzero)\(|"
    r"cuda(Stream|Device|Event|Thread)Synchronize|cudaMemcpy|cudaStreamWaitValue|cudaMalloc|cudaFree|"
    r"\.to\(\s*[\"']cpu"
)


@pytest.mark.parametrize("path", DEVICE_SOURCES, ids=lambda path: path.name)
def test_no_source_waits_for_the_device(path: Path) -> None:
    """Neither waits nor copies to the host nor allocates, which would wait too."""
    found = WAITS.search(path.read_text())
    assert found is None, f"{path.name}: {found.group() if found else ''}"


def test_the_search_for_waits_finds_them() -> None:
    assert len(DEVICE_SOURCES) > 15 and any(path.name == "moba_forward_cuda.cu" for path in DEVICE_SOURCES)
    for line in (
        "if boundaries[0].item() != 0:",
        "x.cpu()",
        "lengths = cu_seqlens.tolist()",
        'x = x.to("cpu")',
        "cudaStreamSynchronize(stream);",
        "cudaDeviceSynchronize();",
        "cudaMemcpy(host, device, 4, cudaMemcpyDeviceToHost);",
        "cudaMemcpyAsync(host, device, 4, cudaMemcpyDeviceToHost, stream);",
        "cudaMalloc(&memory, bytes);",
    ):
        assert WAITS.search(line), line
    for line in (
        "item.num_entries",
        "find_work_item(geometry)",
        "tensor.to(torch.int64)",
        "cudaMemsetAsync(p, 0, 4, s)",
    ):
        assert not WAITS.search(line), line
