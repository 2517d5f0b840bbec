// The primitives of csrc/cuda/primitives.cuh under a host compiler. Their meaning is described there.
#pragma once

#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "emulation.h"

namespace topgather::cuda {

template <typename Element>
constexpr emulation::ElementKind kElementKind =
    std::is_same_v<Element, BFloat16> ? emulation::ElementKind::kBFloat16 : emulation::ElementKind::kFloat16;

inline unsigned char* dynamic_shared_memory() { return emulation::shared_memory(); }

inline void copy_async_16(void* shared, const void* global, bool is_copied) {
  emulation::copy_async(shared, global, 16, is_copied);
}
inline void copy_async_4(void* shared, const void* global, bool is_copied) {
  emulation::copy_async(shared, global, 4, is_copied);
}
inline void copy_async_commit() { emulation::copy_async_commit(); }
template <int kPending>
inline void copy_async_wait() {
  emulation::copy_async_wait(kPending);
}

inline int thread_index_here() { return static_cast<int>(threadIdx.x); }

struct SharedRow {
  uintptr_t address;
};
inline SharedRow shared_row(const void* shared) { return {reinterpret_cast<uintptr_t>(shared)}; }
inline SharedRow moved(SharedRow row, uint32_t exchanged, uint32_t further) {
  return {(row.address ^ exchanged) + further};
}
inline SharedRow moved_here(SharedRow row, uint32_t exchanged, uint32_t further) {
  return moved(row, exchanged, further);
}
inline void load_matrix_x4(uint32_t (&r)[4], const void* shared) { emulation::load_matrix_x4(r, shared, false); }
inline void load_matrix_x4_transposed(uint32_t (&r)[4], const void* shared) {
  emulation::load_matrix_x4(r, shared, true);
}
inline void load_matrix_x4(uint32_t (&r)[4], SharedRow row) {
  load_matrix_x4(r, reinterpret_cast<const void*>(row.address));
}
inline void load_matrix_x4_transposed(uint32_t (&r)[4], SharedRow row) {
  load_matrix_x4_transposed(r, reinterpret_cast<const void*>(row.address));
}

template <typename Element>
inline void multiply_accumulate(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(std::is_same_v<Element, BFloat16> || std::is_same_v<Element, Float16>);
  emulation::multiply_accumulate(kElementKind<Element>, d, a, b0, b1);
}

inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) { return emulation::float_of(emulation::ElementKind::kBFloat16, value.bits); }
inline float to_float(Float16 value) { return emulation::float_of(emulation::ElementKind::kFloat16, value.bits); }

template <typename Element>
inline Element from_float(float value) {
  if constexpr (std::is_same_v<Element, float>) {
    return value;
  } else {
    return Element{emulation::bits_of(kElementKind<Element>, value)};
  }
}

template <typename Element>
inline uint32_t pack2(float low, float high) {
  return from_float<Element>(low).bits | static_cast<uint32_t>(from_float<Element>(high).bits) << 16;
}
template <typename Element>
inline float2 unpack2(uint32_t packed) {
  return {to_float(Element{static_cast<uint16_t>(packed & 0xffffu)}),
          to_float(Element{static_cast<uint16_t>(packed >> 16)})};
}

inline float without_subnormal(float value) {
  return std::fabs(value) < 0x1p-126f ? std::copysign(0.0f, value) : value;
}
inline float exp2_approximate(float x) { return without_subnormal(std::exp2(without_subnormal(x))); }
inline float reciprocal_approximate(float x) { return without_subnormal(1.0f / without_subnormal(x)); }
inline float max_or_nan(float a, float b) {
  if (std::isnan(a) || std::isnan(b)) return __uint_as_float(0x7fffffffu);
  return std::fmax(a, b);
}

inline void add_atomic(float* address, float value) { emulation::add_atomic(address, &value, 1); }
inline void add_atomic_pair(float* address, float2 value) { emulation::add_atomic(address, &value.x, 2); }
inline void add_atomic_quad(float* address, float4 value) { emulation::add_atomic(address, &value.x, 4); }
inline void add_atomic(int32_t* address, int32_t value) { emulation::add_atomic(address, value); }
inline void max_atomic(uint32_t* address, uint32_t value) { emulation::max_atomic(address, value); }

}  // namespace topgather::cuda
