// std::atomic and guarded statics in the launchers, which are compiled with -fsanitize=thread along with the kernels
// and call these. Plain atomics here; kernels have their own primitives.
#if defined(TOPGATHER_EMULATION_CHECKED)

#include "state.h"

namespace {

void require_host(const void* caller) {
  if (topgather::emulation::in_kernel()) topgather::emulation::fail("std::atomic in a kernel", caller);
}

}  // namespace

#define TOPGATHER_FETCH(bits, operation)                                                                         \
  uint##bits##_t __tsan_atomic##bits##_fetch_##operation(volatile uint##bits##_t* address, uint##bits##_t value, \
                                                         int) {                                                  \
    require_host(__builtin_return_address(0));                                                                   \
    return __atomic_fetch_##operation(address, value, __ATOMIC_SEQ_CST);                                         \
  }
#define TOPGATHER_COMPARE_EXCHANGE(bits, strength)                                                                  \
  int __tsan_atomic##bits##_compare_exchange_##strength(volatile uint##bits##_t* address, uint##bits##_t* expected, \
                                                        uint##bits##_t value, int, int) {                           \
    require_host(__builtin_return_address(0));                                                                      \
    return __atomic_compare_exchange_n(address, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);        \
  }
#define TOPGATHER_ATOMICS(bits)                                                                                        \
  uint##bits##_t __tsan_atomic##bits##_load(const volatile uint##bits##_t* address, int) {                             \
    require_host(__builtin_return_address(0));                                                                         \
    return __atomic_load_n(address, __ATOMIC_SEQ_CST);                                                                 \
  }                                                                                                                    \
  void __tsan_atomic##bits##_store(volatile uint##bits##_t* address, uint##bits##_t value, int) {                      \
    require_host(__builtin_return_address(0));                                                                         \
    __atomic_store_n(address, value, __ATOMIC_SEQ_CST);                                                                \
  }                                                                                                                    \
  uint##bits##_t __tsan_atomic##bits##_exchange(volatile uint##bits##_t* address, uint##bits##_t value, int) {         \
    require_host(__builtin_return_address(0));                                                                         \
    return __atomic_exchange_n(address, value, __ATOMIC_SEQ_CST);                                                      \
  }                                                                                                                    \
  uint##bits##_t __tsan_atomic##bits##_compare_exchange_val(volatile uint##bits##_t* address, uint##bits##_t expected, \
                                                            uint##bits##_t value, int, int) {                          \
    require_host(__builtin_return_address(0));                                                                         \
    __atomic_compare_exchange_n(address, &expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                 \
    return expected;                                                                                                   \
  }                                                                                                                    \
  TOPGATHER_COMPARE_EXCHANGE(bits, strong)                                                                             \
  TOPGATHER_COMPARE_EXCHANGE(bits, weak)                                                                               \
  TOPGATHER_FETCH(bits, add)                                                                                           \
  TOPGATHER_FETCH(bits, sub)                                                                                           \
  TOPGATHER_FETCH(bits, and)                                                                                           \
  TOPGATHER_FETCH(bits, or)                                                                                            \
  TOPGATHER_FETCH(bits, xor)

extern "C" {
TOPGATHER_ATOMICS(8)
TOPGATHER_ATOMICS(16)
TOPGATHER_ATOMICS(32)
TOPGATHER_ATOMICS(64)
void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void __tsan_atomic_signal_fence(int) {}
}

#endif
