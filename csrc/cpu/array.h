// Memory that begins with a cache line: a vector that lies across two of them costs twice.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace kdfast {

constexpr std::align_val_t kLine{64};

// `bytes` and what is left of their last line.
constexpr int64_t whole_lines(int64_t bytes) {
  constexpr int64_t line = static_cast<int64_t>(kLine);
  return (bytes + line - 1) / line * line;
}

struct FreeLines {
  void operator()(void* data) const { ::operator delete(data, kLine); }
};
template <class C> using Array = std::unique_ptr<C[], FreeLines>;

template <class C> Array<C> uninitialized(int64_t count) {
  return Array<C>(static_cast<C*>(::operator new(count * sizeof(C), kLine)));
}

}  // namespace kdfast
