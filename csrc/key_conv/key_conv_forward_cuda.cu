// The key convolution on CUDA, forward.
//
//   s_t   = sum over l < W of weight[W - 1 - l] * key_{t-l}     per head and channel, keys before the start being the
//   out_t = key_t + s_t / (1 + exp(-s_t))                       state's, or zeros
//
// Who owns what: a thread owns 16 bytes of a head's channels (one, where rows allow no vectors) and a run of tokens.
// Threads of one row stand side by side, then heads or runs, whichever lie closer, so that accesses coalesce. Steps:
//   1. weights and the W - 1 rows before the run go to registers;
//   2. the next kStep rows are loaded together; where W is a compile-time constant, one step before they are needed;
//   3. each token's result is made and written; the rows move on.
// Kernels: key_conv_forward takes dense problems whose rows are vectors, one instance for each W up to kMaxDenseWidth.
// key_conv_forward_any takes the others: packs, whose rows become zeros where a sequence begins, rows that allow no
// vectors, wider W, and options: s_t begins with a bias, and without SiLU out_t = key_t + s_t. Packs of few taps have an
// instance that does not know of options; beyond, a bias costs next to nothing.
// Memory: a key is read once, but for W - 1 rows a run, and a result written once.
// Numerics: float32 sums, terms in ascending l, rounded once; bfloat16 and float16 are storage types. Without tokens
// nothing is launched. A token of no sequence is NaN.
// Determinism: nothing is shared.
#include "key_conv_cuda.h"
#include "key_conv_rows_cuda.cuh"

namespace topgather {

namespace {
constexpr int kStep = KeyConvCudaConfig::kStep;
}  // namespace

struct KeyConvForwardArguments {
  KeyConvShape shape;
  uint32_t num_threads;
  uint32_t num_runs;  // of a head's tokens
  int32_t tokens_per_run;
  bool are_heads_closer;       // than runs
  Array<const void, 4> key;    // [batch, head, token, D] dtype
  Array<const void, 4> state;  // [batch, head, W - 1, D] dtype, or data null
  const float* weight;         // [head, D, W] float32
  const float* bias;           // [head, D] float32, or null; options only
  bool has_silu;               // options only
  Array<void, 4> out;          // [batch, head, token, D] dtype
};

namespace {

// The part of a problem that a thread walks: tokens [first, last) of some of a head's channels.
struct KeyRun {
  KeyPlace place;
  int64_t first;
  int64_t last;
};

__device__ __forceinline__ KeyRun run_of(const KeyConvForwardArguments& args, uint32_t thread, int vector) {
  const KeyConvShape& shape = args.shape;
  const uint32_t outside = thread / shape.num_vectors;
  const uint32_t inner_count = args.are_heads_closer ? shape.num_heads : args.num_runs;
  const uint32_t outer_count = args.are_heads_closer ? args.num_runs : shape.num_heads;
  const uint32_t rest = outside / inner_count, inner = outside - rest * inner_count;
  const uint32_t batch = rest / outer_count, outer = rest - batch * outer_count;
  const int64_t run = args.are_heads_closer ? outer : inner;
  const int64_t first = run * args.tokens_per_run;
  const int64_t end = first + args.tokens_per_run;
  return {{batch, args.are_heads_closer ? inner : outer,
           static_cast<int32_t>(thread - outside * shape.num_vectors) * vector},
          first,
          end < shape.num_tokens ? end : shape.num_tokens};
}

// Step 3. rows[kWidth - 1] is the token's own row, the rows before it stand before it.
template <typename Element, int kVector, int kWidth>
__device__ __forceinline__ void write_token(const float (&taps)[kWidth][kVector], const float (*rows)[kVector],
                                            Element* target) {
  float sums[kVector];
#pragma unroll
  for (int c = 0; c < kVector; ++c) sums[c] = taps[0][c] * rows[kWidth - 1][c];
#pragma unroll
  for (int l = 1; l < kWidth; ++l) {
#pragma unroll
    for (int c = 0; c < kVector; ++c) sums[c] = fmaf(taps[l][c], rows[kWidth - 1 - l][c], sums[c]);
  }
#pragma unroll
  for (int c = 0; c < kVector; ++c) sums[c] = fmaf(sums[c], sigmoid(sums[c]), rows[kWidth - 1][c]);
  Channels<Element, kVector>::store(sums, target);
}

}  // namespace

template <typename Element, int kVector, int kWidth>
__global__ void __launch_bounds__(kKeyConvThreads, KeyConvCudaConfig::kForwardBlocksPerProcessor<kVector * kWidth>)
    key_conv_forward(const KeyConvForwardArguments args) {
  using Row = Channels<Element, kVector>;
  constexpr int kHistory = kWidth - 1;
  const uint32_t thread = blockIdx.x * kKeyConvThreads + threadIdx.x;
  if (thread >= args.num_threads) return;
  const KeyRun run = run_of(args, thread, kVector);
  const KeyPlace& place = run.place;
  const Element* key = args.key.at<Element>(place.batch, place.head, run.first) + place.column;
  Element* out = args.out.at<Element>(place.batch, place.head, run.first) + place.column;
  const int64_t key_stride = args.key.strides[2], out_stride = args.out.strides[2];
  int num_left = static_cast<int>(run.last - run.first);

  Row next[kStep];
  const auto load_next = [&] {
#pragma unroll
    for (int i = 0; i < kStep; ++i) next[i].load(key + i * key_stride);
    key += kStep * key_stride;
  };
  if (num_left >= kStep) load_next();

  // Step 1. rows[kHistory + i] is the row of token t + i.
  float taps[kWidth][kVector], rows[kHistory + kStep][kVector];
  load_taps<kWidth>(args.shape, args.weight, place, taps);
#pragma unroll
  for (int j = 0; j < kHistory; ++j) {
    Row row;
    load_key(args.shape, args.key, args.state, place, run.first - kHistory + j, row);
    row.unpack(rows[j]);
  }
#pragma unroll 1
  while (num_left >= kStep) {
    // Step 2.
#pragma unroll
    for (int i = 0; i < kStep; ++i) next[i].unpack(rows[kHistory + i]);
    num_left -= kStep;
    if (num_left >= kStep) load_next();
#pragma unroll
    for (int i = 0; i < kStep; ++i) write_token<Element>(taps, rows + i, out + i * out_stride);
    out += kStep * out_stride;
#pragma unroll
    for (int j = 0; j < kHistory; ++j) {
#pragma unroll
      for (int c = 0; c < kVector; ++c) rows[j][c] = rows[j + kStep][c];
    }
  }
  // The fewer than kStep tokens at the end of a sequence.
#pragma unroll 1
  for (; num_left > 0; --num_left) {
    Row row;
    row.load(key);
    row.unpack(rows[kHistory]);
    write_token<Element>(taps, rows, out);
    key += key_stride;
    out += out_stride;
#pragma unroll
    for (int j = 0; j < kHistory; ++j) {
#pragma unroll
      for (int c = 0; c < kVector; ++c) rows[j][c] = rows[j + 1][c];
    }
  }
}

// A width below kTaps is a test, the same for all threads, and not a weight of zero, which would turn keys that are not
// finite into NaN.
template <typename Element, int kVector, int kTaps, bool kHasOptions>
__global__ void __launch_bounds__(kKeyConvThreads, KeyConvCudaConfig::kForwardBlocksPerProcessor<0>)
    key_conv_forward_any(const KeyConvForwardArguments args) {
  constexpr int kHistory = kTaps - 1;
  const KeyConvShape& shape = args.shape;
  const uint32_t thread = blockIdx.x * kKeyConvThreads + threadIdx.x;
  if (thread >= args.num_threads) return;
  const KeyRun run = run_of(args, thread, kVector);
  const KeyPlace& place = run.place;
  const int64_t first = run.first, last = run.last;

  // Step 1. window[kHistory + i] is the row of token t + i.
  float taps[kTaps][kVector];
  load_taps<0>(shape, args.weight, place, taps);
  float bias[kVector] = {};
  if constexpr (kHasOptions) load_bias(shape, args.bias, place, bias);
  Channels<Element, kVector> window[kHistory + kStep];
  KeySequence sequence = sequence_of(shape, first);
#pragma unroll
  for (int j = 0; j < kHistory; ++j) {
    const int64_t row = first - kHistory + j;
    if (row >= sequence.start || args.state.data != nullptr) {
      load_key(shape, args.key, args.state, place, row, window[j]);
    }
  }
#pragma unroll 1
  for (int64_t t = first; t < last; t += kStep) {
    // Step 2.
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      if (t + i < last) load_key(shape, args.key, args.state, place, t + i, window[kHistory + i]);
    }
    // Step 3.
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      if (t + i < last) {
        if (t + i >= sequence.end) {
          sequence = sequence_of(shape, t + i);
#pragma unroll
          for (int j = 0; j < kHistory + i; ++j) {
            if (t + j - kHistory < sequence.start) window[j].clear();
          }
        }
        float current[kVector], sums[kVector];
        window[kHistory + i].unpack(current);
#pragma unroll
        for (int c = 0; c < kVector; ++c) {
          sums[c] = kHasOptions ? fmaf(taps[0][c], current[c], bias[c]) : taps[0][c] * current[c];
        }
#pragma unroll
        for (int l = 1; l < kTaps; ++l) {
          if (l < shape.width) {
            float earlier[kVector];
            window[kHistory + i - l].unpack(earlier);
#pragma unroll
            for (int c = 0; c < kVector; ++c) sums[c] = fmaf(taps[l][c], earlier[c], sums[c]);
          }
        }
        const float absent = sequence.has(t + i) ? 0.0f : NAN;
#pragma unroll
        for (int c = 0; c < kVector; ++c) {
          if (kHasOptions && !args.has_silu) {
            sums[c] = sums[c] + current[c] + absent;
          } else {
            sums[c] = fmaf(sums[c], sigmoid(sums[c]), current[c]) + absent;
          }
        }
        Channels<Element, kVector>::store(sums, args.out.at<Element>(place.batch, place.head, t + i) + place.column);
      }
    }
#pragma unroll
    for (int j = 0; j < kHistory; ++j) window[j] = window[j + kStep];
  }
}

namespace {

template <typename Element, int kVector>
void launch_forward(const KeyConvForwardParams& params, cudaStream_t stream) {
  const KeyConvProblem& problem = params.problem;
  KeyConvForwardArguments args{};
  args.shape = key_conv_shape(problem, kVector);
  const int64_t rows = problem.batch_size * problem.num_heads * args.shape.num_vectors;
  int64_t tokens = KeyConvCudaConfig::kMaxForwardTokens;
  const auto threads = [&] { return rows * divide_up(problem.num_tokens, tokens); };
  while (tokens > KeyConvCudaConfig::kMinForwardTokens && threads() < KeyConvCudaConfig::kForwardThreads) tokens /= 2;
  require(threads() <= INT32_MAX, "key_conv: too many keys for one launch");
  args.num_threads = static_cast<uint32_t>(threads());
  args.num_runs = static_cast<uint32_t>(divide_up(problem.num_tokens, tokens));
  args.tokens_per_run = static_cast<int32_t>(tokens);
  args.are_heads_closer = params.key.strides[1] < params.key.strides[2];
  args.key = params.key;
  args.state = params.state;
  args.weight = params.weight.at<float>();
  args.bias = params.bias.at<float>();
  args.has_silu = problem.has_silu;
  args.out = params.out;
  const cuda::LaunchShape shape{dim3((args.num_threads + kKeyConvThreads - 1) / kKeyConvThreads), dim3(kKeyConvThreads),
                                0, stream};
  if constexpr (kVector > 1) {
    const bool is_dense = problem.cu_seqlens.data == nullptr;
    if (!problem.has_options && is_dense && problem.kernel_width <= kMaxDenseWidth) {
      return with_width<kMaxDenseWidth>(problem.kernel_width, [&](auto width) {
        cuda::launch(key_conv_forward<Element, kVector, width>, shape, args);
      });
    }
    if (problem.kernel_width <= kFewTaps) {
      const auto kernel = problem.has_options ? key_conv_forward_any<Element, kVector, kFewTaps, true>
                                              : key_conv_forward_any<Element, kVector, kFewTaps, false>;
      return cuda::launch(kernel, shape, args);
    }
  }
  cuda::launch(key_conv_forward_any<Element, kVector, kKeyConvMaxTaps, true>, shape, args);
}

template <typename Element>
void forward_for(const KeyConvForwardParams& params, cudaStream_t stream) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(Element));
  if (params.problem.head_dim % kVector == 0 && params.key.has_aligned_rows(16) && params.state.has_aligned_rows(16) &&
      params.out.has_aligned_rows(16)) {
    launch_forward<Element, kVector>(params, stream);
  } else {
    launch_forward<Element, 1>(params, stream);
  }
}

}  // namespace

void key_conv_forward_cuda(const KeyConvForwardParams& params, const CudaWorkspace&, const CudaPlace& place) {
  if (key_conv_is_empty(params.problem)) return;
  const DeviceGuard guard(place.device);
  const StageRange range("key_conv.forward");
  const auto stream = static_cast<cudaStream_t>(place.stream);
  with_element(params.problem.dtype, [&](auto element) { forward_for<decltype(element)>(params, stream); });
}

}  // namespace topgather
