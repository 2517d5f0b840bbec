// ldmatrix, mma and the 16-bit formats. Layouts as in the PTX ISA's tables for m8n8 and m16n8k16.
#include <cstring>

#include "rendezvous.h"
#include "shadow.h"
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace topgather::emulation {

// --- formats --------------------------------------------------------------------------------------------------------

namespace {

inline float float_of_half(uint16_t bits) {
#if defined(__F16C__)
  return _cvtsh_ss(bits);
#else
  const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fff) << 13;
  const float finite = std::bit_cast<float>(magnitude) * 0x1p112f;  // moves the bias, makes subnormals normal
  const uint32_t special = magnitude | 0x7f800000u;
  const uint32_t unsigned_bits = (bits & 0x7c00) == 0x7c00 ? special : std::bit_cast<uint32_t>(finite);
  return std::bit_cast<float>(unsigned_bits | static_cast<uint32_t>(bits & 0x8000) << 16);
#endif
}

inline uint16_t half_of_float(float value) {
#if defined(__F16C__)
  return static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
#else
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t rounded = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
  // Below 2^-14, adding 1/2 rounds onto the grid of the subnormals.
  if (magnitude < 0x38800000u) rounded = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  if (magnitude >= 0x47800000u) rounded = 0x7c00u;
  return static_cast<uint16_t>(rounded | (bits >> 16 & 0x8000u));
#endif
}

template <ElementKind kKind>
inline float element(uint32_t packed, int index) {
  const auto bits = static_cast<uint16_t>(index != 0 ? packed >> 16 : packed);
  if constexpr (kKind == ElementKind::kBFloat16) {
    return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  } else {
    return float_of_half(bits);
  }
}

}  // namespace

float float_of(ElementKind kind, uint16_t bits) {
  return kind == ElementKind::kBFloat16 ? element<ElementKind::kBFloat16>(bits, 0) : float_of_half(bits);
}

uint16_t bits_of(ElementKind kind, float value) {
  if (value != value) return 0x7fff;  // the NaN that cvt gives in both formats
  if (kind == ElementKind::kFloat16) return half_of_float(value);
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// --- ldmatrix -------------------------------------------------------------------------------------------------------

namespace {

struct MatrixLoadOperand {
  const unsigned char* row;
  uint32_t* fragment;
};

void load_matrices(void** operands, bool is_transposed) {
  ++statistics.matrix_loads;
  for (int matrix = 0; matrix < 4; ++matrix) {
    const unsigned char* rows[8];
    unsigned banks = 0;
    for (int r = 0; r < 8; ++r) {
      rows[r] = static_cast<MatrixLoadOperand*>(operands[8 * matrix + r])->row;
      const unsigned bank = 1u << (reinterpret_cast<uintptr_t>(rows[r]) / 16 % 8);
      statistics.bank_conflicts += (banks & bank) != 0;
      banks |= bank;
    }
    for (int lane = 0; lane < static_cast<int>(kLanes); ++lane) {
      uint32_t value;
      if (!is_transposed) {
        std::memcpy(&value, rows[lane / 4] + 4 * (lane % 4), 4);
      } else {
        uint16_t low, high;
        std::memcpy(&low, rows[2 * (lane % 4)] + 2 * (lane / 4), 2);
        std::memcpy(&high, rows[2 * (lane % 4) + 1] + 2 * (lane / 4), 2);
        value = low | static_cast<uint32_t>(high) << 16;
      }
      static_cast<MatrixLoadOperand*>(operands[lane])->fragment[matrix] = value;
    }
  }
}

}  // namespace

void load_matrix_x4(uint32_t* fragment, const void* shared_row, bool is_transposed) {
  const void* caller = __builtin_return_address(0);
  require_shared(shared_row, 16, "load_matrix_x4", caller);
  note_access(shared_row, 16, Access::kRead, caller);
  MatrixLoadOperand self{static_cast<const unsigned char*>(shared_row), fragment};
  rendezvous(kAllLanes, kMatrixLoad | is_transposed << kOperationBits, &self, caller,
             [is_transposed](void** operands, uint32_t) { load_matrices(operands, is_transposed); });
}

// --- mma ------------------------------------------------------------------------------------------------------------

namespace {

struct MatrixProductOperand {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

typedef float Row __attribute__((vector_size(32)));

template <ElementKind kKind>
void multiply_matrices(void** operands) {
  ++statistics.matrix_products;
  alignas(32) float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < static_cast<int>(kLanes); ++lane) {
    const auto& own = *static_cast<MatrixProductOperand*>(operands[lane]);
    const int row = lane / 4, column = lane % 4 * 2;
    for (int i = 0; i < 2; ++i) {
      a[row][column + i] = element<kKind>(own.a[0], i);
      a[row + 8][column + i] = element<kKind>(own.a[1], i);
      a[row][column + 8 + i] = element<kKind>(own.a[2], i);
      a[row + 8][column + 8 + i] = element<kKind>(own.a[3], i);
      b[column + i][row] = element<kKind>(own.b[0], i);
      b[column + 8 + i][row] = element<kKind>(own.b[1], i);
      d[row][column + i] = own.d[i];
      d[row + 8][column + i] = own.d[2 + i];
    }
  }
  for (int row = 0; row < 16; ++row) {
    Row sum = *reinterpret_cast<Row*>(d[row]);
    for (int k = 0; k < 16; ++k) sum += a[row][k] * *reinterpret_cast<Row*>(b[k]);
    *reinterpret_cast<Row*>(d[row]) = sum;
  }
  for (int lane = 0; lane < static_cast<int>(kLanes); ++lane) {
    float* own = static_cast<MatrixProductOperand*>(operands[lane])->d;
    const int row = lane / 4, column = lane % 4 * 2;
    for (int i = 0; i < 2; ++i) {
      own[i] = d[row][column + i];
      own[2 + i] = d[row + 8][column + i];
    }
  }
}

}  // namespace

void multiply_accumulate(ElementKind kind, float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
  MatrixProductOperand self{d, a, {b0, b1}};
  rendezvous(kAllLanes, kMatrixProduct | static_cast<int>(kind) << kOperationBits, &self, __builtin_return_address(0),
             [kind](void** operands, uint32_t) {
               if (kind == ElementKind::kBFloat16) {
                 multiply_matrices<ElementKind::kBFloat16>(operands);
               } else {
                 multiply_matrices<ElementKind::kFloat16>(operands);
               }
             });
}

}  // namespace topgather::emulation
