// The fields of a parameter struct by name, listed once behind the struct:
//
//   TOPGATHER_FIELDS(MobaRouteParams, problem, query, key, block_indices)
//
// From the list follow how Python's arguments are read (native_call.h), the names that Python compares with its own
// when it imports the module, and what the emulator is told of a call's memory. A struct among the fields is read field
// by field, and so is a struct that this one derives from and calls its `Shared`. What is not listed is derived by the
// op's complete(params), which also asserts what kernels rely on.
#pragma once

#include <utility>

namespace topgather {

#define TOPGATHER_PARENS ()
#define TOPGATHER_EXPAND(...) TOPGATHER_EXPAND3(TOPGATHER_EXPAND3(TOPGATHER_EXPAND3(__VA_ARGS__)))
#define TOPGATHER_EXPAND3(...) TOPGATHER_EXPAND2(TOPGATHER_EXPAND2(TOPGATHER_EXPAND2(__VA_ARGS__)))
#define TOPGATHER_EXPAND2(...) TOPGATHER_EXPAND1(TOPGATHER_EXPAND1(TOPGATHER_EXPAND1(__VA_ARGS__)))
#define TOPGATHER_EXPAND1(...) __VA_ARGS__
#define TOPGATHER_VISIT_EACH(field, ...) \
  visit(#field, params.field);           \
  __VA_OPT__(TOPGATHER_VISIT_AGAIN TOPGATHER_PARENS(__VA_ARGS__))
#define TOPGATHER_VISIT_AGAIN() TOPGATHER_VISIT_EACH

#define TOPGATHER_FIELDS(Params, ...)                     \
  template <typename Visit>                               \
  void visit_fields(Params& params, const Visit& visit) { \
    TOPGATHER_EXPAND(TOPGATHER_VISIT_EACH(__VA_ARGS__))   \
  }

template <typename Params>
concept HasFields = requires(Params& params) { visit_fields(params, [](const char*, auto&) {}); };

// Calls visit(name, field) for every field, those of structs among them.
template <typename Params, typename Visit>
void visit_all_fields(Params& params, const Visit& visit) {
  if constexpr (requires { typename Params::Shared; }) {
    visit_all_fields(static_cast<typename Params::Shared&>(params), visit);
  }
  visit_fields(params, [&](const char* name, auto& field) {
    if constexpr (HasFields<std::remove_reference_t<decltype(field)>>) {
      visit_all_fields(field, visit);
    } else {
      visit(name, field);
    }
  });
}

}  // namespace topgather
