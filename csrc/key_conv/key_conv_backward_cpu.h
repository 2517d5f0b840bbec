// The key convolution on the CPU, backward.
//
//   d_s_t           = grad_out_t * sigmoid(s_t) * (1 + s_t * (1 - sigmoid(s_t)))     s_t as in the forward, again
//   grad_key_t      = grad_out_t + sum over l < W of weight[W - 1 - l] * d_s_{t+l}   within the sequence
//   grad_state_t    = the same for the W - 1 tokens before the first, which have no grad_out
//   grad_weight[W - 1 - l] = sum over t of d_s_t * key_{t-l}, over batch entries and sequences
//   grad_bias              = sum over t of d_s_t, likewise
//
// Without SiLU d_s_t is grad_out_t.
//
// Who owns what: a task owns a piece, a run of chunks of tokens, in a panel of channels: the gradients of its keys, and
// the piece's sum for the weight. Steps:
//   1. tile by tile, rows are converted, those of the W - 1 tokens before and after among them; what lies outside the
//      sequence is the state, or zeros;
//   2. d_s of the tile's tokens and of the W - 1 after it, which the neighbour makes again;
//   3. gradients of the tile's keys, and at a sequence's start those of the state;
//   4. products with keys, and d_s itself, added to the piece's sums;
//   5. when all tasks are done, a weight's pieces are added in order.
// Numerics: sums in float32 (float64 for float64), rounded once. No tokens: all sums are 0.
// Determinism: pieces follow from shapes alone and every sum has one order, so neither threads nor calls change bits.
#pragma once

#include "../common/parallel.h"
#include "../cpu/scratch.h"
#include "key_conv_rows_cpu.h"

namespace topgather::TOPGATHER_CPU_TARGET {

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

// d_s[i] = grad[i] * silu'(convolution) for `count` rows. All rows are `channels` apart.
// Where kHasOptions, `bias` is the row after the taps.
template <typename T, bool kHasOptions>
void differentiate_rows(const T* rows, const T* grad, const T* taps, int64_t width, int64_t count, int64_t channels,
                        T* d_s) {
  const auto some_tokens = [&]<int kTokens>(std::integral_constant<int, kTokens>, int64_t first) {
    for (int64_t c = first * channels; c < (first + 1) * channels; c += kLanes<T>) {
      Vector<T> sums[kTokens];
      convolve<T, kTokens>(rows + c, channels, taps + (c - first * channels), channels, width, sums);
#pragma GCC unroll 8
      for (int i = 0; i < kTokens; ++i) {
        if constexpr (kHasOptions) sums[i] += load<T>(taps + width * channels + (c - first * channels));
        const Vector<T> gate = sigmoid<T>(sums[i]);
        const Vector<T> slope = gate * (static_cast<T>(1) + sums[i] * (static_cast<T>(1) - gate));
        store<T>(d_s + c + i * channels, load<T>(grad + c + i * channels) * slope);
      }
    }
  };
  int64_t first = 0;
  for (; first + 4 <= count; first += 4) some_tokens(std::integral_constant<int, 4>{}, first);
  for (; first < count; ++first) some_tokens(std::integral_constant<int, 1>{}, first);
}

// One row of gradients: what its own token got, `grad` (null: nothing), and what the tokens [first_tap, width) after it
// pass back: those that are there, for a weight that is not finite makes NaN of zeros. d_s is that of the row's own token.
template <typename T>
void pass_back_row(const T* grad, const T* d_s, const T* taps, int64_t first_tap, int64_t width, int64_t channels,
                   T* out) {
  for (int64_t c = 0; c < channels; c += kLanes<T>) {
    Vector<T> sum = grad == nullptr ? Vector<T>{} : load<T>(grad + c);
    for (int64_t l = first_tap; l < width; ++l) {
      sum += load<T>(taps + l * channels + c) * load<T>(d_s + l * channels + c);
    }
    store<T>(out + c, sum);
  }
}

// sums[l] += d_s[i] * rows[i - l] over `count` rows, in four interleaved chains.
template <typename T>
void add_products(const T* d_s, const T* rows, int64_t width, int64_t count, int64_t channels, T* sums) {
  for (int64_t c = 0; c < channels; c += kLanes<T>) {
    for (int64_t l = 0; l < width; ++l) {
      const T* left = d_s + c;
      const T* right = rows - l * channels + c;
      Vector<T> chains[4] = {};
      int64_t i = 0;
      for (; i + 4 <= count; i += 4) {
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
          chains[k] += load<T>(left + (i + k) * channels) * load<T>(right + (i + k) * channels);
        }
      }
      for (; i < count; ++i) chains[0] += load<T>(left + i * channels) * load<T>(right + i * channels);
      T* sum = sums + l * channels + c;
      store<T>(sum, load<T>(sum) + ((chains[0] + chains[1]) + (chains[2] + chains[3])));
    }
  }
}

// sums += d_s[i] over `count` rows, in four interleaved chains.
template <typename T>
void add_rows(const T* d_s, int64_t count, int64_t channels, T* sums) {
  for (int64_t c = 0; c < channels; c += kLanes<T>) {
    Vector<T> chains[4] = {};
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) chains[k] += load<T>(d_s + (i + k) * channels + c);
    }
    for (; i < count; ++i) chains[0] += load<T>(d_s + i * channels + c);
    store<T>(sums + c, load<T>(sums + c) + ((chains[0] + chains[1]) + (chains[2] + chains[3])));
  }
}

// Rows of sums for each head: a weight's taps, and the bias where its gradient is asked for.
inline int64_t sums_per_head(const KeyConvBackwardParams& params) {
  return params.problem.kernel_width + (params.grad_bias.data != nullptr ? 1 : 0);
}

// Which chunks make a piece, by shapes alone.
struct KeyConvPieces {
  int64_t num_items;  // chunks of all batch entries
  int64_t items_per_piece;
  int64_t num_pieces;

  KeyConvPieces(const KeyConvProblem& problem, const KeyConvCut& cut)
      : num_items(problem.batch_size * cut.num_chunks),
        items_per_piece(ceil_div(num_items, KeyConvConfig::kMaxPieces)),
        num_pieces(ceil_div(num_items, items_per_piece)) {}
};

template <typename Storage>
class KeyConvBackwardTask {
  using T = ComputeOf<Storage>;

 public:
  // `piece_sums` is [piece, head, W or W + 1, D], or null.
  KeyConvBackwardTask(const KeyConvBackwardParams& params, const KeyConvCut& cut, T* piece_sums, ScratchCutter& cutter)
      : params_(params), cut_(cut), piece_sums_(piece_sums) {
    const int64_t channels = Panel::at<T>(params.problem, cut, 0).padded_channels;
    const int64_t width = params.problem.kernel_width, history = width - 1;
    taps_ = cutter.take<T>((width + 1) * channels);
    sums_ = cutter.take<T>((width + 1) * channels);
    keys_ = cutter.take<T>((cut.tile_tokens + 2 * history) * channels);
    grads_ = cutter.take<T>((cut.tile_tokens + history) * channels);
    d_s_ = cutter.take<T>((cut.tile_tokens + history) * channels);
    results_ = cutter.take<T>(channels);
  }

  void run(const KeyConvPieces& pieces, int64_t piece, int64_t panel_idx) const {
    const KeyConvProblem& problem = params_.problem;
    const Panel panel = Panel::at<T>(problem, cut_, panel_idx);
    const int64_t num_sums = sums_per_head(params_), dim = problem.head_dim;
    load_taps<T>(problem, panel, params_.weight.data, 1, taps_);
    load_bias<T>(problem, panel, params_.bias, 1, taps_ + problem.kernel_width * panel.padded_channels);
    clear_row(sums_, num_sums * panel.padded_channels);
    const int64_t first_item = piece * pieces.items_per_piece;
    for (int64_t item = first_item; item < min64(first_item + pieces.items_per_piece, pieces.num_items); ++item) {
      const int64_t batch_idx = item / cut_.num_chunks;
      const int64_t first = item % cut_.num_chunks * cut_.tokens_per_chunk;
      const int64_t last = min64(first + cut_.tokens_per_chunk, problem.num_tokens);
      for_each_stretch(problem, first, last, [&](const Stretch& stretch) {
        for (int64_t tile = stretch.first; tile < stretch.last; tile += cut_.tile_tokens) {
          run_tile(batch_idx, panel, stretch, tile, min64(cut_.tile_tokens, stretch.last - tile));
        }
      });
    }
    if (piece_sums_ == nullptr) return;
    for (int64_t h = 0; h < panel.num_heads; ++h) {
      T* target = piece_sums_ + (piece * problem.num_heads + panel.first_head + h) * num_sums * dim;
      for (int64_t l = 0; l < num_sums; ++l) {
        for (int64_t d = 0; d < dim; ++d) target[l * dim + d] = sums_[l * panel.padded_channels + h * dim + d];
      }
    }
  }

 private:
  void run_tile(int64_t batch_idx, const Panel& panel, const Stretch& stretch, int64_t tile, int64_t count) const {
    const KeyConvProblem& problem = params_.problem;
    const int64_t width = problem.kernel_width, history = width - 1, channels = panel.padded_channels;
    // Step 1.
    for (int64_t i = 0; i < count + 2 * history; ++i) {
      load_key<Storage>(problem, panel, params_.key, params_.state, batch_idx, stretch, tile - history + i,
                        keys_ + i * channels);
    }
    for (int64_t i = 0; i < count + history; ++i) {
      load_grad(batch_idx, panel, stretch, tile + i, grads_ + i * channels);
    }
    // Step 2. Past the sequence's end grad_out counts as 0 and so do the keys: d_s is 0.
    const T* keys = keys_ + history * channels;
    if (!problem.has_options) {
      differentiate_rows<T, false>(keys, grads_, taps_, width, count + history, channels, d_s_);
    } else if (problem.has_silu) {
      differentiate_rows<T, true>(keys, grads_, taps_, width, count + history, channels, d_s_);
    } else {
      copy_row(grads_, (count + history) * channels, (count + history) * channels, d_s_);
    }
    const int64_t there = stretch.sequence_end - tile;
    for (int64_t i = max64(there, 0); i < count + history; ++i) clear_row(d_s_ + i * channels, channels);
    // Step 3.
    for (int64_t i = 0; i < count; ++i) {
      pass_back_row<T>(grads_ + i * channels, d_s_ + i * channels, taps_, 0, min64(width, there - i), channels,
                       results_);
      store_row<Storage>(results_, panel.channels, 1,
                         params_.grad_key.at<Storage>(batch_idx, panel.first_head, tile + i));
    }
    if (tile == stretch.sequence_start && params_.grad_state.data != nullptr) {
      for (int64_t i = 0; i < history; ++i) {
        // Token i - history: its first neighbour with a result is `history - i` taps on.
        pass_back_row<T>(nullptr, d_s_ + (i - history) * channels, taps_, history - i,
                         min64(width, there + history - i), channels, results_);
        for (int64_t h = 0; h < panel.num_heads; ++h) {
          store_row<Storage>(results_ + h * problem.head_dim, problem.head_dim, 1,
                             params_.grad_state.at<Storage>(batch_idx, panel.first_head + h, i));
        }
      }
    }
    // Step 4.
    if (piece_sums_ != nullptr) add_products<T>(d_s_, keys, width, count, channels, sums_);
    if (params_.grad_bias.data != nullptr) add_rows<T>(d_s_, count, channels, sums_ + width * channels);
  }

  void load_grad(int64_t batch_idx, const Panel& panel, const Stretch& stretch, int64_t row, T* target) const {
    if (row < stretch.sequence_end) {
      copy_row(params_.grad_out.at<Storage>(batch_idx, panel.first_head, row), panel.channels, panel.padded_channels,
               target);
    } else {
      clear_row(target, panel.padded_channels);
    }
  }

  const KeyConvBackwardParams& params_;
  const KeyConvCut& cut_;
  T* piece_sums_;
  T* taps_;     // [W + 1, channels], the last row the bias
  T* sums_;     // [W, channels], by distance, then the bias's
  T* keys_;     // [W - 1 + tile tokens + W - 1, channels]
  T* grads_;    // [tile tokens + W - 1, channels]
  T* d_s_;      // [tile tokens + W - 1, channels]
  T* results_;  // [channels]
};

// Step 5.
template <typename T>
void add_pieces(const KeyConvBackwardParams& params, const T* piece_sums, int64_t num_pieces) {
  const KeyConvProblem& problem = params.problem;
  const int64_t width = problem.kernel_width, dim = problem.head_dim, num_sums = sums_per_head(params);
  T* grad_weight = params.grad_weight.at<T>();
  T* grad_bias = params.grad_bias.at<T>();
  for (int64_t h = 0; h < problem.num_heads; ++h) {
    for (int64_t l = 0; l < num_sums; ++l) {
      for (int64_t d = 0; d < dim; ++d) {
        T sum = 0;
        for (int64_t piece = 0; piece < num_pieces; ++piece) {
          sum += piece_sums[((piece * problem.num_heads + h) * num_sums + l) * dim + d];
        }
        if (l == width) {
          grad_bias[h * dim + d] = sum;
        } else if (grad_weight != nullptr) {
          grad_weight[(h * dim + d) * width + width - 1 - l] = sum;
        }
      }
    }
  }
}

template <typename Storage>
void key_conv_backward_storage(const KeyConvBackwardParams& params) {
  using T = ComputeOf<Storage>;
  using Task = KeyConvBackwardTask<Storage>;
  const KeyConvProblem& problem = params.problem;
  const int64_t numbers = problem.batch_size * problem.num_heads * problem.num_tokens * problem.head_dim;
  const bool needs_sums = params.grad_weight.data != nullptr || params.grad_bias.data != nullptr;
  if (numbers == 0) {
    if (needs_sums && problem.num_heads > 0) add_pieces<T>(params, nullptr, 0);
    return;
  }
  const auto has_neighbours = [&](const auto& keys) { return keys.strides[1] == problem.head_dim; };
  const KeyConvCut cut(problem,
                       has_neighbours(params.key) && has_neighbours(params.grad_out) && has_neighbours(params.grad_key),
                       KeyConvConfig::kTaskNumbers);
  const KeyConvPieces pieces(problem, cut);
  const int64_t piece_numbers = needs_sums ? problem.num_heads * sums_per_head(params) * problem.head_dim : 0;
  const AlignedBuffer piece_sums = allocate_aligned(static_cast<size_t>(pieces.num_pieces * piece_numbers) * sizeof(T));
  T* sums = needs_sums ? reinterpret_cast<T*>(piece_sums.get()) : nullptr;
  const int64_t num_tasks = pieces.num_pieces * cut.num_panels;
  const int num_workers =
      useful_threads(problem.num_threads, num_tasks,
                     static_cast<double>(numbers) * static_cast<double>(3 * problem.kernel_width + 16));
  const WorkerScratch scratch(num_workers, [&](ScratchCutter& cutter) { Task(params, cut, sums, cutter); });
  for_each_task(num_workers, num_tasks, [&](int64_t task, int worker) {
    ScratchCutter cutter = scratch.of(worker);
    Task(params, cut, sums, cutter).run(pieces, task / cut.num_panels, task % cut.num_panels);
  });
  if (needs_sums) add_pieces<T>(params, sums, pieces.num_pieces);
}

}  // namespace topgather::TOPGATHER_CPU_TARGET
