// The only file of the CPU backend with intrinsics: what vector extensions cannot say.
//
// All: testing whether any lane of a mask is set, appending the lanes that pass a bound to a list. AVX-512 and ARM:
// float16 from and to float32. AVX-512: stores past the caches, scaling by a power of two, reciprocals, 16-bit integers
// widened, products of bytes. AVX512-BF16: products of pairs of bfloat16 numbers with float32 sums, rounding to them. AMX: the matrix unit
// of recent x86-64 processors, which multiplies A [16 rows, 32 deep] bfloat16 by B [32 deep, 16 columns] into C [16,
// 16] float32. B comes as pairs: one 32-bit word holds two consecutive depths of one column.
#pragma once

#include "../common/dtype.h"
#include "simd.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace topgather::TOPGATHER_CPU_TARGET {

// Two bfloat16 numbers that are multiplied with two others and added up in one step: consecutive in the sum.
struct BFloat16Pair {
  BFloat16 first;
  BFloat16 second;
};

// For lane masks as comparisons yield them: every lane 0 or -1.
template <typename Mask>
inline bool any_lane(const Mask& mask) {
  static_assert(sizeof(Mask) == kVectorBytes);
#if defined(__AVX512F__)
  const __m512i bits = bit_cast<__m512i>(mask);
  return _mm512_test_epi64_mask(bits, bits) != 0;
#elif defined(__AVX__)
  const __m256i bits = bit_cast<__m256i>(mask);
  return _mm256_testz_si256(bits, bits) == 0;
#elif defined(__x86_64__)
  return _mm_movemask_epi8(bit_cast<__m128i>(mask)) != 0;
#else
  int64_t words[kVectorBytes / 8];
  std::memcpy(words, &mask, sizeof(words));
  int64_t joined = 0;
  for (int i = 0; i < kVectorBytes / 8; ++i) joined |= words[i];
  return joined != 0;
#endif
}

// Appends the scores that are not below `bound`, NaN among them, and their positions to two lists, in lane order;
// returns how many. A whole vector may be written to each.
template <typename T>
inline int64_t append_not_below(const Vector<T>& scores, T bound, const IntegerVector<T>& positions, T* score_list,
                                typename VectorTraits<T>::IntegerElement* position_list) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const __m512 source = bit_cast<__m512>(scores);
    const __mmask16 kept = _mm512_cmp_ps_mask(source, _mm512_set1_ps(bound), _CMP_NLT_UQ);
    store<T>(score_list, _mm512_maskz_compress_ps(kept, source));
    store(position_list, _mm512_maskz_compress_epi32(kept, bit_cast<__m512i>(positions)));
    return __builtin_popcount(kept);
  } else {
    const __m512d source = bit_cast<__m512d>(scores);
    const __mmask8 kept = _mm512_cmp_pd_mask(source, _mm512_set1_pd(bound), _CMP_NLT_UQ);
    store<T>(score_list, _mm512_maskz_compress_pd(kept, source));
    store(position_list, _mm512_maskz_compress_epi64(kept, bit_cast<__m512i>(positions)));
    return __builtin_popcount(kept);
  }
#else
  const IntegerVector<T> below = scores < broadcast(bound);
  int64_t count = 0;
  for (int lane = 0; lane < kLanes<T>; ++lane) {
    score_list[count] = scores[lane];
    position_list[count] = positions[lane];
    count += 1 + below[lane];
  }
  return count;
#endif
}

// Stores a vector to `target`, aligned to it, past the caches, where kStreamsLines; else as any other. Before another
// thread reads it, the one that stored it calls finish_streaming().
#if defined(__AVX512F__)
inline constexpr bool kStreamsLines = true;  // a vector is a cache line: nothing is left to be merged with memory
template <typename T>
inline void stream(T* target, const Vector<T>& vector) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(target), bit_cast<__m512i>(vector));
}
inline void finish_streaming() { _mm_sfence(); }
#else
inline constexpr bool kStreamsLines = false;
template <typename T>
inline void stream(T* target, const Vector<T>& vector) {
  store<T>(target, vector);
}
inline void finish_streaming() {}
#endif

}  // namespace topgather::TOPGATHER_CPU_TARGET

#if defined(__AVX512F__)

namespace topgather::TOPGATHER_CPU_TARGET {

// x - floor(x); 0 for infinities, NaN for NaN.
inline Vector<float> fraction_above_floor(const Vector<float>& x) {
  // All lanes written, so the merge source is never read; naming it keeps compilers from warning of garbage in it.
  const __m512 source = bit_cast<__m512>(x);
  return bit_cast<Vector<float>>(
      _mm512_mask_reduce_ps(source, 0xffff, source, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
}

// x * 2^floor(exponent): 0 for an exponent of -inf, inf on overflow, NaN kept.
inline Vector<float> scale_by_floor_power(const Vector<float>& x, const Vector<float>& exponent) {
  const __m512 source = bit_cast<__m512>(x);
  return bit_cast<Vector<float>>(_mm512_mask_scalef_ps(source, 0xffff, source, bit_cast<__m512>(exponent)));
}

// Sixteen 16-bit integers without sign, in 32 bits each.
inline IntegerVector<float> widen_integers(const void* source) {
  __m256i halves;
  std::memcpy(&halves, source, sizeof(halves));
  return bit_cast<IntegerVector<float>>(_mm512_mask_cvtepu16_epi32(_mm512_setzero_si512(), 0xffff, halves));
}

// Sixteen float16 numbers.
inline Vector<float> widen_float16(const void* source) {
  __m256i halves;
  std::memcpy(&halves, source, sizeof(halves));
  return bit_cast<Vector<float>>(_mm512_mask_cvtph_ps(_mm512_setzero_ps(), 0xffff, halves));
}

// The nearest float16 numbers, ties to even.
inline void narrow_to_float16(const Vector<float>& vector, void* target) {
  const __m256i halves = _mm512_mask_cvtps_ph(_mm256_setzero_si256(), 0xffff, bit_cast<__m512>(vector),
                                              _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(target, &halves, sizeof(halves));
}

// 1 / x to a relative error of 2^-14; 0 for inf, NaN for NaN.
inline Vector<float> reciprocal_estimate(const Vector<float>& x) {
  const __m512 source = bit_cast<__m512>(x);
  return bit_cast<Vector<float>>(_mm512_mask_rcp14_ps(source, 0xffff, source));
}

// 1 / x of numbers from 1 to +inf, to about one unit in the last place, by one step of Newton's method: a division
// takes as long as an exponential. NaN for NaN.
inline Vector<float> reciprocal_from_one(const Vector<float>& x) {
  const Vector<float> estimate = reciprocal_estimate(x);
  const __m512 error = bit_cast<__m512>(1.0f - x * estimate);
  // Of inf the estimate is 0 and its error 0 times inf, a NaN, which this maximum drops.
  const __m512 bounded = _mm512_mask_max_ps(error, 0xffff, error, _mm512_set1_ps(-1.0f));
  return estimate + estimate * bit_cast<Vector<float>>(bounded);
}

// --- products of bytes (AVX-512 VNNI) ---------------------------------------------------------------------------
// An extension that not every processor with AVX-512 has: callers ask multiplies_bytes() and carry the attribute too.
#define TOPGATHER_MULTIPLIES_BYTES __attribute__((target("avx512vnni")))

// Adds to each 32-bit sum four products of unsigned bytes of `a` with signed ones of `b`. As assembly, for GCC copies
// the sums of the intrinsic.
TOPGATHER_MULTIPLIES_BYTES inline void add_byte_products(__m512i& sum, const __m512i& a, const __m512i& b) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}

// Of num_groups groups of kRows rows of unsigned bytes, the largest dot product with each of kVectors * 16 columns:
// maxima [num_groups, columns]. Columns are signed bytes, quads [depth / 4, columns, 4].
template <int kRows, int kVectors>
TOPGATHER_MULTIPLIES_BYTES __attribute__((noinline)) void group_maxima_of_byte_products(
    const uint8_t* rows, int64_t row_stride, int64_t num_groups, const int8_t* quads, int64_t num_quads,
    int32_t* maxima) {
  for (int64_t group = 0; group < num_groups; ++group, rows += kRows * row_stride) {
    __m512i sum[kRows][kVectors];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[i][v] = _mm512_setzero_si512();
    }
    const int8_t* column = quads;
    for (int64_t k = 0; k < num_quads; ++k, column += kVectors * 64) {
      __m512i quad[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) quad[v] = _mm512_loadu_si512(column + v * 64);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        int32_t bytes;
        std::memcpy(&bytes, rows + i * row_stride + 4 * k, sizeof(bytes));
        const __m512i row = _mm512_set1_epi32(bytes);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) add_byte_products(sum[i][v], row, quad[v]);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      IntegerVector<float> largest = bit_cast<IntegerVector<float>>(sum[0][v]);
#pragma GCC unroll 16
      for (int i = 1; i < kRows; ++i) largest = maximum(largest, bit_cast<IntegerVector<float>>(sum[i][v]));
      store(maxima + (group * kVectors + v) * 16, largest);
    }
  }
}

// Where byte_products_of_six puts the product of row i: kSixLanes has its bit, and kSixRows says i.
inline constexpr uint32_t kSixLanes = 0x030f;
inline const IntegerVector<float> kSixRows = {0, 1, 2, 3, 0, 0, 0, 0, 4, 5, 0, 0, 0, 0, 0, 0};

// Dot products of six rows of unsigned bytes with one of signed bytes, of `length` bytes each, a multiple of 64.
TOPGATHER_MULTIPLIES_BYTES __attribute__((always_inline)) inline __m512i byte_products_of_six(const uint8_t* rows,
                                                                                              int64_t row_stride,
                                                                                              const int8_t* column,
                                                                                              int64_t length) {
  __m512i sum[6];
#pragma GCC unroll 6
  for (int i = 0; i < 6; ++i) sum[i] = _mm512_setzero_si512();
  for (int64_t k = 0; k < length; k += 64) {
    const __m512i bytes = _mm512_loadu_si512(column + k);
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) add_byte_products(sum[i], _mm512_loadu_si512(rows + i * row_stride + k), bytes);
  }
  // With masks of all lanes: of the plain forms GCC warns that their unused source has no value.
  __m512i pairs[3];
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) {
    const __m512i low = _mm512_maskz_unpacklo_epi32(0xffff, sum[2 * i], sum[2 * i + 1]);
    const __m512i high = _mm512_maskz_unpackhi_epi32(0xffff, sum[2 * i], sum[2 * i + 1]);
    pairs[i] = _mm512_add_epi32(low, high);
  }
  __m512i quarters[2];  // of rows 0 to 3; of rows 4, 5, 4, 5
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512i low = _mm512_maskz_unpacklo_epi64(0xff, pairs[2 * i], pairs[i + 1]);
    const __m512i high = _mm512_maskz_unpackhi_epi64(0xff, pairs[2 * i], pairs[i + 1]);
    quarters[i] = _mm512_add_epi32(low, high);
  }
  const __m512i even = _mm512_maskz_shuffle_i32x4(0xffff, quarters[0], quarters[1], 0x44);
  const __m512i odd = _mm512_maskz_shuffle_i32x4(0xffff, quarters[0], quarters[1], 0xee);
  const __m512i halves = _mm512_add_epi32(even, odd);
  return _mm512_add_epi32(halves, _mm512_maskz_shuffle_i32x4(0xffff, halves, halves, 0xb1));
}

// Bit l is set where lane l of `values` is not below that of `bounds`.
inline uint32_t lanes_not_below(const IntegerVector<float>& values, const IntegerVector<float>& bounds) {
  return _mm512_cmpge_epi32_mask(bit_cast<__m512i>(values), bit_cast<__m512i>(bounds));
}

// The lanes that `mask` names, in order, to the front of target; a whole vector is written.
inline void store_lanes(int32_t* target, uint32_t mask, const IntegerVector<float>& values) {
  const __m512i chosen = _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), bit_cast<__m512i>(values));
  std::memcpy(target, &chosen, sizeof(chosen));
}

}  // namespace topgather::TOPGATHER_CPU_TARGET
#endif

#if defined(__AVX512BF16__)

namespace topgather::TOPGATHER_CPU_TARGET {

// The nearest bfloat16 numbers, ties to even, low's first.
inline void store_bfloat16(BFloat16* target, const Vector<float>& low, const Vector<float>& high) {
  const __m512bh rounded = _mm512_cvtne2ps_pbh(bit_cast<__m512>(high), bit_cast<__m512>(low));
  std::memcpy(target, &rounded, sizeof(rounded));
}

// pairs[p * pair_row + d] = element d of rows 2p and 2p + 1: B as the rows themselves. padded_count is even and
// padded_depth at least depth; what lies outside the rows is zero.
inline void pack_row_pairs(const BFloat16* rows, int64_t row_stride, int64_t count, int64_t padded_count, int64_t depth,
                           int64_t padded_depth, BFloat16Pair* pairs, int64_t pair_row) {
  for (int64_t p = 0; p < padded_count / 2; ++p) {
    BFloat16Pair* target = pairs + p * pair_row;
    const BFloat16* even = rows + 2 * p * row_stride;
    const BFloat16* odd = even + row_stride;
    if (2 * p + 1 < count) {
      for (int64_t d = 0; d < depth; ++d) target[d] = {even[d], odd[d]};
    } else {
      for (int64_t d = 0; d < depth; ++d) target[d] = {2 * p < count ? even[d] : BFloat16{0}, {0}};
    }
    for (int64_t d = depth; d < padded_depth; ++d) target[d] = {};
  }
}

}  // namespace topgather::TOPGATHER_CPU_TARGET
#endif

#if TOPGATHER_PAIR_PRODUCTS

namespace topgather::TOPGATHER_CPU_TARGET {

// Sixteen pairs of bfloat16 numbers.
using PairVector = IntegerVector<float>;

inline PairVector load_pairs(const BFloat16Pair* source) {
  PairVector pairs;
  std::memcpy(&pairs, source, sizeof(pairs));
  return pairs;
}

inline PairVector broadcast_pair(const BFloat16Pair* source) {
  int32_t bits;
  std::memcpy(&bits, source, sizeof(bits));
  return bits - PairVector{};
}

// Adds both products of every pair to its lane's sum. Subnormal numbers count as 0.
inline Vector<float> add_pair_products(const Vector<float>& sum, const PairVector& a, const PairVector& b) {
  return bit_cast<Vector<float>>(_mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(a), bit_cast<__m512bh>(b)));
}

// Lane i holds low[i] and high[i], rounded.
inline PairVector round_to_pairs(const Vector<float>& low, const Vector<float>& high) {
  const IntegerVector<float> place = {0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007,
                                      0x180008, 0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f};
  const __m512bh halves = _mm512_cvtne2ps_pbh(bit_cast<__m512>(high), bit_cast<__m512>(low));
  return bit_cast<PairVector>(_mm512_maskz_permutexvar_epi16(~0u, bit_cast<__m512i>(place), bit_cast<__m512i>(halves)));
}

}  // namespace topgather::TOPGATHER_CPU_TARGET
#endif

#if defined(__aarch64__)

namespace topgather::TOPGATHER_CPU_TARGET {

// Four float16 numbers.
inline Vector<float> widen_float16(const void* source) {
  float16x4_t halves;
  std::memcpy(&halves, source, sizeof(halves));
  return bit_cast<Vector<float>>(vcvt_f32_f16(halves));
}

// The nearest float16 numbers, ties to even.
inline void narrow_to_float16(const Vector<float>& vector, void* target) {
  const float16x4_t halves = vcvt_f16_f32(bit_cast<float32x4_t>(vector));
  std::memcpy(target, &halves, sizeof(halves));
}

}  // namespace topgather::TOPGATHER_CPU_TARGET
#endif

#if TOPGATHER_MATRIX_UNIT

namespace topgather::TOPGATHER_CPU_TARGET {

inline constexpr int64_t kAmxRows = 16;
inline constexpr int64_t kAmxDepth = 32;
inline constexpr int64_t kAmxPanel = 32;  // rows and columns of C that amx_panel_product makes at once

// Configures the unit for the lifetime of the guard: every tile register 16 rows of 64 bytes.
class AmxGuard {
 public:
  AmxGuard() {
    struct alignas(64) Configuration {
      uint8_t palette = 1;
      uint8_t start_row = 0;
      uint8_t reserved[14] = {};
      uint16_t bytes_per_row[16] = {};
      uint8_t rows[16] = {};
    } configuration;
    static_assert(sizeof(Configuration) == 64);
    for (int tile = 0; tile < 8; ++tile) {
      configuration.bytes_per_row[tile] = 64;
      configuration.rows[tile] = 16;
    }
    _tile_loadconfig(&configuration);
  }
  ~AmxGuard() { _tile_release(); }
  AmxGuard(const AmxGuard&) = delete;
  AmxGuard& operator=(const AmxGuard&) = delete;
};

// C [32, 32] = A [32, depth] x B [depth, 32]. a_row in bfloat16 elements, b_row in pairs, c_row in floats; depth
// a multiple of 32. With one_row_group only the first 16 rows are computed.
inline void amx_panel_product(const BFloat16* a, int64_t a_row, const BFloat16Pair* b, int64_t b_row, float* c,
                              int64_t c_row, int64_t depth, bool one_row_group) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < depth; k += kAmxDepth) {
    const BFloat16Pair* b_tile = b + k / 2 * b_row;
    _tile_loadd(4, a + k, a_row * 2);
    _tile_loadd(6, b_tile, b_row * 4);
    _tile_loadd(7, b_tile + kAmxRows, b_row * 4);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (!one_row_group) {
      _tile_loadd(5, a + kAmxRows * a_row + k, a_row * 2);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_row * 4);
  _tile_stored(1, c + kAmxRows, c_row * 4);
  if (!one_row_group) {
    _tile_stored(2, c + kAmxRows * c_row, c_row * 4);
    _tile_stored(3, c + kAmxRows * c_row + kAmxRows, c_row * 4);
  }
}

// pairs[p * pair_row + column] = depths 2p and 2p + 1 of rows[column], for column < padded_columns: B as the transpose
// of `count` rows. padded_depth and padded_columns are multiples of 32 and 16; what lies outside the rows is zero.
inline void pack_transposed_pairs(const BFloat16* rows, int64_t row_stride, int64_t count, int64_t depth,
                                  int64_t padded_depth, int64_t padded_columns, BFloat16Pair* pairs, int64_t pair_row) {
  for (int64_t first = 0; first < padded_columns; first += kAmxRows) {
    for (int64_t k = 0; k < padded_depth; k += kAmxDepth) {
      // Floats only carry the bits here; nothing computes with them.
      Vector<float> block[16];
      for (int i = 0; i < 16; ++i) {
        block[i] = Vector<float>{};
        if (first + i >= count) continue;
        const BFloat16* source = rows + (first + i) * row_stride + k;
        const int64_t left = min64(depth - k, kAmxDepth);
        if (left == kAmxDepth) {
          std::memcpy(&block[i], source, 64);
        } else if (left > 0) {
          std::memcpy(&block[i], source, static_cast<size_t>(left) * 2);
        }
      }
      transpose_in_registers<float>(block);
      for (int i = 0; i < 16; ++i) {
        std::memcpy(pairs + (k / 2 + i) * pair_row + first, &block[i], 64);
      }
    }
  }
}

}  // namespace topgather::TOPGATHER_CPU_TARGET

#endif
