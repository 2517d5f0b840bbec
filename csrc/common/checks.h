// Preconditions the native side asserts again, after the Python layer's own checks.
#pragma once

namespace topgather {

// std::invalid_argument. Out of line, so that kernels' files need not read the standard library's exceptions.
[[noreturn]] void throw_invalid_argument(const char* message);

inline void require(bool condition, const char* message) {
  if (!condition) throw_invalid_argument(message);
}

}  // namespace topgather
