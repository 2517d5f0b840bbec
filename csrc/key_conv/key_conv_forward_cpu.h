// The key convolution on the CPU, forward.
//
//   s_t   = sum over l < W of weight[W - 1 - l] * key_{t-l}     per head and channel, keys before the start being the
//   out_t = key_t + s_t / (1 + exp(-s_t))                       state's, or zeros
//
// With options, code of its own: s_t begins with a bias, and without SiLU out_t = key_t + s_t.
//
// Who owns what: a task owns a chunk of a batch entry's tokens in a panel of channels; a chunk may hold several
// sequences of a pack. Steps:
//   1. the panel's weights are laid out by tap, as registers take them;
//   2. of each stretch of a sequence in the chunk, the first W - 1 tokens of the sequence go through a tile that begins
//      with the state's rows, or zeros;
//   3. all others are read and written where they lie, a few tokens and one register of channels at a time; channels
//      that are left over go through tiles too.
// Memory: each key is read once from memory (its W - 1 further uses find it in the first-level cache) and each result
// written once.
// Numerics: sums in float32 (float64 for float64), rounded once to the nearest; bfloat16 ties round away from zero:
// they are rare, and exact ties-to-even costs a sixth of the time. Without tokens nothing is written. A key that is not
// finite reaches the W tokens that see it, in its channel alone.
// Determinism: every result is computed alone, its terms in ascending l: the same bits however work or a sequence is
// cut.
#pragma once

#include "../common/parallel.h"
#include "../cpu/fresh_pages.h"
#include "../cpu/scratch.h"
#include "key_conv_rows_cpu.h"

namespace topgather::TOPGATHER_CPU_TARGET {

// The factor of a convolution's taps that add_silu expects.
template <typename Storage>
inline constexpr ComputeOf<Storage> kTapFactor = 1;

// key + silu(s), out of s times kTapFactor.
template <typename Storage>
inline Vector<ComputeOf<Storage>> add_silu(const Vector<ComputeOf<Storage>>& key,
                                           const Vector<ComputeOf<Storage>>& sum) {
  return key + sum * sigmoid<ComputeOf<Storage>>(sum);
}

#if defined(__AVX512F__)
// With k = -log2(e) / 2 and x = s * k, s / (1 + exp(-s)) = x / (k + k * 4^x): no product to begin with, and the
// polynomial of 2^x brings the root of -k along.
template <>
inline constexpr float kTapFactor<BFloat16> = static_cast<float>(-kLog2E / 2);

template <>
inline Vector<float> add_silu<BFloat16>(const Vector<float>& key, const Vector<float>& sum) {
  const Vector<float> power = exp2_estimate(sum, 0.84932180f);
  return key + sum * reciprocal_estimate(kTapFactor<BFloat16> - power * power);
}
#endif

template <typename Storage>
struct KeyConvTile {
  Rows<const Storage> keys;             // from the first token; the W - 1 rows before it are there too
  Rows<Storage> out;                    // from the first token
  Rows<const ComputeOf<Storage>> taps;  // by distance, in the order of Channels' parts, times kTapFactor
  const ComputeOf<Storage>* bias;       // likewise; options only
  bool has_silu;                        // else taps and bias are as they are; options only
  int64_t num_tokens;
  int64_t num_groups;  // of channels that fill a register
};

// out[i] = key[i] + silu(convolution) for kTokens tokens: a tap's weights are fetched once, a key is converted once for
// all that see it, and independent sums hide each other's latencies.
template <typename Storage, int kWidth, int kTokens, bool kHasOptions>
inline void convolve_tokens(const KeyConvTile<Storage>& tile, int64_t first) {
  using Group = Channels<Storage>;
  using T = ComputeOf<Storage>;
  constexpr int kHistory = kWidth - 1;
  const Rows<const Storage> keys = tile.keys.from(first, 0);
  const Rows<Storage> out = tile.out.from(first, 0);
  for (int64_t group = 0; group < tile.num_groups; ++group) {
    const int64_t c = group * Group::kCount;
    // Long rows are more streams than the hardware prefetcher follows. May lie past the tensors' ends.
#pragma GCC unroll 4
    for (int i = kTokens; i < 2 * kTokens; ++i) {
      prefetch_second_level(keys[i] + c);
      prefetch_second_level(out[i] + c);
    }
    Group results[kTokens];
#pragma GCC unroll 2
    for (int part = 0; part < Group::kNumParts; ++part) {
      Vector<T> numbers[kHistory + kTokens];
      // From 0, not from a product: of a sum of two products a compiler may round either one first.
      Vector<T> sums[kTokens] = {};
      if constexpr (kHasOptions) {
        const Vector<T> bias = load<T>(tile.bias + c + part * kLanes<T>);
        for (int i = 0; i < kTokens; ++i) sums[i] = bias;
      }
#pragma GCC unroll 16
      for (int i = 0; i < kHistory + kTokens; ++i) numbers[i] = Group::load_part(keys[i - kHistory] + c, part);
#pragma GCC unroll 8
      for (int l = 0; l < kWidth; ++l) {
        const Vector<T> tap = load<T>(tile.taps[l] + c + part * kLanes<T>);
#pragma GCC unroll 4
        for (int i = 0; i < kTokens; ++i) sums[i] += tap * numbers[kHistory + i - l];
      }
      if (kHasOptions && !tile.has_silu) {
#pragma GCC unroll 4
        for (int i = 0; i < kTokens; ++i) results[i].parts[part] = numbers[kHistory + i] + sums[i];
        continue;
      }
#pragma GCC unroll 4
      for (int i = 0; i < kTokens; ++i) results[i].parts[part] = add_silu<Storage>(numbers[kHistory + i], sums[i]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kTokens; ++i) results[i].store_to(out[i] + c);
  }
}

template <typename Storage, int kWidth, bool kHasOptions>
void convolve_tile(const KeyConvTile<Storage>& tile) {
  using Group = Channels<Storage>;
  constexpr int kTokens = Group::kNumParts == 1 ? 2 : 4;
  int64_t i = 0;
  for (; i + kTokens <= tile.num_tokens; i += kTokens) {
    convolve_tokens<Storage, kWidth, kTokens, kHasOptions>(tile, i);
  }
  for (; i < tile.num_tokens; ++i) convolve_tokens<Storage, kWidth, 1, kHasOptions>(tile, i);
}

// Each number of taps that the op takes has code of its own, whose keys stay in registers.
template <typename Storage, bool kHasOptions>
auto convolve_tile_of_width(int64_t width) {
  using Function = void (*)(const KeyConvTile<Storage>&);
  constexpr Function kFunctions[] = {
      &convolve_tile<Storage, 2, kHasOptions>, &convolve_tile<Storage, 3, kHasOptions>,
      &convolve_tile<Storage, 4, kHasOptions>, &convolve_tile<Storage, 5, kHasOptions>,
      &convolve_tile<Storage, 6, kHasOptions>, &convolve_tile<Storage, 7, kHasOptions>,
      &convolve_tile<Storage, 8, kHasOptions>,
  };
  return kFunctions[width - 2];
}

template <typename Storage>
class KeyConvForwardTask {
  using T = ComputeOf<Storage>;
  using Group = Channels<Storage>;

 public:
  // Takes the memory of the widest panel; a cutter with nothing behind it counts. `taps` is [panel, W + 1, channels], the
  // last row the bias.
  KeyConvForwardTask(const KeyConvForwardParams& params, const KeyConvCut& cut, const T* taps, ScratchCutter& cutter)
      : params_(params),
        cut_(cut),
        taps_(taps),
        convolve_tile_(params.problem.has_options
                           ? convolve_tile_of_width<Storage, true>(params.problem.kernel_width)
                           : convolve_tile_of_width<Storage, false>(params.problem.kernel_width)) {
    const int64_t channels = panel_at(0).padded_channels, width = params.problem.kernel_width;
    keys_ = cutter.take<Storage>((width - 1 + cut.tile_tokens) * channels);
    results_ = cutter.take<Storage>(cut.tile_tokens * channels);
  }

  void run(int64_t batch_idx, int64_t panel_idx, int64_t chunk) const {
    const KeyConvProblem& problem = params_.problem;
    const Panel panel = panel_at(panel_idx);
    const Rows<const T> taps{taps_ + panel_idx * (problem.kernel_width + 1) * panel_at(0).padded_channels,
                             panel.padded_channels};
    const int64_t first = chunk * cut_.tokens_per_chunk;
    const int64_t last = min64(first + cut_.tokens_per_chunk, problem.num_tokens);
    if (panel_idx == 0 || params_.out.strides[1] > params_.out.strides[2]) {
      populate_rows(batch_idx, panel.first_head, first, last);
    }
    const int64_t num_groups = panel.channels / Group::kCount;
    for_each_stretch(problem, first, last, [&](const Stretch& stretch) {
      // Step 2.
      const int64_t begun = stretch.sequence_start + problem.kernel_width - 1;
      const int64_t split = min64(max64(stretch.first, begun), stretch.last);
      through_tiles(batch_idx, panel, taps, stretch, stretch.first, split, 0);
      // Step 3.
      const Storage* keys = params_.key.at<Storage>(batch_idx, panel.first_head, split);
      Storage* out = params_.out.at<Storage>(batch_idx, panel.first_head, split);
      convolve_tile_({{keys, params_.key.strides[2]},
                      {out, params_.out.strides[2]},
                      taps,
                      taps[problem.kernel_width],
                      problem.has_silu,
                      stretch.last - split,
                      num_groups});
      if (num_groups * Group::kCount < panel.channels) {
        through_tiles(batch_idx, panel, taps, stretch, split, stretch.last, num_groups);
      }
    });
  }

 private:
  Panel panel_at(int64_t panel_idx) const { return Panel::at<Storage>(params_.problem, cut_, panel_idx); }

  // The allocator gives a large result memory that was never touched, and a smaller one sometimes.
  void populate_rows(int64_t batch_idx, int64_t head_idx, int64_t first, int64_t last) const {
    const int64_t row_bytes = params_.out.strides[2] * static_cast<int64_t>(sizeof(Storage));
    if ((last - first) * row_bytes < KeyConvConfig::kMinFreshBytes) return;
    if (!is_fresh(params_.out.at<Storage>(batch_idx, head_idx, (first + last) / 2))) return;
    populate_pages(params_.out.at<Storage>(batch_idx, head_idx, first), (last - first) * row_bytes);
  }

  // Channels from `first_group` on of rows [first, last), by way of tiles of whole groups that hold all rows before
  // them.
  void through_tiles(int64_t batch_idx, const Panel& panel, const Rows<const T>& taps, const Stretch& stretch,
                     int64_t first, int64_t last, int64_t first_group) const {
    const KeyConvProblem& problem = params_.problem;
    const int64_t history = problem.kernel_width - 1, num_groups = panel.padded_channels / Group::kCount;
    const int64_t c = first_group * Group::kCount;
    const Rows<Storage> keys{keys_, panel.padded_channels}, results{results_, panel.padded_channels};
    for (int64_t tile = first; tile < last; tile += cut_.tile_tokens) {
      const int64_t count = min64(cut_.tile_tokens, last - tile);
      for (int64_t i = 0; i < history + count; ++i) {
        load_key<Storage>(problem, panel, params_.key, params_.state, batch_idx, stretch, tile - history + i, keys[i]);
      }
      convolve_tile_({keys.from(history, c), results.from(0, c), taps.from(0, c), taps[history + 1] + c,
                      problem.has_silu, count, num_groups - first_group});
      for (int64_t i = 0; i < count; ++i) {
        Storage* target = params_.out.at<Storage>(batch_idx, panel.first_head, tile + i);
        copy_row(results[i] + c, panel.channels - c, panel.channels - c, target + c);
      }
    }
  }

  const KeyConvForwardParams& params_;
  const KeyConvCut& cut_;
  const T* taps_;
  void (*convolve_tile_)(const KeyConvTile<Storage>&);
  Storage* keys_;     // [W - 1 + tile tokens, channels]
  Storage* results_;  // [tile tokens, channels]
};

template <typename Storage>
void key_conv_forward_storage(const KeyConvForwardParams& params) {
  using T = ComputeOf<Storage>;
  using Task = KeyConvForwardTask<Storage>;
  const KeyConvProblem& problem = params.problem;
  const int64_t numbers = problem.batch_size * problem.num_heads * problem.num_tokens * problem.head_dim;
  if (numbers == 0) return;
  const int64_t share = numbers / (problem.num_threads * KeyConvConfig::kForwardTasksPerThread);
  const KeyConvCut cut(problem, params.key.strides[1] == problem.head_dim && params.out.strides[1] == problem.head_dim,
                       max64(KeyConvConfig::kTaskNumbers, share));
  // Step 1.
  const int64_t panel_taps = (problem.kernel_width + 1) * Panel::at<Storage>(problem, cut, 0).padded_channels;
  const AlignedBuffer tap_buffer = allocate_aligned(static_cast<size_t>(cut.num_panels * panel_taps) * sizeof(T));
  T* taps = reinterpret_cast<T*>(tap_buffer.get());
  for (int64_t i = 0; i < cut.num_panels; ++i) {
    const Panel panel = Panel::at<Storage>(problem, cut, i);
    const T factor = problem.has_silu ? kTapFactor<Storage> : 1;
    load_taps<Storage>(problem, panel, params.weight.data, factor, taps + i * panel_taps);
    load_bias<Storage>(problem, panel, params.bias, factor,
                       taps + i * panel_taps + problem.kernel_width * panel.padded_channels);
  }
  const int64_t num_tasks = problem.batch_size * cut.num_panels * cut.num_chunks;
  const int num_workers = useful_threads(problem.num_threads, num_tasks,
                                         static_cast<double>(numbers) * static_cast<double>(problem.kernel_width + 8));
  const WorkerScratch scratch(num_workers, [&](ScratchCutter& cutter) { Task(params, cut, taps, cutter); });
  for_each_task(num_workers, num_tasks, [&](int64_t task, int worker) {
    ScratchCutter cutter = scratch.of(worker);
    // Chunks of one panel go one after the other.
    const int64_t unit = task / cut.num_chunks;
    Task(params, cut, taps, cutter).run(unit / cut.num_panels, unit % cut.num_panels, task % cut.num_chunks);
  });
}

}  // namespace topgather::TOPGATHER_CPU_TARGET
