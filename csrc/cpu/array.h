// Memory that begins with a cache line: a vector that lies across two of them costs twice.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace kdfast {

constexpr std::align_val_t kLine{64};

struct FreeLines {
  void operator()(void* data) const { ::operator delete(data, kLine); }
};
template <class C> using Array = std::unique_ptr<C[], FreeLines>;

template <class C> Array<C> uninitialized(int64_t count) {
  return Array<C>(static_cast<C*>(::operator new(count * sizeof(C), kLine)));
}

}  // namespace kdfast
