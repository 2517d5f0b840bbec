// Every intrinsic and every line of inline assembly of the CUDA kernels.
//
// Under nvcc each primitive is PTX. Under a host compiler the same names come from emulated_primitives.h, which runs
// them on the CPU (tests/emulation). Kernels are written against this list and hold no assembly of their own.
//
// Warp-wide primitives (load_matrix_x4*, multiply_accumulate) must be reached by all 32 lanes together.
#pragma once

#include "../common/dtype.h"

#if !defined(__CUDACC__)

#include "emulated_primitives.h"

#else

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#define TOPGATHER_PRIMITIVE __device__ __forceinline__

namespace topgather::cuda {

template <typename Element>
constexpr bool kIsBFloat16 = std::is_same_v<Element, BFloat16>;
template <typename Element>
constexpr bool kIsFloat16 = std::is_same_v<Element, Float16>;

// --- shared memory --------------------------------------------------------------------------------------------------

// The block's dynamic shared memory, 1024-byte aligned. The only shared memory there is.
TOPGATHER_PRIMITIVE unsigned char* dynamic_shared_memory() {
  extern __shared__ __align__(1024) unsigned char topgather_dynamic_shared_memory[];
  return topgather_dynamic_shared_memory;
}

TOPGATHER_PRIMITIVE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// --- asynchronous copies, global to shared --------------------------------------------------------------------------

// Starts a copy of 16 bytes, both addresses 16-byte aligned. Not copied: writes zeros and does not touch `global`.
TOPGATHER_PRIMITIVE void copy_async_16(void* shared, const void* global, bool is_copied) {
  const int source_bytes = is_copied ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(source_bytes)
               : "memory");
}

// The same of 4 bytes, both addresses 4-byte aligned.
TOPGATHER_PRIMITIVE void copy_async_4(void* shared, const void* global, bool is_copied) {
  const int source_bytes = is_copied ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(source_bytes)
               : "memory");
}

// Closes the group of this thread's copies since the last commit.
TOPGATHER_PRIMITIVE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's groups are still under way. Other threads need a barrier after it.
template <int kPending>
TOPGATHER_PRIMITIVE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// --- threads --------------------------------------------------------------------------------------------------------

// threadIdx.x, read where it stands: what is made of it does not take registers all through a loop around it.
TOPGATHER_PRIMITIVE int thread_index_here() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// --- matrix unit ----------------------------------------------------------------------------------------------------

// A row that a matrix load reads, as the hardware addresses it.
struct SharedRow {
  uint32_t address;
};
TOPGATHER_PRIMITIVE SharedRow shared_row(const void* shared) { return {shared_address(shared)}; }
// The row whose address differs in the bits of `exchanged` and is `further` bytes on.
TOPGATHER_PRIMITIVE SharedRow moved(SharedRow row, uint32_t exchanged, uint32_t further) {
  return {(row.address ^ exchanged) + further};
}

// The same, as an instruction that the compiler leaves where it is.
TOPGATHER_PRIMITIVE SharedRow moved_here(SharedRow row, uint32_t exchanged, uint32_t further) {
  uint32_t address = row.address;
  if (exchanged != 0) asm volatile("xor.b32 %0, %1, %2;" : "=r"(address) : "r"(row.address), "r"(exchanged));
  return {address + further};
}

// Four 8x8 matrices of 16-bit elements: lane 8 * m + r names row r of matrix m (16 bytes, 16-byte aligned). Lane l gets
// elements 2 * (l % 4) and the next of row l / 4 of every matrix.
TOPGATHER_PRIMITIVE void load_matrix_x4(uint32_t (&r)[4], SharedRow row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row.address)
               : "memory");
}
TOPGATHER_PRIMITIVE void load_matrix_x4(uint32_t (&r)[4], const void* shared) { load_matrix_x4(r, shared_row(shared)); }

// The same of the transposed matrices: lane l gets column l / 4 of rows 2 * (l % 4) and the next.
TOPGATHER_PRIMITIVE void load_matrix_x4_transposed(uint32_t (&r)[4], SharedRow row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row.address)
               : "memory");
}
TOPGATHER_PRIMITIVE void load_matrix_x4_transposed(uint32_t (&r)[4], const void* shared) {
  load_matrix_x4_transposed(r, shared_row(shared));
}

// d += a * b with a [16, 16] in rows, b [16, 8] in columns, d [16, 8] float32. With g = lane / 4 and t = lane % 4:
//   a[0], a[1]: rows g and g + 8, columns 2t, 2t + 1; a[2], a[3]: the same rows, columns 2t + 8, 2t + 9
//   b0, b1:     column g, rows 2t, 2t + 1 and 2t + 8, 2t + 9
//   d:          (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
template <typename Element>
TOPGATHER_PRIMITIVE void multiply_accumulate(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(kIsBFloat16<Element> || kIsFloat16<Element>);
  if constexpr (kIsBFloat16<Element>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// --- conversions ----------------------------------------------------------------------------------------------------

// Two floats to 16-bit elements, to nearest, ties to even; `low` in bits 0..15.
template <typename Element>
TOPGATHER_PRIMITIVE uint32_t pack2(float low, float high) {
  static_assert(kIsBFloat16<Element> || kIsFloat16<Element>);
  uint32_t packed;
  if constexpr (kIsBFloat16<Element>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

TOPGATHER_PRIMITIVE float to_float(float value) { return value; }
TOPGATHER_PRIMITIVE float to_float(BFloat16 value) { return __uint_as_float(static_cast<uint32_t>(value.bits) << 16); }
TOPGATHER_PRIMITIVE float to_float(Float16 value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}

template <typename Element>
TOPGATHER_PRIMITIVE float2 unpack2(uint32_t packed) {
  return make_float2(to_float(Element{static_cast<uint16_t>(packed & 0xffffu)}),
                     to_float(Element{static_cast<uint16_t>(packed >> 16)}));
}

// To nearest, ties to even.
template <typename Element>
TOPGATHER_PRIMITIVE Element from_float(float value) {
  Element result;
  if constexpr (kIsBFloat16<Element>) {
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  } else if constexpr (kIsFloat16<Element>) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  } else {
    result = value;
  }
  return result;
}

// --- arithmetic -----------------------------------------------------------------------------------------------------

// 2^x to about 2 ulp; subnormal arguments and results count as zero.
TOPGATHER_PRIMITIVE float exp2_approximate(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// 1 / x to 1 ulp; subnormal arguments and results count as zero.
TOPGATHER_PRIMITIVE float reciprocal_approximate(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// The larger one, NaN if either is NaN (fmaxf would drop the NaN).
TOPGATHER_PRIMITIVE float max_or_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// --- atomics on global memory: relaxed, nothing returned; subnormal floats, added or summed, are zeros ---------------

TOPGATHER_PRIMITIVE void add_atomic(float* address, float value) {
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(address), "f"(value) : "memory");
}

// The two that follow differ between architectures. Code that is read once for all of them has neither: see
// READ_FOR_HOPPER in CMakeLists.txt.
#ifndef TOPGATHER_READ_ONCE
// 8-byte aligned.
TOPGATHER_PRIMITIVE void add_atomic_pair(float* address, float2 value) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1,%2};" ::"l"(address), "f"(value.x), "f"(value.y)
               : "memory");
#else
  add_atomic(address, value.x);
  add_atomic(address + 1, value.y);
#endif
}

// 16-byte aligned.
TOPGATHER_PRIMITIVE void add_atomic_quad(float* address, float4 value) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(address), "f"(value.x), "f"(value.y),
               "f"(value.z), "f"(value.w)
               : "memory");
#else
  add_atomic(address, value.x);
  add_atomic(address + 1, value.y);
  add_atomic(address + 2, value.z);
  add_atomic(address + 3, value.w);
#endif
}
#endif  // TOPGATHER_READ_ONCE

TOPGATHER_PRIMITIVE void add_atomic(int32_t* address, int32_t value) {
  asm volatile("red.relaxed.gpu.global.add.s32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

TOPGATHER_PRIMITIVE void max_atomic(uint32_t* address, uint32_t value) {
  asm volatile("red.relaxed.gpu.global.max.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

}  // namespace topgather::cuda

#undef TOPGATHER_PRIMITIVE

#endif  // __CUDACC__
