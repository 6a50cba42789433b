#include "cpu/levels.h"

#include <atomic>

#include <torch/headeronly/util/Exception.h>

namespace kdfast {
namespace {

std::vector<Level> detect() {
  std::vector<Level> levels{Level::baseline};
#if defined(KDFAST_HAS_AVX512)
  // The same sets of features as the flags in setup.py: levels().
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2) levels.push_back(Level::avx2);
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    levels.push_back(Level::avx512);
#endif
  return levels;
}

std::atomic<Level>& chosen() {
  static std::atomic<Level> level{available_levels().back()};
  return level;
}

}  // namespace

const std::vector<Level>& available_levels() {
  static const std::vector<Level> levels = detect();
  return levels;
}

Level current_level() { return chosen().load(std::memory_order_relaxed); }

void set_level(Level level) {
  for (Level available : available_levels())
    if (available == level) {
      chosen().store(level, std::memory_order_relaxed);
      return;
    }
  STD_TORCH_CHECK(false, "this processor or this build lacks the level ", level_name(level));
}

const char* level_name(Level level) {
  constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};
  return kNames[static_cast<int>(level)];
}

Level level_from_name(const std::string& name) {
  for (Level level : {Level::baseline, Level::avx2, Level::avx512})
    if (name == level_name(level)) return level;
  STD_TORCH_CHECK(false, "unknown level '", name, "': baseline, avx2 or avx512");
}

}  // namespace kdfast
