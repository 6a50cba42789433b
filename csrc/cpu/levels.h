// Instruction sets: kernels that gain from wide vectors are compiled once per level (setup.py: levels()), each
// into its own namespace, and chosen once at run time. Code outside those files is built for the baseline alone.
#pragma once

#include <string>
#include <vector>

namespace kdfast {

enum class Level { baseline = 0, avx2 = 1, avx512 = 2 };

// The levels this binary holds and this processor runs, lowest first.
const std::vector<Level>& available_levels();

// The level in use: the highest available one, unless set_level chose another.
Level current_level();
void set_level(Level level);

const char* level_name(Level level);
Level level_from_name(const std::string& name);

// Picks from one table per level; `Table` is a struct of function pointers defined in each level's namespace.
#if defined(KDFAST_HAS_AVX512)
#define KDFAST_SELECT_LEVEL(table)                                                   \
  (::kdfast::current_level() == ::kdfast::Level::avx512 ? ::kdfast::avx512::table    \
   : ::kdfast::current_level() == ::kdfast::Level::avx2 ? ::kdfast::avx2::table      \
                                                        : ::kdfast::baseline::table)
#define KDFAST_DECLARE_LEVELS(Type, table)                    \
  namespace baseline { extern const Type table; }             \
  namespace avx2 { extern const Type table; }                 \
  namespace avx512 { extern const Type table; }
#else
#define KDFAST_SELECT_LEVEL(table) (::kdfast::baseline::table)
#define KDFAST_DECLARE_LEVELS(Type, table) \
  namespace baseline { extern const Type table; }
#endif

}  // namespace kdfast
