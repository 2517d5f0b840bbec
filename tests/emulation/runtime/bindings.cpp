// The emulator's controls as Python sees them.
#include "bindings.h"

#include <string>

#include "recording.h"
#include "state.h"

namespace py = pybind11;

namespace topgather::emulation {

namespace {

constexpr const char* kOrders[] = {"ascending", "descending", "random"};
constexpr const char* kLandings[] = {"at_wait", "at_issue", "mixed"};

int index_of(const std::string& value, const char* const (&names)[3], const char* what) {
  for (int i = 0; i < 3; ++i) {
    if (value == names[i]) return i;
  }
  throw std::invalid_argument(std::string(what) + " is " + names[0] + ", " + names[1] + " or " + names[2] + ", not " +
                              value);
}

py::dict options_as_dict() {
  py::dict result;
  result["order"] = kOrders[static_cast<int>(options.order)];
  result["cp_async"] = kLandings[static_cast<int>(options.landing)];
  result["seed"] = options.seed;
  result["shared_limit"] = options.shared_limit;
  result["num_multiprocessors"] = options.num_multiprocessors;
  result["compute_capability"] = options.compute_capability;
  result["driver_version"] = options.driver_version;
  result["check_races"] = options.check_races;
  result["check_uninitialized"] = options.check_uninitialized;
  result["poison"] = options.poison;
  return result;
}

// Only what is named changes. Returns what was set before, to be given back to it.
py::dict set_options(const py::kwargs& changes) {
  py::dict before = options_as_dict();
  for (const auto& [key, value] : changes) {
    const auto name = py::cast<std::string>(key);
    if (name == "order") {
      options.order = static_cast<Order>(index_of(py::cast<std::string>(value), kOrders, "order"));
    } else if (name == "cp_async") {
      options.landing = static_cast<Landing>(index_of(py::cast<std::string>(value), kLandings, "cp_async"));
    } else if (name == "seed") {
      options.seed = py::cast<uint64_t>(value);
    } else if (name == "shared_limit") {
      options.shared_limit = py::cast<size_t>(value);
      if (options.shared_limit > kMaxSharedBytes) throw std::invalid_argument("shared_limit is at most 256 KB");
    } else if (name == "num_multiprocessors") {
      options.num_multiprocessors = py::cast<int>(value);
    } else if (name == "compute_capability") {
      options.compute_capability = py::cast<int>(value);
    } else if (name == "driver_version") {
      options.driver_version = py::cast<int>(value);
    } else if (name == "check_races") {
      options.check_races = py::cast<bool>(value);
    } else if (name == "check_uninitialized") {
      options.check_uninitialized = py::cast<bool>(value);
    } else if (name == "poison") {
      options.poison = py::cast<bool>(value);
    } else {
      throw py::type_error("set_options has no option " + name);
    }
  }
  return before;
}

py::dict statistics_as_dict() {
  const Statistics& s = statistics;
  const std::pair<const char*, uint64_t> entries[] = {{"launches", s.launches},
                                                      {"blocks", s.blocks},
                                                      {"threads", s.threads},
                                                      {"switches", s.switches},
                                                      {"block_barriers", s.block_barriers},
                                                      {"warp_barriers", s.warp_barriers},
                                                      {"shuffles", s.shuffles},
                                                      {"ballots", s.ballots},
                                                      {"matrix_products", s.matrix_products},
                                                      {"matrix_loads", s.matrix_loads},
                                                      {"bank_conflicts", s.bank_conflicts},
                                                      {"async_copies", s.async_copies},
                                                      {"atomics", s.atomics},
                                                      {"checked_accesses", s.checked_accesses},
                                                      {"attributes_read", s.attributes_read}};
  py::dict result;
  for (const auto& [name, count] : entries) result[name] = count;
  return result;
}

py::tuple sizes(const dim3& value) { return py::make_tuple(value.x, value.y, value.z); }

py::list snapshot_as_list(const Snapshot& snapshot) {
  py::list result;
  for (const auto& [address, data] : snapshot) result.append(py::make_tuple(address, py::bytes(data)));
  return result;
}

py::list take_recording() {
  py::list result;
  for (const RecordedLaunch& launch : recorded_launches) {
    py::dict entry;
    entry["name"] = launch.name;
    entry["grid"] = sizes(launch.grid);
    entry["block"] = sizes(launch.block);
    entry["shared_bytes"] = launch.shared_bytes;
    entry["arguments"] = py::bytes(launch.arguments);
    entry["before"] = snapshot_as_list(launch.before);
    entry["after"] = snapshot_as_list(launch.after);
    result.append(entry);
  }
  recorded_launches.clear();
  is_recording = false;
  return result;
}

}  // namespace

void bind_emulation(py::module_& module, bool is_checked) {
  module.attr("is_checked") = is_checked;
  module.def("set_options", &set_options);
  module.def("options", &options_as_dict);
  module.def("stats", &statistics_as_dict);
  module.def("reset_stats", [] { statistics = {}; });
  module.def("start_recording", [] {
    recorded_launches.clear();
    is_recording = true;
  });
  module.def("take_recording", &take_recording);
}

}  // namespace topgather::emulation
