// The key convolution on the CPU, forward.
//
//   s_t   = sum over l < W of weight[W - 1 - l] * key_{t-l}     per head and channel, keys before the start being the
//   out_t = key_t + s_t / (1 + exp(-s_t))                       state's, or zeros
//
// Who owns what: a task owns a chunk of a batch entry's tokens in a panel of channels; a chunk may hold several
// sequences of a pack. Steps:
//   1. the panel's weights are laid out by tap;
//   2. each stretch of a sequence in the chunk is walked once, a few tokens and one vector of channels at a time. Rows
//      that are of the sum type and fill whole vectors are read and written where they lie, but for a sequence's first
//      W - 1 tokens; all others go through a tile that begins with the W - 1 rows before it.
// Memory: each key is read once from memory (its W - 1 further uses find it in the first-level cache) and each result
// written once; this, not arithmetic, bounds the speed.
// Numerics: sums in float32 (float64 for float64), rounded once. Without tokens nothing is written. A key that is not
// finite reaches the W tokens that see it, in its channel alone.
// Determinism: every result is computed alone, its terms in ascending l: the same bits however work or a sequence is
// cut.
#pragma once

#include "../common/parallel.h"
#include "../cpu/fresh_pages.h"
#include "../cpu/scratch.h"
#include "key_conv_rows_cpu.h"

namespace topgather::TOPGATHER_CPU_TARGET {

// Rows of the tensor that a later step reads, asked for in passing: long rows are too many places at once for the
// hardware to foresee. They may lie past the tensor's end, which asking for memory does not mind.
template <typename Storage>
struct RowsAhead {
  const Storage* first;
  int64_t row_stride;
};

// out[i] = key[i] + silu(convolution) for kTokens rows, of each the whole vectors; the W - 1 rows before are read too.
template <typename Storage, int kTokens>
inline void convolve_vectors(const ComputeOf<Storage>* rows, int64_t row_stride, const ComputeOf<Storage>* taps,
                             int64_t tap_stride, int64_t width, int64_t channels, Storage* out, int64_t out_stride,
                             const RowsAhead<Storage>& ahead) {
  using T = ComputeOf<Storage>;
  for (int64_t c = 0; c + kLanes<T> <= channels; c += kLanes<T>) {
    Vector<T> sums[kTokens];
#pragma GCC unroll 8
    for (int i = 0; i < kTokens; ++i) {
      prefetch_second_level(ahead.first + c + i * ahead.row_stride);
    }
    convolve<T, kTokens>(rows + c, row_stride, taps + c, tap_stride, width, sums);
#pragma GCC unroll 8
    for (int i = 0; i < kTokens; ++i) {
      narrow(load<T>(rows + c + i * row_stride) + sums[i] * sigmoid<Storage>(sums[i]), out + c + i * out_stride);
    }
  }
}

// The channels that are left over, fewer than a vector; rows and taps reach to the vector's end. Out of line: in the
// loop above its code would take the registers.
template <typename Storage>
__attribute__((noinline)) void convolve_rest(const ComputeOf<Storage>* rows, int64_t row_stride,
                                             const ComputeOf<Storage>* taps, int64_t tap_stride, int64_t width,
                                             int64_t count, int64_t channels, Storage* out, int64_t out_stride) {
  using T = ComputeOf<Storage>;
  for (int64_t i = 0; i < count; ++i) {
    Vector<T> sums[1];
    convolve<T, 1>(rows + i * row_stride, row_stride, taps, tap_stride, width, sums);
    T results[kLanes<T>];
    store<T>(results, load<T>(rows + i * row_stride) + sums[0] * sigmoid<Storage>(sums[0]));
    store_row<Storage>(results, channels, 1, out + i * out_stride);
  }
}

template <typename Storage>
void convolve_rows(const ComputeOf<Storage>* rows, int64_t row_stride, const ComputeOf<Storage>* taps, int64_t width,
                   int64_t count, const Panel& panel, Storage* out, int64_t out_stride,
                   const RowsAhead<Storage>& ahead) {
  using T = ComputeOf<Storage>;
  const int64_t channels = panel.channels, tap_stride = panel.padded_channels;
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    convolve_vectors<Storage, 4>(rows + i * row_stride, row_stride, taps, tap_stride, width, channels,
                                 out + i * out_stride, out_stride,
                                 {ahead.first + i * ahead.row_stride, ahead.row_stride});
  }
  for (; i < count; ++i) {
    convolve_vectors<Storage, 1>(rows + i * row_stride, row_stride, taps, tap_stride, width, channels,
                                 out + i * out_stride, out_stride,
                                 {ahead.first + i * ahead.row_stride, ahead.row_stride});
  }
  const int64_t whole = channels / kLanes<T> * kLanes<T>;
  if (whole < channels) {
    convolve_rest<Storage>(rows + whole, row_stride, taps + whole, tap_stride, width, count, channels - whole,
                           out + whole, out_stride);
  }
}

template <typename Storage>
class KeyConvForwardTask {
  using T = ComputeOf<Storage>;

 public:
  // Takes the memory of the widest panel; a cutter with nothing behind it counts.
  KeyConvForwardTask(const KeyConvForwardParams& params, const KeyConvCut& cut, ScratchCutter& cutter)
      : params_(params), cut_(cut) {
    const int64_t channels = Panel::at<T>(params.problem, cut, 0).padded_channels;
    taps_ = cutter.take<T>(params.problem.kernel_width * channels);
    tile_ = cutter.take<T>((params.problem.kernel_width - 1 + cut.tile_tokens) * channels);
  }

  void run(int64_t batch_idx, int64_t panel_idx, int64_t chunk) const {
    const KeyConvProblem& problem = params_.problem;
    const Panel panel = Panel::at<T>(problem, cut_, panel_idx);
    load_taps<T>(problem, panel, params_.weight, taps_);
    const int64_t first = chunk * cut_.tokens_per_chunk;
    const int64_t last = min64(first + cut_.tokens_per_chunk, problem.num_tokens);
    if (panel_idx == 0 || params_.out.head_stride > params_.out.row_stride) {
      populate_rows(batch_idx, panel.first_head, first, last);
    }
    for_each_stretch(problem, first, last, [&](const Stretch& stretch) {
      if constexpr (std::is_same_v<Storage, T>) {
        if (panel.channels == panel.padded_channels) {
          const int64_t history = problem.kernel_width - 1;
          const int64_t split = min64(max64(stretch.first, stretch.sequence_start + history), stretch.last);
          through_tiles(batch_idx, panel, stretch, stretch.first, split);
          convolve_rows<Storage>(row_of<Storage>(params_.key, batch_idx, panel.first_head, split),
                                 params_.key.row_stride, taps_, problem.kernel_width, stretch.last - split, panel,
                                 row_of<Storage>(params_.out, batch_idx, panel.first_head, split),
                                 params_.out.row_stride, rows_ahead(batch_idx, panel, split + kRowsAhead));
          return;
        }
      }
      through_tiles(batch_idx, panel, stretch, stretch.first, stretch.last);
    });
  }

 private:
  static constexpr int64_t kRowsAhead = 8;  // of rows that are read in place

  // The allocator gives a large result memory that was never touched.
  void populate_rows(int64_t batch_idx, int64_t head_idx, int64_t first, int64_t last) const {
    const KeyConvProblem& problem = params_.problem;
    const int64_t row_bytes = params_.out.row_stride * static_cast<int64_t>(sizeof(Storage));
    const int64_t all_bytes = problem.batch_size * problem.num_heads * problem.num_tokens * problem.head_dim *
                              static_cast<int64_t>(sizeof(Storage));
    if (all_bytes < KeyConvConfig::kFreshBytes) return;
    populate_pages(row_of<Storage>(params_.out, batch_idx, head_idx, first), (last - first) * row_bytes);
  }

  RowsAhead<Storage> rows_ahead(int64_t batch_idx, const Panel& panel, int64_t row) const {
    return {row_of<Storage>(params_.key, batch_idx, panel.first_head, row), params_.key.row_stride};
  }

  void through_tiles(int64_t batch_idx, const Panel& panel, const Stretch& stretch, int64_t first, int64_t last) const {
    const KeyConvProblem& problem = params_.problem;
    const int64_t history = problem.kernel_width - 1, channels = panel.padded_channels;
    const auto load_rows = [&](int64_t row, int64_t count, T* target) {
      for (int64_t i = 0; i < count; ++i) {
        T* tile_row = target + i * channels;
        load_key<Storage>(problem, panel, params_.key, params_.state, batch_idx, stretch, row + i, tile_row);
        for (int64_t c = panel.channels; c < channels; ++c) tile_row[c] = 0;
      }
    };
    if (first < last) load_rows(first - history, history, tile_);
    for (int64_t tile = first; tile < last; tile += cut_.tile_tokens) {
      const int64_t count = min64(cut_.tile_tokens, last - tile);
      load_rows(tile, count, tile_ + history * channels);
      convolve_rows<Storage>(tile_ + history * channels, channels, taps_, problem.kernel_width, count, panel,
                             row_of<Storage>(params_.out, batch_idx, panel.first_head, tile), params_.out.row_stride,
                             rows_ahead(batch_idx, panel, tile + count));
      // The last rows are the next tile's history.
      std::memmove(tile_, tile_ + count * channels, static_cast<size_t>(history * channels) * sizeof(T));
    }
  }

  const KeyConvForwardParams& params_;
  const KeyConvCut& cut_;
  T* taps_;  // [W, channels]
  T* tile_;  // [W - 1 + tile tokens, channels]
};

template <typename Storage>
void key_conv_forward_storage(const KeyConvForwardParams& params) {
  using Task = KeyConvForwardTask<Storage>;
  const KeyConvProblem& problem = params.problem;
  const int64_t numbers = problem.batch_size * problem.num_heads * problem.num_tokens * problem.head_dim;
  if (numbers == 0) return;
  const KeyConvCut cut(problem,
                       params.key.head_stride == problem.head_dim && params.out.head_stride == problem.head_dim);
  ScratchCutter measure(nullptr);
  Task(params, cut, measure);
  const int64_t num_tasks = problem.batch_size * cut.num_panels * cut.num_chunks;
  const int num_workers = useful_threads(problem.num_threads, num_tasks,
                                         static_cast<double>(numbers) * static_cast<double>(problem.kernel_width + 8));
  const AlignedBuffer scratch = allocate_aligned(static_cast<size_t>(measure.used() * num_workers));
  struct Context {
    const KeyConvForwardParams& params;
    const KeyConvCut& cut;
    unsigned char* scratch;
    int64_t worker_bytes;
  } context{params, cut, scratch.get(), measure.used()};
  const auto body = [](void* opaque, int64_t task, int worker) {
    const Context& ctx = *static_cast<Context*>(opaque);
    ScratchCutter cutter(ctx.scratch + worker * ctx.worker_bytes);
    // Chunks of one panel go one after the other.
    const int64_t unit = task / ctx.cut.num_chunks;
    Task(ctx.params, ctx.cut, cutter)
        .run(unit / ctx.cut.num_panels, unit % ctx.cut.num_panels, task % ctx.cut.num_chunks);
  };
  parallel_for(num_workers, num_tasks, body, &context);
}

}  // namespace topgather::TOPGATHER_CPU_TARGET
