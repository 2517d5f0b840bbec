// Rows of keys as the CPU kernels walk them: panels of channels, stretches of a sequence, copies of rows, taps.
#pragma once

#include "../cpu/dispatch.h"
#include "../cpu/math.h"
#include "key_conv_channels_cpu.h"
#include "key_conv_config.h"
#include "key_conv_params.h"

namespace topgather::TOPGATHER_CPU_TARGET {

// Rows of one panel.
template <typename Element>
struct Rows {
  Element* first;
  int64_t stride;

  Element* operator[](int64_t row) const { return first + row * stride; }
  Rows from(int64_t row, int64_t channel) const { return {(*this)[row] + channel, stride}; }
  operator Rows<const Element>() const { return {first, stride}; }
};

template <typename Element>
inline void clear_row(Element* target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) target[i] = Element{};
}

// A row of `count` numbers, converted where the types differ, and zeros up to `padded_count`.
template <typename Storage, typename Element>
inline void copy_row(const Storage* source, int64_t count, int64_t padded_count, Element* target) {
  if constexpr (std::is_same_v<Storage, Element>) {
    std::memcpy(target, source, static_cast<size_t>(count) * sizeof(Element));
  } else {
    int64_t i = 0;
    for (; i + kLanes<Element> <= count; i += kLanes<Element>) store<Element>(target + i, widen(source + i));
    for (; i < count; ++i) target[i] = to_compute(source[i]);
  }
  clear_row(target + count, padded_count - count);
}

// How a problem is cut, by shapes and a task's size alone. A panel is one head, or several whose channels follow one
// another in all rows: a convolution per channel does not care where a head ends.
struct KeyConvCut {
  int64_t heads_per_panel;
  int64_t num_panels;
  int64_t tokens_per_chunk;
  int64_t num_chunks;  // of a batch entry's tokens
  int64_t tile_tokens;

  // A task takes about `task_numbers` numbers.
  KeyConvCut(const KeyConvProblem& problem, bool are_heads_neighbours, int64_t task_numbers) {
    const int64_t dim = problem.head_dim;
    const int64_t max_heads = are_heads_neighbours ? max64(1, KeyConvConfig::kPanelChannels / dim) : 1;
    heads_per_panel = min64(max_heads, problem.num_heads);
    num_panels = ceil_div(problem.num_heads, heads_per_panel);
    const int64_t channels = heads_per_panel * dim;
    tokens_per_chunk = max64(KeyConvConfig::kMinTaskTokens, task_numbers / channels);
    num_chunks = ceil_div(problem.num_tokens, tokens_per_chunk);
    tile_tokens = max64(KeyConvConfig::kMinTileTokens, KeyConvConfig::kTileNumbers / channels);
  }
};

// Channels of some heads.
struct Panel {
  int64_t first_head;
  int64_t num_heads;
  int64_t channels;
  int64_t padded_channels;  // the row of a tile

  // Rows are padded to whole registers of an Element.
  template <typename Element>
  static Panel at(const KeyConvProblem& problem, const KeyConvCut& cut, int64_t panel_idx) {
    const int64_t first = panel_idx * cut.heads_per_panel;
    const int64_t heads = min64(cut.heads_per_panel, problem.num_heads - first);
    const int64_t channels = heads * problem.head_dim;
    return {first, heads, channels, round_up(channels, Channels<Element>::kCount)};
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
  if (problem.cu_seqlens.data == nullptr) {
    visit(Stretch{0, problem.num_tokens, first, last});
    return;
  }
  const int64_t* starts = problem.cu_seqlens.data;
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

// The weight of channel c for the key l tokens back, times `factor`, in row l of taps [W, padded_channels], where
// Channels of an Element have that channel; what pads is 0. All NaN become the one whose payload is 0, so that those of
// 16-bit keys are the only others that a sum can be.
template <typename Element>
inline void load_taps(const KeyConvProblem& problem, const Panel& panel, const void* weight, ComputeOf<Element> factor,
                      ComputeOf<Element>* taps) {
  using T = ComputeOf<Element>;
  const int64_t width = problem.kernel_width;
  with_storage(problem.weight_dtype, [&](auto storage) {
    const auto* source = static_cast<const decltype(storage)*>(weight) + panel.first_head * problem.head_dim * width;
    for (int64_t c = 0; c < panel.padded_channels; ++c) {
      T* target = taps + Channels<Element>::place_of(c);
      for (int64_t l = 0; l < width; ++l) {
        const T tap = c < panel.channels ? static_cast<T>(to_compute(source[c * width + width - 1 - l])) : 0;
        target[l * panel.padded_channels] = tap == tap ? tap * factor : static_cast<T>(__builtin_nanf(""));
      }
    }
  });
}

// The bias of a panel's channels, zeros without one, as a row of taps.
template <typename Element>
inline void load_bias(const KeyConvProblem& problem, const Panel& panel, const Array<const void, 2>& bias,
                      ComputeOf<Element> factor, ComputeOf<Element>* row) {
  using T = ComputeOf<Element>;
  for (int64_t c = 0; c < panel.padded_channels; ++c) {
    const bool is_there = bias.data != nullptr && c < panel.channels;
    const T number = is_there ? bias.at<T>()[panel.first_head * problem.head_dim + c] : 0;
    row[Channels<Element>::place_of(c)] = number == number ? number * factor : static_cast<T>(__builtin_nanf(""));
  }
}

// Row `row` of a sequence, of a panel's padded channels: before the sequence's start the state's, or zeros, and past
// its end zeros. An Element is a Storage or its sum type.
template <typename Storage, typename Element>
inline void load_key(const KeyConvProblem& problem, const Panel& panel, const Array<const void, 4>& keys,
                     const Array<const void, 4>& state, int64_t batch_idx, const Stretch& stretch, int64_t row,
                     Element* target) {
  if (row < stretch.sequence_end && row >= stretch.sequence_start) {
    copy_row(keys.at<Storage>(batch_idx, panel.first_head, row), panel.channels, panel.padded_channels, target);
  } else if (row < stretch.sequence_start && state.data != nullptr) {
    const int64_t state_row = row - stretch.sequence_start + problem.kernel_width - 1, dim = problem.head_dim;
    for (int64_t h = 0; h < panel.num_heads; ++h) {
      copy_row(state.at<Storage>(batch_idx, panel.first_head + h, state_row), dim, dim, target + h * dim);
    }
    clear_row(target + panel.channels, panel.padded_channels - panel.channels);
  } else {
    clear_row(target, panel.padded_channels);
  }
}

// 1 / (1 + exp(-x)); NaN for NaN.
template <typename T>
inline Vector<T> sigmoid(const Vector<T>& x) {
  const Vector<T> denominator = static_cast<T>(1) + exp2_vector(x * static_cast<T>(-kLog2E));
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) return reciprocal_from_one(denominator);
#endif
  return static_cast<T>(1) / denominator;
}

}  // namespace topgather::TOPGATHER_CPU_TARGET
