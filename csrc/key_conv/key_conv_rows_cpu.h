// Rows of keys as the CPU kernels walk them: panels of channels, stretches of a sequence, tiles, the taps' arithmetic.
#pragma once

#include "../cpu/convert.h"
#include "../cpu/math.h"
#include "key_conv_config.h"
#include "key_conv_params.h"

namespace topgather::TOPGATHER_CPU_TARGET {

template <typename Storage>
inline const Storage* row_of(const ConstKeys& keys, int64_t batch_idx, int64_t head_idx, int64_t row) {
  return static_cast<const Storage*>(keys.data) + batch_idx * keys.batch_stride + head_idx * keys.head_stride +
         row * keys.row_stride;
}

template <typename Storage>
inline Storage* row_of(const MutableKeys& keys, int64_t batch_idx, int64_t head_idx, int64_t row) {
  return static_cast<Storage*>(keys.data) + batch_idx * keys.batch_stride + head_idx * keys.head_stride +
         row * keys.row_stride;
}

// As many 16-bit numbers as Vector<float> has lanes.
typedef uint16_t HalfVector __attribute__((vector_size(kVectorBytes / 2)));

// The numbers of one vector, converted as load_row and store_row do, without leaving registers.
template <typename Storage>
inline Vector<ComputeOf<Storage>> widen(const Storage* source) {
  if constexpr (sizeof(Storage) == 2) {
#if defined(__AVX512F__)
    const IntegerVector<float> bits = widen_integers(source);
#else
    HalfVector halves;
    std::memcpy(&halves, source, sizeof(halves));
    const IntegerVector<float> bits = __builtin_convertvector(halves, IntegerVector<float>);
#endif
    if constexpr (std::is_same_v<Storage, BFloat16>) return bit_cast<Vector<float>>(bits << 16);
    const IntegerVector<float> magnitude = (bits & 0x7fff) << 13;
    // Multiplying by 2^112 moves the exponent's bias and makes denormals normal in one step.
    const auto finite = bit_cast<IntegerVector<float>>(bit_cast<Vector<float>>(magnitude) * 0x1p112f);
    const IntegerVector<float> number = (bits & 0x7c00) == 0x7c00 ? (magnitude | 0x7f800000) : finite;
    return bit_cast<Vector<float>>(number | (bits & 0x8000) << 16);
  } else {
    return load<Storage>(source);
  }
}

template <typename Storage>
inline void narrow(const Vector<ComputeOf<Storage>>& vector, Storage* target) {
  if constexpr (std::is_same_v<Storage, ComputeOf<Storage>>) {
    store<Storage>(target, vector);
  } else {
    const auto bits = bit_cast<IntegerVector<float>>(vector);
    IntegerVector<float> result;
    if constexpr (std::is_same_v<Storage, BFloat16>) {
      // Of a NaN, whose lower half is 0 here (load_taps sees to it), rounding leaves a NaN.
      result = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    } else {
      const IntegerVector<float> magnitude = bits & 0x7fffffff;
      const IntegerVector<float> normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112 << 23)) >> 13;
      // Adding 1/2 puts a value below 2^-14 on float16's denormal grid, rounded to nearest even.
      const auto denormal = bit_cast<IntegerVector<float>>(bit_cast<Vector<float>>(magnitude) + 0.5f) - 0x3f000000;
      const IntegerVector<float> finite = magnitude < 0x38800000 ? denormal : normal;
      const IntegerVector<float> overflow =
          magnitude > 0x7f800000 ? IntegerVector<float>{} + 0x7e00 : IntegerVector<float>{} + 0x7c00;
      result = (magnitude >= 0x47800000 ? overflow : finite) | (bits >> 16 & 0x8000);
    }
    const auto halves = __builtin_convertvector(result, HalfVector);
    std::memcpy(target, &halves, sizeof(halves));
  }
}

template <typename Storage>
inline void widen_row(const Storage* source, int64_t count, ComputeOf<Storage>* target) {
  constexpr int64_t kWidth = kLanes<ComputeOf<Storage>>;
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store<ComputeOf<Storage>>(target + i, widen(source + i));
  load_row(source + i, count - i, target + i);
}

// How a problem is cut, by shapes alone. A panel is one head, or several whose channels follow one another in all rows:
// a convolution per channel does not care where a head ends.
struct KeyConvCut {
  int64_t heads_per_panel;
  int64_t num_panels;
  int64_t tokens_per_chunk;
  int64_t num_chunks;  // of a batch entry's tokens
  int64_t tile_tokens;

  KeyConvCut(const KeyConvProblem& problem, bool are_heads_neighbours) {
    const int64_t dim = problem.head_dim;
    const int64_t most_heads = are_heads_neighbours ? max64(1, KeyConvConfig::kPanelChannels / dim) : 1;
    heads_per_panel = min64(most_heads, problem.num_heads);
    num_panels = ceil_div(problem.num_heads, heads_per_panel);
    const int64_t channels = heads_per_panel * dim;
    tokens_per_chunk = max64(KeyConvConfig::kLeastTaskTokens, KeyConvConfig::kTaskNumbers / channels);
    num_chunks = ceil_div(problem.num_tokens, tokens_per_chunk);
    tile_tokens = max64(KeyConvConfig::kLeastTileTokens, KeyConvConfig::kTileNumbers / channels);
  }
};

// Channels of some heads.
struct Panel {
  int64_t first_head;
  int64_t num_heads;
  int64_t channels;
  int64_t padded_channels;  // a whole number of vectors, the row of a tile

  template <typename T>
  static Panel at(const KeyConvProblem& problem, const KeyConvCut& cut, int64_t panel_idx) {
    const int64_t first = panel_idx * cut.heads_per_panel;
    const int64_t heads = min64(cut.heads_per_panel, problem.num_heads - first);
    const int64_t channels = heads * problem.head_dim;
    return {first, heads, channels, round_up(channels, kLanes<T>)};
  }
};

// Consecutive tokens of one sequence.
struct Stretch {
  int64_t sequence_start;  // rows of the tensors
  int64_t sequence_end;
  int64_t first;
  int64_t last;
};

// Visits the stretches of rows [first, last).
template <typename Visit>
inline void for_each_stretch(const KeyConvProblem& problem, int64_t first, int64_t last, const Visit& visit) {
  if (problem.cu_seqlens == nullptr) {
    visit(Stretch{0, problem.num_tokens, first, last});
    return;
  }
  const int64_t* starts = problem.cu_seqlens;
  int64_t low = 0, high = problem.num_sequences;  // starts[low] <= first < starts[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (starts[middle] <= first) {
      low = middle;
    } else {
      high = middle;
    }
  }
  for (int64_t i = low; i < problem.num_sequences && starts[i] < last; ++i) {
    const Stretch stretch{starts[i], starts[i + 1], max64(first, starts[i]), min64(last, starts[i + 1])};
    if (stretch.first < stretch.last) visit(stretch);
  }
}

// taps[l * padded_channels + c] multiplies channel c of the key l tokens back; what pads is 0. All NaN become the one
// whose payload is 0, so that those of 16-bit keys are the only others that a sum can be.
template <typename T>
inline void load_taps(const KeyConvProblem& problem, const Panel& panel, const void* weight, T* taps) {
  const int64_t width = problem.kernel_width;
  const T* source = static_cast<const T*>(weight) + panel.first_head * problem.head_dim * width;
  for (int64_t l = 0; l < width; ++l) {
    T* row = taps + l * panel.padded_channels;
    for (int64_t c = 0; c < panel.channels; ++c) {
      const T tap = source[c * width + width - 1 - l];
      row[c] = tap == tap ? tap : static_cast<T>(__builtin_nanf(""));
    }
    for (int64_t c = panel.channels; c < panel.padded_channels; ++c) row[c] = 0;
  }
}

// Row `row` of a sequence in a tile; before its start the state's, or zeros, and past `sequence_end` zeros.
template <typename Storage>
inline void load_key(const KeyConvProblem& problem, const Panel& panel, const ConstKeys& keys, const ConstKeys& state,
                     int64_t batch_idx, const Stretch& stretch, int64_t row, ComputeOf<Storage>* target) {
  if (row < stretch.sequence_end && row >= stretch.sequence_start) {
    widen_row(row_of<Storage>(keys, batch_idx, panel.first_head, row), panel.channels, target);
  } else if (row < stretch.sequence_start && state.data != nullptr) {
    const int64_t state_row = row - stretch.sequence_start + problem.kernel_width - 1;
    for (int64_t h = 0; h < panel.num_heads; ++h) {
      load_row(row_of<Storage>(state, batch_idx, panel.first_head + h, state_row), problem.head_dim,
               target + h * problem.head_dim);
    }
  } else {
    for (int64_t c = 0; c < panel.channels; ++c) target[c] = 0;
  }
}

// 1 / (1 + exp(-x)), exact enough for a result in `Storage`; NaN for NaN.
template <typename Storage>
inline Vector<ComputeOf<Storage>> sigmoid(const Vector<ComputeOf<Storage>>& x) {
  using T = ComputeOf<Storage>;
  const Vector<T> exponent = x * static_cast<T>(-kLog2E);
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<Storage, BFloat16>) {
    return reciprocal_estimate(static_cast<T>(1) + exp2_estimate(exponent));
  } else if constexpr (std::is_same_v<T, float>) {
    return reciprocal_from_one(static_cast<T>(1) + exp2_vector(exponent));
  }
#endif
  return static_cast<T>(1) / (static_cast<T>(1) + exp2_vector(exponent));
}

// sums[i] = sum over l of taps_l * key_{i - l}, for kTokens tokens and one vector of channels: a tap's weights are
// fetched once, and independent sums hide each other's latencies. `rows` is channel c of the first token.
template <typename T, int kTokens>
inline void convolve(const T* rows, int64_t row_stride, const T* taps, int64_t tap_stride, int64_t width,
                     Vector<T> (&sums)[kTokens]) {
  const Vector<T> current = load<T>(taps);
#pragma GCC unroll 8
  for (int i = 0; i < kTokens; ++i) sums[i] = current * load<T>(rows + i * row_stride);
  for (int64_t l = 1; l < width; ++l) {
    const Vector<T> tap = load<T>(taps + l * tap_stride);
#pragma GCC unroll 8
    for (int i = 0; i < kTokens; ++i) sums[i] += tap * load<T>(rows + (i - l) * row_stride);
  }
}

}  // namespace topgather::TOPGATHER_CPU_TARGET
