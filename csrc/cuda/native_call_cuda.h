// How Python calls a CUDA entry point: the fields of its parameter struct (common/native_call.h), then workspace,
// device and stream. Also compiled into the emulated modules of the tests, which check every access of every kernel
// against the memory that the struct lists.
#pragma once

#include <algorithm>

#include "../common/checks.h"
#include "../common/native_call.h"
#include "emulation_hooks.h"
#include "place.h"

namespace topgather {

template <typename Params>
struct CudaEntry {
  void (*run)(const Params& params, const CudaWorkspace& workspace, const CudaPlace& place);
  // Null where no workspace is needed.
  int64_t (*workspace_bytes)(const Params& params, const CudaPlace& place) = nullptr;
};

inline constexpr int64_t kAlignedRowBytes = 16;

template <typename Field>
constexpr cuda::MemoryKind memory_kind() {
  if constexpr (std::is_const_v<typename Field::Element>) return cuda::MemoryKind::kInput;
  return std::is_same_v<Field, InOutArray<typename Field::Element, Field::kRank>> ? cuda::MemoryKind::kInOut
                                                                                  : cuda::MemoryKind::kOutput;
}

// Asserts what every kernel relies on, and tells the emulator what memory there is.
template <typename Params>
void check_and_declare(const Params& params, const std::vector<std::string>& aligned, cuda::DeclaredMemory& memory) {
  visit_all_fields(const_cast<Params&>(params), [&](const char* name, auto& field) {
    using Field = std::remove_reference_t<decltype(field)>;
    if constexpr (IsArray<Field>) {
      // What is of the problem's dtype; a field that says double may be that.
      require(!std::is_void_v<std::remove_const_t<typename Field::Element>> || field.dtype != Dtype::kFloat64,
              "CUDA kernels take float32, bfloat16 and float16, not float64");
      if (field.extent() == 0) return;
      int64_t num_bytes = field.extent() * element_bytes(field.dtype);
      if (std::find(aligned.begin(), aligned.end(), name) != aligned.end()) {
        require(field.has_aligned_rows(kAlignedRowBytes), "tensors must have rows on 16-byte boundaries");
        num_bytes = (num_bytes + kAlignedRowBytes - 1) / kAlignedRowBytes * kAlignedRowBytes;
      }
      memory.add(field.data, static_cast<size_t>(num_bytes), memory_kind<Field>());
    }
  });
}

// Adds `<name>_cuda` and, where there is a workspace, `<name>_workspace_bytes`.
template <typename Params>
void add_cuda_entry(PyObject* module, const std::string& name, const CudaEntry<Params>& entry) {
  std::vector<std::string> names = field_names<Params>();
  const std::vector<std::string> aligned = aligned_names<Params>();
  for (const std::string& field : aligned) {
    require(std::find(names.begin(), names.end(), field) != names.end(), "an aligned tensor is one of the fields");
  }
  const size_t num_fields = names.size();
  if (entry.workspace_bytes != nullptr) {
    std::vector<std::string> with_device = names;
    with_device.emplace_back("device");
    add_entry(module, name + "_workspace_bytes", with_device, [entry, num_fields](PyObject* const* arguments) {
      const Params params = read_params<Params>(arguments);
      const CudaPlace place{static_cast<int>(read_integer(arguments[num_fields], "device")), nullptr};
      int64_t num_bytes = 0;
      {
        const WithoutInterpreterLock unlocked;
        cuda::DeclaredMemory memory;  // nothing is touched, but another thread's emulated kernel must not be under way
        memory.add(nullptr, 0, cuda::MemoryKind::kInput);
        num_bytes = entry.workspace_bytes(params, place);
      }
      return PyLong_FromLongLong(num_bytes);
    });
  }
  for (const char* field : {"workspace", "workspace_bytes", "device", "stream"}) names.emplace_back(field);
  add_entry(module, name + "_cuda", names, [entry, num_fields, aligned](PyObject* const* arguments) -> PyObject* {
    const Params params = read_params<Params>(arguments);
    arguments += num_fields;
    const CudaWorkspace workspace{reinterpret_cast<void*>(read_integer(arguments[0], "workspace")),
                                  read_integer(arguments[1], "workspace_bytes")};
    const CudaPlace place{static_cast<int>(read_integer(arguments[2], "device")),
                          reinterpret_cast<void*>(read_integer(arguments[3], "stream"))};
    const WithoutInterpreterLock unlocked;
    cuda::DeclaredMemory memory;
    check_and_declare(params, aligned, memory);
    memory.add(workspace.data, static_cast<size_t>(workspace.bytes), cuda::MemoryKind::kWorkspace);
    entry.run(params, workspace, place);
    return nullptr;
  });
}

// Adds `<name>`: a list of (kernel, dtype code, largest head_dim, threads, bytes of shared memory).
inline void add_kernel_facts(PyObject* module, const char* name, std::vector<CudaKernelFacts> (*facts)()) {
  add_entry(module, name, {}, [facts](PyObject* const*) {
    const std::vector<CudaKernelFacts> kernels = facts();
    Owned rows(PyList_New(0));
    for (const CudaKernelFacts& kernel : kernels) {
      const auto number = [](int64_t value) { return static_cast<long long>(value); };
      const Owned row(Py_BuildValue("(siLLL)", kernel.name, static_cast<int>(kernel.dtype), number(kernel.max_head_dim),
                                    number(kernel.threads), number(kernel.shared_bytes)));
      if (PyList_Append(rows.get(), row.get()) != 0) throw PythonError();
    }
    return rows.release();
  });
}

}  // namespace topgather
