// What the emulations of CUDA kernels share: the words of the language, and copies that arrive when they are waited for
// and not before.
#pragma once

#include <cstring>
#include <functional>
#include <vector>

#define __host__
#define __device__
#define __forceinline__ inline

// Of one thread.
class Copies {
 public:
  // Until then the 16 bytes are NaN. After ``bytes`` of them follow zeros.
  void copy_16(void* to, const void* from, int bytes = 16) {
    std::memset(to, 0xff, 16);
    groups_.back().push_back([=] {
      std::memcpy(to, from, bytes);
      std::memset(static_cast<char*>(to) + bytes, 0, 16 - bytes);
    });
  }
  void commit() { groups_.emplace_back(); }
  void wait(size_t left) {
    for (size_t group = 0; group + 1 + left < groups_.size(); ++group) {
      for (auto& copy : groups_[group]) copy();
      groups_[group].clear();
    }
  }

 private:
  std::vector<std::vector<std::function<void()>>> groups_{1};
};
