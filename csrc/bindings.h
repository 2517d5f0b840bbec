// What an op adds to the module: a function in <op>_bindings.cpp, and an OpBindings there that names it. Nothing else
// knows which ops there are.
#pragma once

#include "common/checks.h"
#include "common/native_call.h"
#if defined(TOPGATHER_HAVE_CUDA)
#include "cuda/native_call_cuda.h"
#endif

namespace topgather {

class OpBindings {
 public:
  using Bind = void (*)(PyObject* module);

  // While the library is loaded.
  explicit OpBindings(Bind bind) : bind_(bind), next_(first_) { first_ = this; }

  OpBindings(const OpBindings&) = delete;
  OpBindings& operator=(const OpBindings&) = delete;

  static void add_all(PyObject* module) {
    for (const OpBindings* bindings = first_; bindings != nullptr; bindings = bindings->next_) bindings->bind_(module);
  }

 private:
  Bind bind_;
  const OpBindings* next_;
  static inline const OpBindings* first_ = nullptr;
};

}  // namespace topgather
