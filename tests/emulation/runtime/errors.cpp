// From a fault in kernel code to an Error in the caller of the launch.
#include <dlfcn.h>

#include <cstdio>
#include <cstring>

#include "state.h"

namespace topgather::emulation {

namespace {

std::string coordinates(const uint3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

}  // namespace

std::string current_place() {
  return " [block " + coordinates(current_block_idx) + " thread " + coordinates(current_thread_idx) + "]";
}

// addr2line knows the lines and what was inlined; where it is missing, the symbol must do.
std::string source_place(const void* caller) {
  Dl_info module{};
  if (caller == nullptr || dladdr(caller, &module) == 0 || module.dli_fname == nullptr) return "";
  char command[1024];
  // The call stands before its return address.
  const size_t offset =
      static_cast<size_t>(static_cast<const char*>(caller) - static_cast<char*>(module.dli_fbase)) - 1;
  std::snprintf(command, sizeof command, "addr2line -s -i -e '%s' 0x%zx 2>/dev/null", module.dli_fname, offset);
  std::string place;
  if (FILE* output = popen(command, "r")) {
    char line[256];
    while (std::fgets(line, sizeof line, output) != nullptr) {
      line[std::strcspn(line, "\n ")] = '\0';
      if (line[0] != '?') place += (place.empty() ? " at " : " < ") + std::string(line);
    }
    pclose(output);
  }
  if (place.empty() && module.dli_sname != nullptr) place = " in " + std::string(module.dli_sname);
  return place;
}

void fail(const std::string& what, const void* caller) {
  if (!in_kernel()) throw Error(what + source_place(caller));
  state.error = what + current_place() + source_place(caller);
  // The thread is left where it stands: kernels own nothing that a destructor would have to free.
  switch_to(&state.host);
  __builtin_unreachable();
}

}  // namespace topgather::emulation
