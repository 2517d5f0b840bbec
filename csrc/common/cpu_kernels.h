// An op's CPU kernels: a struct of function pointers, one constant of it per instruction set.
#pragma once

#include "cpu_target.h"

#if defined(TOPGATHER_HAVE_X86_TARGETS)
#define TOPGATHER_X86_CASES(Kernels, avx512)      \
  case CpuTarget::kAvx2: return avx2::k##Kernels; \
  case CpuTarget::kAvx512: return avx512::k##Kernels;
#else
#define TOPGATHER_X86_CASES(Kernels, avx512)
#endif
#if defined(TOPGATHER_HAVE_AVX512_BF16)
#define TOPGATHER_AVX512_BF16_CASE(Kernels, avx512_bf16) \
  case CpuTarget::kAvx512Bf16: return avx512_bf16::k##Kernels;
#else
#define TOPGATHER_AVX512_BF16_CASE(Kernels, avx512_bf16)
#endif
#if defined(TOPGATHER_HAVE_AMX)
#define TOPGATHER_AMX_CASE(Kernels, amx) \
  case CpuTarget::kAmx: return amx::k##Kernels;
#else
#define TOPGATHER_AMX_CASE(Kernels, amx)
#endif

// Declares the constant k<Kernels> of every instruction set, and kernels_in_use(tag) that returns the one to call.
// The other arguments are the namespaces that such processors run: avx2 where wider vectors gain nothing, and avx512
// where nothing multiplies bfloat16.
#define TOPGATHER_CPU_KERNELS(Kernels, avx512, avx512_bf16, amx) \
  namespace baseline {                                           \
  extern const Kernels k##Kernels;                               \
  }                                                              \
  namespace avx2 {                                               \
  extern const Kernels k##Kernels;                               \
  }                                                              \
  namespace avx512 {                                             \
  extern const Kernels k##Kernels;                               \
  }                                                              \
  namespace avx512_bf16 {                                        \
  extern const Kernels k##Kernels;                               \
  }                                                              \
  namespace amx {                                                \
  extern const Kernels k##Kernels;                               \
  }                                                              \
  inline const Kernels& kernels_in_use(const Kernels*) {         \
    switch (cpu_target()) {                                      \
      TOPGATHER_X86_CASES(Kernels, avx512)                       \
      TOPGATHER_AVX512_BF16_CASE(Kernels, avx512_bf16)           \
      TOPGATHER_AMX_CASE(Kernels, amx)                           \
      default: return baseline::k##Kernels;                      \
    }                                                            \
  }
