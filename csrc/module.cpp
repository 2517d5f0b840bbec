// The extension module: what was built, what runs, and every op's bindings.
#include "bindings.h"
#include "common/cpu_target.h"
#include "common/native_call.h"
#include "cuda/device.h"

namespace topgather {
namespace {

void fill(PyObject* module) {
  set_attribute(module, "compiler", text(TOPGATHER_COMPILER));
  set_attribute(module, "build_type", text(TOPGATHER_BUILD_TYPE));
#if defined(TOPGATHER_HAVE_CUDA)
  set_attribute(module, "has_cuda", PyBool_FromLong(1));
#else
  set_attribute(module, "has_cuda", PyBool_FromLong(0));
#endif
  add_native_calls(module);
  add_entry(module, "cpu_target", {}, [](PyObject* const*) { return text(name_of(cpu_target())); });
  add_entry(module, "set_cpu_target", {"name"}, [](PyObject* const* arguments) {
    set_cpu_target(read_text(arguments[0], "name"));
    return nullptr;
  });
  add_entry(module, "available_cpu_targets", {}, [](PyObject* const*) {
    std::vector<std::string> names;
    for (const CpuTarget target : available_cpu_targets()) names.push_back(name_of(target));
    return texts(names);
  });
  add_entry(module, "cuda_architectures", {}, [](PyObject* const*) { return text(cuda_architectures()); });
  add_entry(module, "cuda_toolkit", {}, [](PyObject* const*) { return text(cuda_toolkit()); });
  add_entry(module, "cuda_devices", {}, [](PyObject* const*) { return texts(cuda_devices()); });
  OpBindings::add_all(module);
}

PyModuleDef definition{
    PyModuleDef_HEAD_INIT,
    "_native",
    "Compiled kernels of topgather. Takes addresses and strides; use the functions of topgather instead.",
    -1,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
    nullptr};

}  // namespace
}  // namespace topgather

PyMODINIT_FUNC PyInit__native() {
  PyObject* module = PyModule_Create(&topgather::definition);
  if (module == nullptr) return nullptr;
  try {
    topgather::fill(module);
    return module;
  } catch (const topgather::PythonError&) {  // is set
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ImportError, error.what());
  }
  Py_DECREF(module);
  return nullptr;
}
