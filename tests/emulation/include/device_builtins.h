// What CUDA kernels use without including anything: indices, barriers, warp intrinsics, bit casts, minimum and maximum.
// Part of cuda_runtime_api.h.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "emulation.h"

// Constant to a kernel as on a device: a thread never sees them change. The runtime knows the same objects as variables
// and sets them whenever it switches threads.
extern const uint3 threadIdx asm("topgather_emulation_thread_idx");
extern const uint3 blockIdx asm("topgather_emulation_block_idx");
extern const dim3 blockDim asm("topgather_emulation_block_dim");
extern const dim3 gridDim asm("topgather_emulation_grid_dim");
constexpr int warpSize = 32;

// --- barriers -------------------------------------------------------------------------------------------------------

inline void __syncthreads() { topgather::emulation::sync_threads(false); }
inline int __syncthreads_or(int predicate) { return topgather::emulation::sync_threads(predicate != 0); }
inline void __syncwarp(unsigned int mask = 0xffffffffu) { topgather::emulation::sync_warp(mask); }

// --- warp intrinsics, of 4-byte values ------------------------------------------------------------------------------

namespace topgather::emulation {
template <ShuffleKind kKind, typename Value>
inline Value shuffle_value(unsigned int mask, Value value, int operand, int width) {
  static_assert(sizeof(Value) == 4, "shuffles move 4-byte values only");
  return std::bit_cast<Value>(shuffle(kKind, mask, std::bit_cast<uint32_t>(value), operand, width));
}
}  // namespace topgather::emulation

template <typename Value>
inline Value __shfl_sync(unsigned int mask, Value value, int source_lane, int width = 32) {
  return topgather::emulation::shuffle_value<topgather::emulation::ShuffleKind::kIndex>(mask, value, source_lane,
                                                                                        width);
}
template <typename Value>
inline Value __shfl_xor_sync(unsigned int mask, Value value, int lane_mask, int width = 32) {
  return topgather::emulation::shuffle_value<topgather::emulation::ShuffleKind::kXor>(mask, value, lane_mask, width);
}
template <typename Value>
inline Value __shfl_up_sync(unsigned int mask, Value value, unsigned int delta, int width = 32) {
  return topgather::emulation::shuffle_value<topgather::emulation::ShuffleKind::kUp>(mask, value,
                                                                                     static_cast<int>(delta), width);
}
template <typename Value>
inline Value __shfl_down_sync(unsigned int mask, Value value, unsigned int delta, int width = 32) {
  return topgather::emulation::shuffle_value<topgather::emulation::ShuffleKind::kDown>(mask, value,
                                                                                       static_cast<int>(delta), width);
}
inline unsigned int __ballot_sync(unsigned int mask, int predicate) {
  return topgather::emulation::ballot(mask, predicate != 0);
}
inline int __any_sync(unsigned int mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned int mask, int predicate) { return __ballot_sync(mask, predicate == 0) == 0; }

// --- bits -----------------------------------------------------------------------------------------------------------

inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline unsigned int __float_as_uint(float value) { return std::bit_cast<unsigned int>(value); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline float __uint_as_float(unsigned int bits) { return std::bit_cast<float>(bits); }
inline int __popc(unsigned int bits) { return std::popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return std::countl_zero(static_cast<unsigned int>(bits)); }

// --- arithmetic -----------------------------------------------------------------------------------------------------

// A product that is never part of a fused multiply-add.
inline float __fmul_rn(float a, float b) {
  float product = a * b;
  asm("" : "+m"(product));
  return product;
}

// --- minimum and maximum --------------------------------------------------------------------------------------------

#define TOPGATHER_MIN_MAX(Type)                                \
  constexpr Type min(Type a, Type b) { return b < a ? b : a; } \
  constexpr Type max(Type a, Type b) { return a < b ? b : a; }
TOPGATHER_MIN_MAX(int)
TOPGATHER_MIN_MAX(unsigned int)
TOPGATHER_MIN_MAX(long)
TOPGATHER_MIN_MAX(unsigned long)
TOPGATHER_MIN_MAX(long long)
TOPGATHER_MIN_MAX(unsigned long long)
#undef TOPGATHER_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

using std::isinf;
using std::isnan;
