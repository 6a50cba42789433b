#include "cpu/pool.h"

#include <cstdlib>
#include <mutex>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

namespace kdfast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kHugePage = int64_t{2} << 20;  // of x86-64, and of arm64 with pages of 4 KiB

struct Block {
  void* data;
  int64_t bytes;
};

Block fresh(int64_t bytes) {
  const bool huge = bytes >= kHugePage;
  const Block block{std::aligned_alloc(huge ? kHugePage : kPoolSmallest, bytes), bytes};
  STD_TORCH_CHECK(block.data != nullptr, "kdfast: no memory for a gradient of ", bytes, " bytes");
#if defined(__linux__)
  if (huge) madvise(block.data, bytes, MADV_HUGEPAGE);  // a hint: failure is no error
#endif
  return block;
}

class Pool {
 public:
  // The smallest block that is large enough, and not twice as large; else a fresh one.
  Block take(int64_t bytes) {
    const int64_t unit = bytes < kHugePage ? kPoolSmallest : kHugePage;
    bytes = (bytes + unit - 1) / unit * unit;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      size_t best = blocks_.size();
      for (size_t i = 0; i < blocks_.size(); ++i)
        if (blocks_[i].bytes >= bytes && blocks_[i].bytes < 2 * bytes &&
            (best == blocks_.size() || blocks_[i].bytes < blocks_[best].bytes))
          best = i;
      if (best < blocks_.size()) {
        const Block block = blocks_[best];
        blocks_.erase(blocks_.begin() + best);
        held_ -= block.bytes;
        return block;
      }
    }
    return fresh(bytes);
  }

  // Keeps a block; the ones that have waited longest make room for it.
  void give(const Block& block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (block.bytes > kPoolLimit) return std::free(block.data);
    while (held_ + block.bytes > kPoolLimit) drop_oldest();
    blocks_.push_back(block);
    held_ += block.bytes;
  }

  int64_t empty() {
    const std::lock_guard<std::mutex> lock(mutex_);
    const int64_t released = held_;
    while (!blocks_.empty()) drop_oldest();
    return released;
  }

 private:
  void drop_oldest() {
    std::free(blocks_.front().data);
    held_ -= blocks_.front().bytes;
    blocks_.erase(blocks_.begin());
  }

  std::mutex mutex_;
  std::vector<Block> blocks_;  // oldest first
  int64_t held_ = 0;
};

Pool& pool() {
  static Pool* const pool = new Pool;  // never destroyed: gradients may outlive every static object
  return *pool;
}

// Of the types a gradient has.
int64_t element_size(ScalarType dtype) {
  return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
}

std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides(shape.size());
  int64_t count = 1;
  for (size_t d = shape.size(); d-- > 0;) strides[d] = count, count *= shape[d] > 0 ? shape[d] : 1;
  return strides;
}

}  // namespace

Tensor empty(const std::vector<int64_t>& shape, ScalarType dtype) {
  const std::vector<int64_t> strides = contiguous_strides(shape);
  AtenTensorHandle handle;
  // Half of what torch::stable::new_empty takes, which looks the op up by its name.
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor empty_gradient(const std::vector<int64_t>& shape, ScalarType dtype) {
  int64_t bytes = element_size(dtype);
  for (int64_t size : shape) bytes *= size;
  if (bytes < kPoolSmallest) return empty(shape, dtype);
  const std::vector<int64_t> strides = contiguous_strides(shape);
  const Block block = pool().take(bytes);
  return torch::stable::from_blob(block.data, {shape.data(), shape.size()}, {strides.data(), strides.size()},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype,
                                  [block](void*) { pool().give(block); });
}

int64_t empty_pool() { return pool().empty(); }

}  // namespace kdfast
