// Weighted sums of rows of 8 bits, and dot products with them, on the CPU.
//
//   row:     row_i[d] = scales[i, d / group] * values[i, d]      values [rows, W] int8 or e4m3, scales [rows, groups]
//   lookup:  out_t  = sum_k weights_tk * row indices_tk           indices, weights [T, K], out [T, W] float32
//   dot:     out_tk = dot(row indices_tk, x_t)                    x [T, W] float32, out [T, K] float32
//
// Who owns what: tasks and passes are those of the lookup of wide rows, whose walk over rows (memory_lookup_cpu.h) does
// the work here as well. Steps per pass of kRowsPerPass entries:
//   1. ask for the scales of the entries a few passes further on;
//   2. for every group of columns, walk the rows' bytes, converted to float32 in registers. A lookup's scales are
//      multiplied into its weights beforehand, a dot product's into the sum of a group.
// Numerics: float32 throughout; numbers of 8 bits are converted exactly, NaN of e4m3 included. Sums run over k in
// ascending order, a dot product's over groups in ascending order. Nothing depends on how denormals are treated.
// Ragged bags, empty problems, determinism: as in memory_lookup_cpu.h.
#pragma once

#include "memory_lookup_cpu.h"

namespace topgather::TOPGATHER_CPU_TARGET {

struct Int8 {
  int8_t bits;
};
struct Float8 {
  uint8_t bits;
};

inline float to_compute(Int8 value) { return static_cast<float>(value.bits); }

// Sign, 4 bits of exponent with a bias of 7, 3 of mantissa; no infinity, NaN where all bits but the sign are set.
inline float to_compute(Float8 value) {
  const uint32_t magnitude = value.bits & 0x7fu;
  const uint32_t normal = (magnitude << 20) + (120u << 23);
  // 2^-6 (1 + mantissa / 8) less 2^-6: no denormal of float32 takes part.
  const uint32_t denormal = bit_cast<uint32_t>(bit_cast<float>((magnitude << 20) + (121u << 23)) - 0x1p-6f);
  const uint32_t number = magnitude < 8 ? denormal : normal;
  const uint32_t bits = magnitude == 0x7fu ? 0x7fc00000u : number;
  return bit_cast<float>(bits | static_cast<uint32_t>(value.bits & 0x80) << 24);
}

// A vector's lanes of bytes, widened to integers.
template <typename Byte>
inline IntegerVector<float> load_widened(const void* source) {
  typedef Byte Bytes __attribute__((vector_size(kLanes<float>)));
  Bytes bytes;
  std::memcpy(&bytes, source, sizeof(bytes));
  return __builtin_convertvector(bytes, IntegerVector<float>);
}

inline Vector<float> load_vector(const Int8* source) {
  return __builtin_convertvector(load_widened<int8_t>(source), Vector<float>);
}

// to_compute of every lane.
inline Vector<float> load_vector(const Float8* source) {
  using Integers = IntegerVector<float>;
  const Integers bits = load_widened<uint8_t>(source);
  const Integers magnitude = bits & 0x7f;
  const Integers normal = (magnitude << 20) + (120 << 23);
  const Integers denormal = bit_cast<Integers>(bit_cast<Vector<float>>((magnitude << 20) + (121 << 23)) - 0x1p-6f);
  const Integers number = magnitude < 8 ? denormal : normal;
  const Integers nan = magnitude - magnitude + 0x7fc00000;
  return bit_cast<Vector<float>>((magnitude == 0x7f ? nan : number) | (bits & 0x80) << 24);
}

template <typename Storage>
struct ScaledRows {
  const Storage* values;
  int64_t stride;
  const float* scales;
  int64_t scale_stride;
  int64_t group_size;
  int64_t num_groups;
  const int64_t* indices;
  int64_t last_entry;  // nothing past it is prefetched

  ScaledRows(const QuantizedRows& rows, const int64_t* entry_indices, int64_t last)
      : values(reinterpret_cast<const Storage*>(rows.values.data)),
        stride(rows.values.strides[0]),
        scales(rows.scales.data),
        scale_stride(rows.scales.strides[0]),
        group_size(rows.group_size),
        num_groups(rows.scales.sizes[1]),
        indices(entry_indices),
        last_entry(last) {}

  float scale(int64_t entry, int64_t group) const { return scales[indices[entry] * scale_stride + group]; }

  // The entries from `entry` on, as entries of a table that is this group of columns.
  EntryRows<Storage> group_from(int64_t entry, int64_t group) const {
    return {values + group * group_size, stride, indices + entry, last_entry - entry};
  }

  // Step 1. Groups narrower than a cache line are walked without prefetches of their own.
  template <int kRows>
  void prefetch(int64_t entry) const {
    constexpr int64_t kAhead = MemoryLookupConfig::kPrefetchEntries;
    for (int i = 0; i < kRows; ++i) {
      const int64_t far = indices[min64(entry + i + 2 * kAhead, last_entry)];
      for (int64_t group = 0; group < num_groups; group += 16) __builtin_prefetch(scales + far * scale_stride + group);
      if (group_size >= kLineElements<Storage>) continue;
      const Storage* row = values + indices[min64(entry + i + kAhead, last_entry)] * stride;
      for (int64_t d = 0; d < group_size * num_groups; d += kLineElements<Storage>) __builtin_prefetch(row + d);
    }
  }
};

template <int kRows, typename Storage>
inline void add_scaled_rows(const ScaledRows<Storage>& table, const float* weights, int64_t entry, float* sums) {
  table.template prefetch<kRows>(entry);
  for (int64_t group = 0; group < table.num_groups; ++group) {
    float factors[kRows];
    for (int i = 0; i < kRows; ++i) factors[i] = weights[entry + i] * table.scale(entry + i, group);
    add_weighted_rows<false, kRows>(table.group_from(entry, group), factors, 0, table.group_size,
                                    sums + group * table.group_size);
  }
}

template <int kRows, typename Storage>
inline void dot_scaled_rows(const ScaledRows<Storage>& table, const float* x, int64_t entry, float* out) {
  table.template prefetch<kRows>(entry);
  float dots[kRows] = {};
  for (int64_t group = 0; group < table.num_groups; ++group) {
    float of_group[kRows];
    dot_rows<kRows>(table.group_from(entry, group), x + group * table.group_size, 0, table.group_size, of_group);
    for (int i = 0; i < kRows; ++i) dots[i] += table.scale(entry + i, group) * of_group[i];
  }
  for (int i = 0; i < kRows; ++i) out[entry + i] = dots[i];
}

template <typename Storage>
void memory_lookup_quantized(const QuantizedLookupParams& params) {
  constexpr int kRowsPerPass = MemoryLookupConfig::kRowsPerPass;
  const MemoryProblem& problem = params.problem;
  const int64_t row_dim = problem.row_dim, bag_size = problem.bag_size;
  const int64_t* offsets = params.offsets.data;
  if (row_dim == 0) return;
  const auto first_entry = [&](int64_t token) { return offsets == nullptr ? token * bag_size : offsets[token]; };
  for_each_token_range<float>(problem, [&](int64_t first_token, int64_t last_token, float*) {
    const ScaledRows<Storage> table(params.rows, params.indices.data, first_entry(last_token) - 1);
    for (int64_t token = first_token; token < last_token; ++token) {
      float* out = params.out.at<float>(token);
      for (int64_t d = 0; d < row_dim; ++d) out[d] = 0;
      const int64_t last = first_entry(token + 1);
      int64_t entry = first_entry(token);
      for (; entry + kRowsPerPass <= last; entry += kRowsPerPass) {
        add_scaled_rows<kRowsPerPass>(table, params.weights.data, entry, out);
      }
      for (; entry < last; ++entry) add_scaled_rows<1>(table, params.weights.data, entry, out);
    }
  });
}

template <typename Storage>
void memory_dot_quantized(const QuantizedDotParams& params) {
  constexpr int kRowsPerPass = MemoryLookupConfig::kRowsPerPass;
  const MemoryProblem& problem = params.problem;
  const int64_t row_dim = problem.row_dim, bag_size = problem.bag_size;
  const int32_t* tokens = params.tokens.data;
  float* out = params.out.data;
  if (row_dim == 0) {  // there may be no memory behind rows
    for (int64_t entry = 0; entry < problem.num_entries; ++entry) out[entry] = 0;
    return;
  }
  for_each_token_range<float>(problem, [&](int64_t first_token, int64_t last_token, float*) {
    const int64_t last_entry = last_token * bag_size;
    const ScaledRows<Storage> table(params.rows, params.indices.data, last_entry - 1);
    for (int64_t entry = first_token * bag_size, last = entry; entry < last_entry; entry = last) {
      int64_t row_of_x = 0;
      if (tokens == nullptr) {
        row_of_x = entry / bag_size;
        last += bag_size;
      } else {
        row_of_x = tokens[entry];
        while (last < last_entry && tokens[last] == row_of_x) ++last;
      }
      if (row_of_x < 0) {
        for (; entry < last; ++entry) out[entry] = 0;
        continue;
      }
      const float* x = params.x.at<float>(row_of_x);
      for (; entry + kRowsPerPass <= last; entry += kRowsPerPass) {
        dot_scaled_rows<kRowsPerPass>(table, x, entry, out);
      }
      for (; entry < last; ++entry) dot_scaled_rows<1>(table, x, entry, out);
    }
  });
}

}  // namespace topgather::TOPGATHER_CPU_TARGET
