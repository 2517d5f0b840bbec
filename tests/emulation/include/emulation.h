// The emulator as kernels, launchers and entry points see it.
//
// Model: every CUDA thread of a block is a fiber, blocks run one after another, every warp-wide or block-wide operation
// is a rendezvous. Nothing runs in parallel; order and landing of asynchronous copies are chosen by the options, so
// that a kernel that leans on luck is caught. In the checked build -fsanitize=thread reports every access of kernel
// code here: bounds, uninitialised memory and races become errors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>

struct dim3;

namespace topgather::emulation {

// What a kernel did wrong, with the block, the thread and the place in the source.
class Error : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// --- memory of an entry point ---------------------------------------------------------------------------------------

enum class MemoryKind { kInput, kOutput, kWorkspace, kInOut };

// Between the first declaration and forget_memory() the calling thread has the emulator to itself. Outputs and
// workspace are filled with 0xFF (NaN) where no input overlaps them. A failed launch forgets everything declared.
void declare_memory(const void* address, size_t num_bytes, MemoryKind kind);
void forget_memory();

// --- launches -------------------------------------------------------------------------------------------------------

struct Launch {
  const void* kernel;                                       // names the kernel in recordings
  void (*call)(const void* kernel, const void* arguments);  // runs one thread of it
  const void* arguments;
  size_t num_argument_bytes;
  size_t shared_bytes;
};
void run(const Launch& launch, const dim3& grid, const dim3& block);

template <typename Arguments>
void launch(void (*kernel)(Arguments), const dim3& grid, const dim3& block, size_t shared_bytes,
            const Arguments& arguments) {
  const auto call = [](const void* address, const void* bytes) {
    reinterpret_cast<void (*)(Arguments)>(const_cast<void*>(address))(*static_cast<const Arguments*>(bytes));
  };
  run({reinterpret_cast<const void*>(kernel), call, &arguments, sizeof(Arguments), shared_bytes}, grid, block);
}

// --- what primitives and built-ins are made of ----------------------------------------------------------------------

unsigned char* shared_memory();
bool sync_threads(bool predicate);  // true if any thread's predicate is
void sync_warp(uint32_t mask);
enum class ShuffleKind { kIndex, kUp, kDown, kXor };
uint32_t shuffle(ShuffleKind kind, uint32_t mask, uint32_t value, int operand, int width);
uint32_t ballot(uint32_t mask, bool predicate);

// num_bytes: 4, 8 or 16.
void copy_async(void* shared, const void* global, size_t num_bytes, bool is_copied);
void copy_async_commit();
void copy_async_wait(int num_pending);

enum class ElementKind { kBFloat16, kFloat16 };
void load_matrix_x4(uint32_t* fragment, const void* shared_row, bool is_transposed);
void multiply_accumulate(ElementKind kind, float* d, const uint32_t* a, uint32_t b0, uint32_t b1);
float float_of(ElementKind kind, uint16_t bits);
uint16_t bits_of(ElementKind kind, float value);

void add_atomic(float* address, const float* values, int count);
void add_atomic(int32_t* address, int32_t value);
void max_atomic(uint32_t* address, uint32_t value);

}  // namespace topgather::emulation
