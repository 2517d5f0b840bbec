// run(name, grid, block, shared_bytes, a, b, output, option): one micro kernel on buffers given as (address, bytes,
// kind).
#include <string>

#include "cuda/emulation_hooks.h"
#include "cuda/launch.cuh"
#include "micro_kernels.h"
#include "runtime/bindings.h"

namespace py = pybind11;

namespace {

using namespace topgather;

micro::MicroKernel find_kernel(const std::string& name) {
  for (const micro::NamedKernel* table : {micro::kPrimitiveKernels, micro::kFaultKernels}) {
    for (; table->name != nullptr; ++table) {
      if (name == table->name) return table->kernel;
    }
  }
  throw std::invalid_argument("no micro kernel is called " + name);
}

dim3 shape(const py::tuple& sizes) {
  return {py::cast<unsigned>(sizes[0]), py::cast<unsigned>(sizes[1]), py::cast<unsigned>(sizes[2])};
}

cuda::MemoryKind memory_kind(const std::string& kind) {
  if (kind == "input") return cuda::MemoryKind::kInput;
  if (kind == "output") return cuda::MemoryKind::kOutput;
  if (kind == "workspace") return cuda::MemoryKind::kWorkspace;
  if (kind == "in_out") return cuda::MemoryKind::kInOut;
  throw std::invalid_argument("no memory kind is called " + kind);
}

// Launches `repeats` times within one declaration of memory; zero_output clears the output's bytes first.
void run(const std::string& name, const py::tuple& grid, const py::tuple& block, size_t shared_bytes,
         const py::tuple& a, const py::tuple& b, const py::tuple& output, int64_t option, int repeats,
         bool zero_output) {
  const micro::MicroKernel kernel = find_kernel(name);
  const cuda::LaunchShape launch{shape(grid), shape(block), shared_bytes, nullptr};
  struct Buffer {
    void* address;
    size_t num_bytes;
    cuda::MemoryKind kind;
  } buffers[3];
  int count = 0;
  for (const py::tuple& buffer : {a, b, output}) {
    buffers[count++] = {reinterpret_cast<void*>(py::cast<uintptr_t>(buffer[0])), py::cast<size_t>(buffer[1]),
                        memory_kind(py::cast<std::string>(buffer[2]))};
  }
  const micro::MicroArguments arguments{buffers[0].address, buffers[1].address, buffers[2].address, option};
  const py::gil_scoped_release release;  // before the declarations, which may wait for another thread's launch
  cuda::DeclaredMemory memory;
  for (const Buffer& buffer : buffers) memory.add(buffer.address, buffer.num_bytes, buffer.kind);
  if (zero_output) {
    cuda_require(cudaMemsetAsync(buffers[2].address, 0, buffers[2].num_bytes, nullptr), "clearing the output");
  }
  for (int repeat = 0; repeat < repeats; ++repeat) cuda::launch(kernel, launch, arguments);
}

int device_attribute(int attribute) {
  int value = 0;
  cuda_require(cudaDeviceGetAttribute(&value, static_cast<cudaDeviceAttr>(attribute), 0), "reading an attribute");
  return value;
}

void fill(py::module_& module, bool is_checked) {
  emulation::bind_emulation(module, is_checked);
  module.def("run", &run);
  module.def("device_attribute", &device_attribute);
}

}  // namespace

PYBIND11_MODULE(_emulation_micro, module) { fill(module, false); }
PYBIND11_MODULE(_emulation_micro_checked, module) { fill(module, true); }
