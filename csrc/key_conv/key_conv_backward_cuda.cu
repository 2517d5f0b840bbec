// The key convolution on CUDA, backward.
//
//   d_s_t           = grad_out_t * sigmoid(s_t) * (1 + s_t * (1 - sigmoid(s_t)))     s_t as in the forward, again
//   grad_key_t      = grad_out_t + sum over l < W of weight[W - 1 - l] * d_s_{t+l}   within the sequence
//   grad_state_t    = the same for the W - 1 tokens before the first, which have no grad_out
//   grad_weight[W - 1 - l] = sum over t of d_s_t * key_{t-l}, over batch entries and sequences
//   grad_bias              = sum over t of d_s_t, likewise
//
// Without SiLU d_s_t is grad_out_t.
//
// Who owns what: a thread owns 16 bytes of a head's channels (8 where W > kMaxWideWidth and elements have 2 bytes; one
// channel, where rows allow no vectors) and a run of tokens; a thread block owns neighbouring runs of the same channels.
// Steps:
//   1. a thread walks its run from the last token to the first, beginning W - 1 tokens after it, with the rows that the
//      current token sees and the d_s of the W - 1 tokens after it in registers. key_conv_backward takes dense problems
//      whose rows are vectors, one instance for each W up to kMaxDenseWidth: it takes kStep tokens at once, whose rows
//      were requested one step before. key_conv_backward_any takes the others, token by token, and options: a bias, or
//      no SiLU. Rows that are vectors have instances that do not know of options;
//   2. the runs' sums for the weight meet in shared memory, one tap at a time, and the first run's threads add them up:
//      a piece for each thread block;
//   3. key_conv_sum_weight: a thread adds the pieces of one weight in order.
// Memory: keys and grad_out are read once, but for W - 1 rows a run, grad_key is written once; pieces are W * D float32
// for each thread block, and D more where the bias has a gradient.
// Numerics: float32 sums, rounded once. Without tokens all sums are 0. A token of no sequence gets NaN, and adds
// nothing.
// Determinism: every sum has an order fixed by shapes and alignment.
#include <algorithm>

#include "key_conv_cuda.h"
#include "key_conv_rows_cuda.cuh"

namespace topgather {

namespace {
constexpr int kSumThreads = KeyConvCudaConfig::kSumThreads;
constexpr int kSmallVector = 4;  // channels of a thread, where rows allow vectors
// Up to so many taps a thread has registers for 16 bytes of any dtype.
constexpr int kMaxWideWidth = 4;
// The most channels of a thread: what the workspace must have room for depends on no alignment.
constexpr int kMaxVector = 8;

template <typename Element, int kWidth>
constexpr int kVectorOf = kWidth <= kMaxWideWidth ? 16 / static_cast<int>(sizeof(Element)) : kSmallVector;
}  // namespace

struct KeyConvBackwardArguments {
  KeyConvShape shape;
  uint32_t vectors_per_block;  // of a row
  uint32_t runs_per_block;
  uint32_t num_column_blocks;
  uint32_t num_chunks;  // thread blocks that a head's tokens take
  int32_t tokens_per_run;
  Array<const void, 4> grad_out;  // [batch, head, token, D] dtype
  Array<const void, 4> key;       // [batch, head, token, D] dtype
  Array<const void, 4> state;     // [batch, head, W - 1, D] dtype, or data null
  const float* weight;            // [head, D, W] float32
  const float* bias;              // [head, D] float32, or null; options only
  bool has_silu;                  // options only
  bool has_grad_bias;             // options only
  int32_t sums_per_head;          // W, and one more for the gradient of the bias
  Array<void, 4> grad_key;        // [batch, head, token, D] dtype
  Array<void, 4> grad_state;      // [batch, head, W - 1, D] dtype, or data null
  float* pieces;                  // [batch, chunk, head, sums_per_head, D] float32, by distance; or null
};

namespace {

template <int kVector>
struct SharedMemory {
  float sums[kKeyConvThreads][kVector];  // of every thread, for one tap
};

// Registers of a thread that walks a run of a dense problem, kStep tokens at once: with t the last of them,
// keys[kStep - 1 + j] is the row of token t - (W - 1) + j, and slopes[kStep - 1 + l] is d_s_{t+l}.
template <int kVector, int kWidth>
struct WalkState {
  static constexpr int kHistory = kWidth - 1;
  static constexpr int kStep = KeyConvCudaConfig::kBackwardStep;

  float taps[kWidth][kVector];
  float keys[kHistory + kStep][kVector];
  float slopes[kStep + kHistory][kVector];

  // d_s of the token i before the last.
  __device__ __forceinline__ void find_slope(int i, const float (&grad)[kVector]) {
    const auto& own_keys = keys[kStep - 1 - i + kHistory];
#pragma unroll
    for (int c = 0; c < kVector; ++c) {
      float s = taps[0][c] * own_keys[c];
#pragma unroll
      for (int l = 1; l < kWidth; ++l) s = fmaf(taps[l][c], keys[kStep - 1 - i + kHistory - l][c], s);
      const float gate = sigmoid(s);
      slopes[kStep - 1 - i][c] = grad[c] * gate * fmaf(s, 1.0f - gate, 1.0f);
    }
  }

  // grad += weight * d_s over the tokens that see the key of the token i before the last.
  __device__ __forceinline__ void add_slopes(int i, float (&grad)[kVector]) const {
#pragma unroll
    for (int l = 0; l < kWidth; ++l) {
#pragma unroll
      for (int c = 0; c < kVector; ++c) grad[c] = fmaf(taps[l][c], slopes[kStep - 1 - i + l][c], grad[c]);
    }
  }

  __device__ __forceinline__ void add_to_weight(int i, float (&sums)[kWidth][kVector]) const {
#pragma unroll
    for (int l = 0; l < kWidth; ++l) {
#pragma unroll
      for (int c = 0; c < kVector; ++c) {
        sums[l][c] = fmaf(slopes[kStep - 1 - i][c], keys[kStep - 1 - i + kHistory - l][c], sums[l][c]);
      }
    }
  }

  // The last token is now the one `count` before.
  template <int kCount>
  __device__ __forceinline__ void move_on() {
#pragma unroll
    for (int j = kHistory - 1; j >= 0; --j) {
#pragma unroll
      for (int c = 0; c < kVector; ++c) {
        keys[kStep + j][c] = keys[kStep + j - kCount][c];
        slopes[kStep + j][c] = slopes[kStep + j - kCount][c];
      }
    }
  }
};

// Step 1 of a dense problem. Adds d_s_t * key_{t-l} of its tokens to sums[l].
template <typename Element, int kVector, int kWidth>
__device__ __forceinline__ void walk_dense_run(const KeyConvBackwardArguments& args, const KeyPlace& place,
                                               int64_t first, int64_t last, float (&sums)[kWidth][kVector]) {
  using Row = Channels<Element, kVector>;
  using State = WalkState<kVector, kWidth>;
  constexpr int kHistory = State::kHistory, kStep = State::kStep;
  const KeyConvShape& shape = args.shape;
  State state;
  load_taps<kWidth>(shape, args.weight, place, state.taps);
#pragma unroll
  for (int j = 0; j < kHistory; ++j) {
    Row row;
    load_key(shape, args.key, args.state, place, last + j, row);
    row.unpack(state.keys[kStep + j]);
#pragma unroll
    for (int c = 0; c < kVector; ++c) state.slopes[kStep + j][c] = 0.0f;
  }
  // One token with whatever can be: after the run, after the last token, or before the first, where the state's are.
  const auto take_one = [&](int64_t t) {
    Row row, grad_row;
    load_key(shape, args.key, args.state, place, t - kHistory, row);
    row.unpack(state.keys[kStep - 1]);
    const bool is_there = t >= 0 && t < shape.num_tokens;
    if (is_there) grad_row.load(args.grad_out.at<Element>(place.batch, place.head, t) + place.column);
    float grad[kVector];
    grad_row.unpack(grad);
    state.find_slope(0, grad);
    if (!is_there) {  // whatever the keys are
#pragma unroll
      for (int c = 0; c < kVector; ++c) state.slopes[kStep - 1][c] = 0.0f;
    }
    if (t < last) {
      state.add_slopes(0, grad);
      if (is_there) {
        Row::store(grad, args.grad_key.at<Element>(place.batch, place.head, t) + place.column);
        state.add_to_weight(0, sums);
      } else {
        Row::store(grad, args.grad_state.at<Element>(place.batch, place.head, t + kHistory) + place.column);
      }
    }
    state.template move_on<1>();
  };
  // Tokens from t down to t - kStep + 1, and so on while they are all of the run and see no row before the first.
  const int64_t lowest = (first > kHistory ? first : kHistory) + kStep - 1;
  const auto take_steps = [&](int64_t t) {
    const int64_t grad_stride = args.grad_out.strides[2], key_stride = args.key.strides[2];
    const int64_t grad_key_stride = args.grad_key.strides[2];
    const Element* grad_out = args.grad_out.at<Element>(place.batch, place.head, t) + place.column;
    const Element* key = args.key.at<Element>(place.batch, place.head, t - kHistory) + place.column;
    Element* grad_key = args.grad_key.at<Element>(place.batch, place.head, t) + place.column;
    Row next_grads[kStep], next_keys[kStep];
    const auto load_next = [&] {
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        next_grads[i].load(grad_out - i * grad_stride);
        next_keys[i].load(key - i * key_stride);
      }
      grad_out -= kStep * grad_stride;
      key -= kStep * key_stride;
    };
    load_next();
#pragma unroll 1
    for (; t >= lowest; t -= kStep) {
      float grads[kStep][kVector];
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        next_grads[i].unpack(grads[i]);
        next_keys[i].unpack(state.keys[kStep - 1 - i]);
      }
      if (t - kStep >= lowest) load_next();
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        state.find_slope(i, grads[i]);
        state.add_slopes(i, grads[i]);
        Row::store(grads[i], grad_key - i * grad_key_stride);
        state.add_to_weight(i, sums);
      }
      grad_key -= kStep * grad_key_stride;
      state.template move_on<kStep>();
    }
    return t;
  };
  const int64_t stop = first == 0 && args.grad_state.data != nullptr ? -kHistory : first;
  int64_t t = last - 1 + kHistory;
#pragma unroll 1
  while (t >= stop) {
    if (t < last && t >= lowest) {
      t = take_steps(t);
    } else {
      take_one(t--);
    }
  }
}

// Step 1 of any problem, with the state in the same registers. A width below kTaps is a test, the same for all threads,
// and not a weight of zero, which would turn keys that are not finite into NaN.
template <typename Element, int kVector, int kTaps, bool kHasOptions>
__device__ __forceinline__ void walk_any_run(const KeyConvBackwardArguments& args, const KeyPlace& place, int64_t first,
                                             int64_t last, float (&sums)[kTaps + kHasOptions][kVector]) {
  using Row = Channels<Element, kVector>;
  const KeyConvShape& shape = args.shape;
  const bool is_packed = shape.cu_seqlens != nullptr;
  float taps[kTaps][kVector];
  load_taps<0>(shape, args.weight, place, taps);
  float bias[kVector] = {};
  if constexpr (kHasOptions) load_bias(shape, args.bias, place, bias);
  const auto load_grad = [&](int64_t row, Row& channels) {
    channels.clear();
    if (row >= 0 && row < shape.num_tokens) {
      channels.load(args.grad_out.at<Element>(place.batch, place.head, row) + place.column);
    }
  };
  Row window[kTaps];                     // window[l]: key_{t-l}
  float later[kTaps - 1][kVector] = {};  // later[l]: d_s_{t+1+l}
  int64_t t = last - 1 + shape.width - 1;
#pragma unroll
  for (int l = 0; l < kTaps; ++l) load_key(shape, args.key, args.state, place, t - l, window[l]);
  Row next_grad;
  load_grad(t, next_grad);
  KeySequence sequence{0, 0};
  const int64_t stop = first == 0 && args.grad_state.data != nullptr ? 1 - shape.width : first;
#pragma unroll 1
  for (; t >= stop; --t) {
    // Prefetches what the next token needs.
    Row next_row;
    load_key(shape, args.key, args.state, place, t - kTaps, next_row);
    float grad[kVector];
    next_grad.unpack(grad);
    load_grad(t - 1, next_grad);

    if (!sequence.has(t)) sequence = sequence_of(shape, t);
    const bool is_there = sequence.has(t);
    if (t + 1 >= sequence.end) {  // tokens after it are of another sequence
#pragma unroll
      for (int l = 0; l < kTaps - 1; ++l) {
#pragma unroll
        for (int c = 0; c < kVector; ++c) later[l][c] = 0.0f;
      }
    }
    float keys[kTaps][kVector], d_s[kVector] = {};
#pragma unroll
    for (int l = 0; l < kTaps; ++l) {
      Row row = window[l];
      if (is_packed && t - l < sequence.start) row.clear();
      row.unpack(keys[l]);
    }
#pragma unroll
    for (int c = 0; c < kVector; ++c) {
      float s = kHasOptions ? fmaf(taps[0][c], keys[0][c], bias[c]) : taps[0][c] * keys[0][c];
#pragma unroll
      for (int l = 1; l < kTaps; ++l) {
        if (l < shape.width) s = fmaf(taps[l][c], keys[l][c], s);
      }
      const float gate = sigmoid(s);
      d_s[c] = is_there ? grad[c] * gate * fmaf(s, 1.0f - gate, 1.0f) : 0.0f;
      if (kHasOptions && !args.has_silu) d_s[c] = is_there ? grad[c] : 0.0f;
    }
    if (t < last) {
      float result[kVector];
#pragma unroll
      for (int c = 0; c < kVector; ++c) {
        result[c] = t < 0 ? 0.0f : fmaf(taps[0][c], d_s[c], grad[c]);
#pragma unroll
        for (int l = 1; l < kTaps; ++l) {
          // Where tokens pass nothing back, a tap that is not finite would make NaN of zeros; SiLU's slope is NaN then.
          const bool passes = !kHasOptions || (t + l >= sequence.start && t + l < sequence.end);
          if (l < shape.width && passes) result[c] = fmaf(taps[l][c], later[l - 1][c], result[c]);
        }
      }
      if (t < 0) {
        Row::store(result, args.grad_state.at<Element>(place.batch, place.head, t + shape.width - 1) + place.column);
      } else {
        const float absent = is_there ? 0.0f : NAN;
#pragma unroll
        for (int c = 0; c < kVector; ++c) result[c] += absent;
        Row::store(result, args.grad_key.at<Element>(place.batch, place.head, t) + place.column);
        if (is_there) {
#pragma unroll
          for (int l = 0; l < kTaps; ++l) {
            if (l < shape.width) {
#pragma unroll
              for (int c = 0; c < kVector; ++c) sums[l][c] = fmaf(d_s[c], keys[l][c], sums[l][c]);
            }
          }
          if constexpr (kHasOptions) {
#pragma unroll
            for (int c = 0; c < kVector; ++c) sums[kTaps][c] += d_s[c];
          }
        }
      }
    }
#pragma unroll
    for (int l = kTaps - 2; l > 0; --l) {
#pragma unroll
      for (int c = 0; c < kVector; ++c) later[l][c] = later[l - 1][c];
    }
#pragma unroll
    for (int c = 0; c < kVector; ++c) later[0][c] = d_s[c];
#pragma unroll
    for (int l = 0; l < kTaps - 1; ++l) window[l] = window[l + 1];
    window[kTaps - 1] = next_row;
  }
}

}  // namespace

namespace {

// A thread block's part of the problem. kIsDense: kTaps is the width.
template <typename Element, int kVector, int kTaps, bool kIsDense, bool kHasOptions>
__device__ __forceinline__ void walk_and_sum(const KeyConvBackwardArguments& args) {
  SharedMemory<kVector>& shared = *reinterpret_cast<SharedMemory<kVector>*>(cuda::dynamic_shared_memory());
  const KeyConvShape& shape = args.shape;
  const uint32_t column_block = blockIdx.x % args.num_column_blocks, rest = blockIdx.x / args.num_column_blocks;
  const uint32_t head = rest % shape.num_heads, batch_and_chunk = rest / shape.num_heads;
  const uint32_t chunk = batch_and_chunk % args.num_chunks;
  const uint32_t run = threadIdx.x / args.vectors_per_block;
  const uint32_t vector = threadIdx.x - run * args.vectors_per_block + column_block * args.vectors_per_block;
  const KeyPlace place{batch_and_chunk / args.num_chunks, head, static_cast<int32_t>(vector) * kVector};
  const int64_t first = (static_cast<int64_t>(chunk) * args.runs_per_block + run) * args.tokens_per_run;
  const int64_t end = first + args.tokens_per_run;
  const bool is_there = run < args.runs_per_block && vector < shape.num_vectors;
  constexpr int kSums = kTaps + kHasOptions;
  float sums[kSums][kVector] = {};
  if (is_there && first < shape.num_tokens) {
    const int64_t last = end < shape.num_tokens ? end : shape.num_tokens;
    if constexpr (kIsDense) {
      walk_dense_run<Element>(args, place, first, last, sums);
    } else {
      walk_any_run<Element, kVector, kTaps, kHasOptions>(args, place, first, last, sums);
    }
  }
  if (args.pieces == nullptr) return;  // the whole thread block
  // Step 2.
  float* piece = args.pieces + (static_cast<int64_t>(batch_and_chunk) * shape.num_heads + head) * args.sums_per_head *
                                   static_cast<int64_t>(shape.head_dim);
#pragma unroll
  for (int l = 0; l < kSums; ++l) {
    const bool is_bias = kHasOptions && l == kTaps;
    if (is_bias ? args.has_grad_bias : l < shape.width) {
      // Tells all threads that the sums of the tap before have been added and may be overwritten.
      if (l > 0) __syncthreads();
#pragma unroll
      for (int c = 0; c < kVector; ++c) shared.sums[threadIdx.x][c] = sums[l][c];
      // Publishes every run's sums to the first run's threads.
      __syncthreads();
      if (is_there && run == 0) {
        float totals[kVector] = {};
        for (uint32_t r = 0; r < args.runs_per_block; ++r) {
#pragma unroll
          for (int c = 0; c < kVector; ++c) totals[c] += shared.sums[threadIdx.x + r * args.vectors_per_block][c];
        }
#pragma unroll
        for (int c = 0; c < kVector; ++c) {
          piece[(is_bias ? shape.width : l) * static_cast<int64_t>(shape.head_dim) + place.column + c] = totals[c];
        }
      }
    }
  }
}

}  // namespace

template <typename Element, int kVector, int kWidth>
__global__ void __launch_bounds__(kKeyConvThreads, KeyConvCudaConfig::kBackwardBlocksPerProcessor)
    key_conv_backward(const KeyConvBackwardArguments args) {
  walk_and_sum<Element, kVector, kWidth, true, false>(args);
}

template <typename Element, int kVector, int kTaps, bool kHasOptions>
__global__ void __launch_bounds__(kKeyConvThreads, KeyConvCudaConfig::kBackwardBlocksPerProcessor)
    key_conv_backward_any(const KeyConvBackwardArguments args) {
  walk_and_sum<Element, kVector, kTaps, false, kHasOptions>(args);
}

struct KeyConvSumArguments {
  uint32_t count;  // heads * sums_per_head * D
  uint32_t head_dim;
  uint32_t width;
  uint32_t sums_per_head;
  int64_t num_pieces;
  const float* pieces;  // [num_pieces, head, sums_per_head, D] float32, by distance, then the bias's
  float* grad_weight;   // [head, D, W] float32, or null
  float* grad_bias;     // [head, D] float32, where there is one sum more than taps
};

// Step 3.
template <int kBlockThreads>
__global__ void __launch_bounds__(kBlockThreads, 4) key_conv_sum_weight(const KeyConvSumArguments args) {
  const uint32_t i = blockIdx.x * kBlockThreads + threadIdx.x;
  if (i >= args.count) return;
  float sum = 0.0f;
#pragma unroll 8
  for (int64_t piece = 0; piece < args.num_pieces; ++piece) sum += args.pieces[piece * args.count + i];
  const uint32_t row = i / args.head_dim, d = i - row * args.head_dim;
  const uint32_t head = row / args.sums_per_head, l = row - head * args.sums_per_head;
  if (l == args.width) args.grad_bias[static_cast<int64_t>(head) * args.head_dim + d] = sum;
  if (l == args.width || args.grad_weight == nullptr) return;
  args.grad_weight[(static_cast<int64_t>(head) * args.head_dim + d) * args.width + args.width - 1 - l] = sum;
}

namespace {

// How the backward cuts a problem, by shapes and alignment.
struct BackwardCut {
  int64_t vectors_per_block;
  int64_t runs_per_block;
  int64_t num_column_blocks;
  int64_t tokens_per_run;
  int64_t num_chunks;

  BackwardCut(const KeyConvProblem& problem, int64_t vector) {
    const int64_t num_vectors = divide_up(problem.head_dim, vector);
    vectors_per_block = std::min<int64_t>(num_vectors, kKeyConvThreads);
    runs_per_block = kKeyConvThreads / vectors_per_block;
    num_column_blocks = divide_up(num_vectors, vectors_per_block);
    tokens_per_run = KeyConvCudaConfig::kMinBackwardTokens;
    const int64_t rows = problem.batch_size * problem.num_heads * num_vectors;
    while (tokens_per_run < problem.num_tokens &&
           rows * divide_up(problem.num_tokens, tokens_per_run) > KeyConvCudaConfig::kBackwardThreads) {
      tokens_per_run *= 2;
    }
    num_chunks = divide_up(problem.num_tokens, tokens_per_run * runs_per_block);
  }

  int64_t num_pieces(const KeyConvProblem& problem) const { return problem.batch_size * num_chunks; }
};

int64_t sums_per_head(const KeyConvBackwardParams& params) {
  return params.problem.kernel_width + (params.grad_bias.data != nullptr ? 1 : 0);
}

// Sums of a piece, as many as weights and biases have gradients.
int64_t sums_of(const KeyConvBackwardParams& params) {
  return params.problem.num_heads * sums_per_head(params) * params.problem.head_dim;
}

bool needs_sums(const KeyConvBackwardParams& params) {
  return params.grad_weight.data != nullptr || params.grad_bias.data != nullptr;
}

template <int kVector, typename Kernel>
void launch_backward(const KeyConvBackwardParams& params, float* pieces, cudaStream_t stream, Kernel kernel) {
  const KeyConvProblem& problem = params.problem;
  const BackwardCut cut(problem, kVector);
  const int64_t blocks = cut.num_pieces(problem) * problem.num_heads * cut.num_column_blocks;
  require(blocks <= INT32_MAX && cut.tokens_per_run <= INT32_MAX, "key_conv: too many keys for one launch");
  KeyConvBackwardArguments args{};
  args.shape = key_conv_shape(problem, kVector);
  args.vectors_per_block = static_cast<uint32_t>(cut.vectors_per_block);
  args.runs_per_block = static_cast<uint32_t>(cut.runs_per_block);
  args.num_column_blocks = static_cast<uint32_t>(cut.num_column_blocks);
  args.num_chunks = static_cast<uint32_t>(cut.num_chunks);
  args.tokens_per_run = static_cast<int32_t>(cut.tokens_per_run);
  args.grad_out = params.grad_out;
  args.key = params.key;
  args.state = params.state;
  args.weight = params.weight.at<float>();
  args.bias = params.bias.at<float>();
  args.has_silu = problem.has_silu;
  args.has_grad_bias = params.grad_bias.data != nullptr;
  args.sums_per_head = static_cast<int32_t>(sums_per_head(params));
  args.grad_key = params.grad_key;
  args.grad_state = params.grad_state;
  args.pieces = pieces;
  cuda::launch(kernel,
               {dim3(static_cast<unsigned>(blocks)), dim3(kKeyConvThreads), sizeof(SharedMemory<kVector>), stream},
               args);
  if (pieces == nullptr) return;
  KeyConvSumArguments sums{};
  require(sums_of(params) <= INT32_MAX, "key_conv: the weight is too large for CUDA");
  sums.count = static_cast<uint32_t>(sums_of(params));
  sums.head_dim = static_cast<uint32_t>(problem.head_dim);
  sums.width = static_cast<uint32_t>(problem.kernel_width);
  sums.sums_per_head = static_cast<uint32_t>(sums_per_head(params));
  sums.num_pieces = cut.num_pieces(problem);
  sums.pieces = pieces;
  sums.grad_weight = params.grad_weight.at<float>();
  sums.grad_bias = params.grad_bias.at<float>();
  cuda::launch(key_conv_sum_weight<kSumThreads>,
               {dim3((sums.count + kSumThreads - 1) / kSumThreads), dim3(kSumThreads), 0, stream}, sums);
}

template <typename Element, int kVector>
bool has_vectors(const KeyConvBackwardParams& params) {
  constexpr int64_t kBytes = kVector * static_cast<int64_t>(sizeof(Element));
  const auto is_aligned = [](const auto& keys) { return keys.has_aligned_rows(kBytes); };
  return params.problem.head_dim % kVector == 0 && is_aligned(params.grad_out) && is_aligned(params.key) &&
         is_aligned(params.state) && is_aligned(params.grad_key) && is_aligned(params.grad_state);
}

// Any problem, with options or without.
template <typename Element>
void backward_any_for(const KeyConvBackwardParams& params, float* pieces, cudaStream_t stream) {
  constexpr int kVector = kSmallVector;
  const bool has_options = params.problem.has_options;
  if (!has_vectors<Element, kVector>(params)) {
    launch_backward<1>(params, pieces, stream, key_conv_backward_any<Element, 1, kKeyConvMaxTaps, true>);
  } else if (params.problem.kernel_width <= kFewTaps) {
    launch_backward<kVector>(params, pieces, stream,
                             has_options ? key_conv_backward_any<Element, kVector, kFewTaps, true>
                                         : key_conv_backward_any<Element, kVector, kFewTaps, false>);
  } else {
    launch_backward<kVector>(params, pieces, stream,
                             has_options ? key_conv_backward_any<Element, kVector, kKeyConvMaxTaps, true>
                                         : key_conv_backward_any<Element, kVector, kKeyConvMaxTaps, false>);
  }
}

template <typename Element>
void backward_for(const KeyConvBackwardParams& params, float* pieces, cudaStream_t stream) {
  const KeyConvProblem& problem = params.problem;
  if (!problem.has_options && problem.cu_seqlens.data == nullptr && problem.kernel_width <= kMaxDenseWidth) {
    const bool is_done = with_width<kMaxDenseWidth>(problem.kernel_width, [&](auto width) {
      constexpr int kVector = kVectorOf<Element, width>;
      if (!has_vectors<Element, kVector>(params)) return false;
      launch_backward<kVector>(params, pieces, stream, key_conv_backward<Element, kVector, width>);
      return true;
    });
    if (is_done) return;
  }
  backward_any_for<Element>(params, pieces, stream);
}

}  // namespace

int64_t key_conv_backward_workspace_bytes(const KeyConvBackwardParams& params, const CudaPlace&) {
  const KeyConvProblem& problem = params.problem;
  if (!needs_sums(params) || key_conv_is_empty(problem)) return 0;
  // Alignment, which decides which of the two it is, is not known here.
  int64_t pieces = 0;
  for (const int vector : {1, kSmallVector, kMaxVector}) {
    pieces = std::max(pieces, BackwardCut(problem, vector).num_pieces(problem));
  }
  return pieces * sums_of(params) * static_cast<int64_t>(sizeof(float));
}

void key_conv_backward_cuda(const KeyConvBackwardParams& params, const CudaWorkspace& workspace,
                            const CudaPlace& place) {
  const KeyConvProblem& problem = params.problem;
  const DeviceGuard guard(place.device);
  const StageRange range("key_conv.backward");
  const auto stream = static_cast<cudaStream_t>(place.stream);
  if (key_conv_is_empty(problem)) {
    const auto clear = [&](void* gradient, int64_t count) {
      if (gradient == nullptr || count == 0) return;
      cuda_require(cudaMemsetAsync(gradient, 0, static_cast<size_t>(count) * sizeof(float), stream),
                   "clearing gradients of weight and bias");
    };
    const int64_t channels = problem.num_heads * problem.head_dim;
    clear(params.grad_weight.data, channels * problem.kernel_width);
    clear(params.grad_bias.data, channels);
    return;
  }
  require(workspace.bytes >= key_conv_backward_workspace_bytes(params, place),
          "key_conv_backward: the workspace is smaller than key_conv_backward_workspace_bytes says");
  auto* pieces = needs_sums(params) ? static_cast<float*>(workspace.data) : nullptr;
  with_element(problem.dtype, [&](auto element) { backward_for<decltype(element)>(params, pieces, stream); });
}

}  // namespace topgather
