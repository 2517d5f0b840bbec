"""Dense layers by torch's ring attention beside block attention in one model, over all GPUs there are.

Torch 2.13 has no rule of its ring attention for the CPU (``mesh_worker.py`` notices when it gets one). What can run
there, both contexts around each other and torch's flexible attention forward, is tested by ``mesh_worker.py``.
"""

import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel

import topgather as tg
import topgather.distributed as tgd
from tests.common.devices import is_available

NUM_TOKENS = 128


def attend(x: Tensor, moba: bool) -> Tensor:
    """A dense layer, and one by blocks if ``moba``: ``[B, H, N, D]``."""
    x = x + F.scaled_dot_product_attention(x, x, x, is_causal=True)
    return x + tg.moba_attention(x, x, x, 8, 3) if moba else x


def run_rank(rank: int, num_ranks: int, folder: Path) -> None:
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    store = dist.FileStore(str(folder / "store"), num_ranks)
    dist.init_process_group("nccl", store=store, rank=rank, world_size=num_ranks, device_id=device)
    mesh = init_device_mesh("cuda", (num_ranks,), mesh_dim_names=("cp",))["cp"]
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, NUM_TOKENS, 16, generator=generator).to(device)
    whole = x.clone().requires_grad_()
    expected = attend(whole, moba=True)
    expected.sum().backward()
    kept = [x.clone()]
    try:
        with context_parallel(mesh, buffers=kept, buffer_seq_dims=[2]), tgd.context_parallel(mesh):
            leaf = kept[0].detach().clone().requires_grad_()
            hidden = attend(leaf, moba=False)
            found = hidden + tgd.moba_attention(hidden, hidden, hidden, mesh, 8, 3, placement="zigzag")
            found.sum().backward()
        for actual, wanted in ((found.detach(), expected.detach()), (leaf.grad, whole.grad)):
            assert wanted is not None
            cut = tgd.shard_sequence(wanted, mesh, 2, "zigzag")
            torch.testing.assert_close(actual, cut, atol=1e-3, rtol=1e-3)
        assert torch.equal(kept[0], x)
        (folder / f"rank{rank}").write_text("fine")
    except Exception:
        (folder / f"rank{rank}").write_text(traceback.format_exc())
    dist.destroy_process_group()


@pytest.mark.skipif(
    not is_available("cuda"), reason="torch's ring attention has no rule for scaled_dot_product_attention on the CPU"
)
def test_dense_layers_beside(tmp_path: Path) -> None:
    num_ranks = torch.cuda.device_count()
    torch.multiprocessing.spawn(run_rank, (num_ranks, tmp_path), num_ranks)
    for rank in range(num_ranks):
        assert (tmp_path / f"rank{rank}").read_text() == "fine"
