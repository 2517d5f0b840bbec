"""``python -m topgather``: what this build is, what it sees, and whether it agrees with the reference.

``python -m topgather advise`` measures which setting to take: :mod:`topgather.advisor`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import torch

import topgather
from topgather import _native, reference

# Largest error relative to the largest entry: 32 units in the last place of float32 for sums over a few hundred keys;
# for bfloat16 its own rounding of weights and results.
_TOLERANCES = {torch.float32: 32 * 2.0**-23, torch.bfloat16: 4 * 2.0**-8}


def describe() -> None:
    """Print version, build options, instruction sets, CUDA architectures and devices."""
    cuda = (
        f"toolkit {_native.cuda_toolkit()}, architectures {_native.cuda_architectures()}"
        if _native.has_cuda
        else "not in this build"
    )
    rows = [
        ("topgather", topgather.__version__),
        ("torch", torch.__version__),
        ("built with", f"{_native.compiler}, {_native.build_type}"),
        ("instruction set", f"{_native.cpu_target()} (available: {', '.join(_native.available_cpu_targets())})"),
        ("threads", str(torch.get_num_threads())),
        ("CUDA kernels", cuda),
        ("CUDA devices", "; ".join(_native.cuda_devices()) or "none seen"),
    ]
    for name, text in rows:
        print(f"{name:<16} {text}")


def _largest_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


def self_check() -> bool:
    """Compare forward and backward with the float64 reference, per dtype and instruction set, and on CUDA if there is
    a device; True if all agree.
    """
    in_use = _native.cpu_target()
    agrees = True
    started = time.perf_counter()
    try:
        for target in _native.available_cpu_targets():
            _native.set_cpu_target(target)
            for dtype, tolerance in _TOLERANCES.items():
                agrees = _check_and_report(target, dtype, tolerance, torch.device("cpu")) and agrees
    finally:
        _native.set_cpu_target(in_use)
    if _native.has_cuda and torch.cuda.is_available():
        for dtype, tolerance in _TOLERANCES.items():
            name = torch.cuda.get_device_name()
            agrees = _check_and_report(name, dtype, tolerance, torch.device("cuda")) and agrees
    print(f"self-check       {'passed' if agrees else 'FAILED'} in {time.perf_counter() - started:.1f} s")
    return agrees


def _check_and_report(name: str, dtype: torch.dtype, tolerance: float, device: torch.device) -> bool:
    error = _check_once(dtype, device)
    passed = error <= tolerance
    print(
        f"self-check       {name:<9} {str(dtype)[6:]:<9} largest relative error {error:.1e} "
        f"(allowed {tolerance:.1e}) {'ok' if passed else 'FAILED'}"
    )
    return passed


def _check_once(dtype: torch.dtype, device: torch.device) -> float:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device).requires_grad_()

    query, key, value = random(1, 4, 300, 64), random(1, 2, 300, 64), random(1, 2, 300, 48)
    routing = topgather.moba_route(query, key, block_size=64, top_k=3)
    out = topgather.moba_attention(query, key, value, block_size=64, routing=routing)
    grad_out = random(*out.shape).detach()
    grads = torch.autograd.grad(out, (query, key, value), grad_out)
    expected, _ = reference.moba_attention(query, key, value, routing.block_indices, 64, True)
    expected_grads = torch.autograd.grad(expected, (query, key, value), grad_out.double())
    pairs = zip((out, *grads), (expected, *expected_grads), strict=True)
    return max(_largest_error(actual.detach(), wanted.detach().double()) for actual, wanted in pairs)


def main(arguments: Sequence[str] = ()) -> int:
    """Describe, check, and return the exit code; or do what the first of ``arguments`` says."""
    if arguments:
        if arguments[0] == "advise":
            from topgather.advisor import _command

            return _command.run(arguments[1:])
        print(f"usage: python -m topgather [advise ...]; there is no {arguments[0]!r}", file=sys.stderr)
        return 2
    describe()
    return 0 if self_check() else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
