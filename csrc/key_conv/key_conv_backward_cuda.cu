// The key convolution on CUDA, backward.
//
//   d_s_t           = grad_out_t * sigmoid(s_t) * (1 + s_t * (1 - sigmoid(s_t)))     s_t as in the forward, again
//   grad_key_t      = grad_out_t + sum over l < W of weight[W - 1 - l] * d_s_{t+l}   within the sequence
//   grad_state_t    = the same for the W - 1 tokens before the first, which have no grad_out
//   grad_weight[W - 1 - l] = sum over t of d_s_t * key_{t-l}, over batch entries and sequences
//
// Who owns what: a thread owns four of a head's channels (one, where rows allow no vectors) and a run of tokens; a
// thread block owns neighbouring runs of the same channels. Steps:
//   1. key_conv_backward: a thread walks its run from the last token to the first, beginning W - 1 tokens after it,
//      with the rows that the current token sees and the d_s of the W - 1 tokens after it in registers;
//   2. the runs' sums for the weight meet in shared memory, one tap at a time, and the first run's threads add them up:
//      a piece for each thread block;
//   3. key_conv_sum_weight: a thread adds the pieces of one weight in order.
// Memory: keys and grad_out are read once, but for W - 1 rows a run, grad_key is written once; pieces are W * D float32
// for each thread block.
// Numerics: float32 sums, rounded once. Without tokens all sums are 0. A token of no sequence gets NaN, and adds
// nothing.
// Determinism: every sum has an order fixed by shapes and alignment.
#include <algorithm>

#include "key_conv_cuda.h"
#include "key_conv_rows_cuda.cuh"

namespace topgather {

namespace {
constexpr int kThreads = KeyConvCudaConfig::kThreads;
constexpr int kSumThreads = KeyConvCudaConfig::kSumThreads;
constexpr int kBackwardVector = 4;
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
  Array<void, 4> grad_key;        // [batch, head, token, D] dtype
  Array<void, 4> grad_state;      // [batch, head, W - 1, D] dtype, or data null
  float* pieces;                  // [batch, chunk, head, W, D] float32, by distance; or null
};

namespace {

template <int kVector>
struct SharedMemory {
  float sums[kThreads][kVector];  // of every thread, for one tap
};

// Step 1. Adds d_s_t * key_{t-l} of its tokens to sums[l].
template <typename Element, int kVector, int kTaps>
__device__ __forceinline__ void walk_run(const KeyConvBackwardArguments& args, const KeyPlace& place, int64_t first,
                                         int64_t last, float (&sums)[kTaps][kVector]) {
  using Row = Channels<Element, kVector>;
  const KeyConvShape& shape = args.shape;
  const bool is_packed = shape.cu_seqlens != nullptr;
  float taps[kTaps][kVector];
  load_taps(shape, args.weight, place, taps);
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
      float s = taps[0][c] * keys[0][c];
#pragma unroll
      for (int l = 1; l < kTaps; ++l) {
        if (l < shape.width) s = fmaf(taps[l][c], keys[l][c], s);
      }
      const float gate = sigmoid(s);
      d_s[c] = is_there ? grad[c] * gate * fmaf(s, 1.0f - gate, 1.0f) : 0.0f;
    }
    if (t < last) {
      float result[kVector];
#pragma unroll
      for (int c = 0; c < kVector; ++c) {
        result[c] = t < 0 ? 0.0f : fmaf(taps[0][c], d_s[c], grad[c]);
#pragma unroll
        for (int l = 1; l < kTaps; ++l) {
          if (l < shape.width) result[c] = fmaf(taps[l][c], later[l - 1][c], result[c]);
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

template <typename Element, int kVector, int kTaps>
__global__ void __launch_bounds__(kThreads, KeyConvCudaConfig::kBackwardBlocksPerProcessor)
    key_conv_backward(const KeyConvBackwardArguments args) {
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
  float sums[kTaps][kVector] = {};
  if (is_there && first < shape.num_tokens) {
    walk_run<Element, kVector, kTaps>(args, place, first, end < shape.num_tokens ? end : shape.num_tokens, sums);
  }
  if (args.pieces == nullptr) return;  // the whole thread block
  // Step 2.
  float* piece = args.pieces + (static_cast<int64_t>(batch_and_chunk) * shape.num_heads + head) * shape.width *
                                   static_cast<int64_t>(shape.head_dim);
#pragma unroll
  for (int l = 0; l < kTaps; ++l) {
    if (l < shape.width) {
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
          piece[l * static_cast<int64_t>(shape.head_dim) + place.column + c] = totals[c];
        }
      }
    }
  }
}

struct KeyConvSumArguments {
  uint32_t count;  // heads * W * D
  uint32_t head_dim;
  uint32_t width;
  int64_t num_pieces;
  const float* pieces;  // [num_pieces, head, W, D] float32, by distance
  float* grad_weight;   // [head, D, W] float32
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
  const uint32_t head = row / args.width, l = row - head * args.width;
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
    vectors_per_block = std::min<int64_t>(num_vectors, kThreads);
    runs_per_block = kThreads / vectors_per_block;
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

int64_t weights_of(const KeyConvProblem& problem) {
  return problem.num_heads * problem.kernel_width * problem.head_dim;
}

template <typename Element, int kVector>
void launch_backward(const KeyConvBackwardParams& params, float* pieces, cudaStream_t stream) {
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
  args.grad_key = params.grad_key;
  args.grad_state = params.grad_state;
  args.pieces = pieces;
  const cuda::LaunchShape shape{dim3(static_cast<unsigned>(blocks)), dim3(kThreads), sizeof(SharedMemory<kVector>),
                                stream};
  if (problem.kernel_width <= kFewTaps<kVector>) {
    cuda::launch(key_conv_backward<Element, kVector, kFewTaps<kVector>>, shape, args);
  } else {
    cuda::launch(key_conv_backward<Element, kVector, kKeyConvMaxTaps>, shape, args);
  }
  if (pieces == nullptr) return;
  KeyConvSumArguments sums{};
  require(weights_of(problem) <= INT32_MAX, "key_conv: the weight is too large for CUDA");
  sums.count = static_cast<uint32_t>(weights_of(problem));
  sums.head_dim = static_cast<uint32_t>(problem.head_dim);
  sums.width = static_cast<uint32_t>(problem.kernel_width);
  sums.num_pieces = cut.num_pieces(problem);
  sums.pieces = pieces;
  sums.grad_weight = params.grad_weight.at<float>();
  cuda::launch(key_conv_sum_weight<kSumThreads>,
               {dim3((sums.count + kSumThreads - 1) / kSumThreads), dim3(kSumThreads), 0, stream}, sums);
}

template <typename Element>
void backward_for(const KeyConvBackwardParams& params, float* pieces, cudaStream_t stream) {
  const auto has_vectors = [](const auto& keys) { return keys.has_aligned_rows(kBackwardVector * sizeof(Element)); };
  if (params.problem.head_dim % kBackwardVector == 0 && has_vectors(params.grad_out) && has_vectors(params.key) &&
      has_vectors(params.state) && has_vectors(params.grad_key) && has_vectors(params.grad_state)) {
    launch_backward<Element, kBackwardVector>(params, pieces, stream);
  } else {
    launch_backward<Element, 1>(params, pieces, stream);
  }
}

}  // namespace

int64_t key_conv_backward_workspace_bytes(const KeyConvBackwardParams& params, const CudaPlace&) {
  const KeyConvProblem& problem = params.problem;
  if (params.grad_weight.data == nullptr || key_conv_is_empty(problem)) return 0;
  // Alignment, which decides which of the two it is, is not known here.
  const int64_t pieces =
      std::max(BackwardCut(problem, 1).num_pieces(problem), BackwardCut(problem, kBackwardVector).num_pieces(problem));
  return pieces * weights_of(problem) * static_cast<int64_t>(sizeof(float));
}

void key_conv_backward_cuda(const KeyConvBackwardParams& params, const CudaWorkspace& workspace,
                            const CudaPlace& place) {
  const KeyConvProblem& problem = params.problem;
  const bool needs_grad_weight = params.grad_weight.data != nullptr;
  const DeviceGuard guard(place.device);
  const StageRange range("key_conv: backward");
  const auto stream = static_cast<cudaStream_t>(place.stream);
  if (key_conv_is_empty(problem)) {
    if (!needs_grad_weight || weights_of(problem) == 0) return;
    cuda_require(cudaMemsetAsync(params.grad_weight.data, 0, static_cast<size_t>(weights_of(problem)) * 4, stream),
                 "clearing the gradient of the weight");
    return;
  }
  require(workspace.bytes >= key_conv_backward_workspace_bytes(params, place),
          "key_conv_backward: the workspace is smaller than key_conv_backward_workspace_bytes says");
  auto* pieces = needs_grad_weight ? static_cast<float*>(workspace.data) : nullptr;
  with_element(problem.dtype, [&](auto element) { backward_for<decltype(element)>(params, pieces, stream); });
}

}  // namespace topgather
