// What Python needs to know about the build. Kernels are in cpu/ and cuda/.
#include "module.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/levels.h"
#include "cpu/pool.h"

namespace {

// The functions take and return plain strings: torch.library has no tuples of them.
std::string cpu_levels() {
  std::string names;
  for (kdfast::Level level : kdfast::available_levels())
    names += (names.empty() ? "" : ",") + std::string(kdfast::level_name(level));
  return names;
}
std::string cpu_level() { return kdfast::level_name(kdfast::current_level()); }
void set_cpu_level(std::string name) { kdfast::set_level(kdfast::level_from_name(name)); }

}  // namespace

// The losses' schemas are beside their fake kernels in kdfast/ops/<op>/function.py: a GPU needs them without this binary.
STABLE_TORCH_LIBRARY(kdfast, m) {
  m.def("cpu_levels() -> str");
  m.def("cpu_level() -> str");
  m.def("set_cpu_level(str name) -> ()");
  m.def("empty_cache() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(kdfast, CompositeExplicitAutograd, m) {
  m.impl("cpu_levels", TORCH_BOX(&cpu_levels));
  m.impl("cpu_level", TORCH_BOX(&cpu_level));
  m.impl("set_cpu_level", TORCH_BOX(&set_cpu_level));
  m.impl("empty_cache", TORCH_BOX(&kdfast::empty_pool));
}

KDFAST_EMPTY_MODULE()
