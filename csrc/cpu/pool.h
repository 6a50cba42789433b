// Memory for large gradients, used again from step to step.
//
// A gradient is written once, so the page faults of fresh memory cost more than its arithmetic. What a freed gradient
// leaves is kept here, up to kPoolLimit bytes, and given to the next one; where memory has to be fresh, huge pages are
// asked for.
#pragma once

#include <cstdint>
#include <vector>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace kdfast {

constexpr int64_t kPoolSmallest = int64_t{1} << 17;  // below it malloc recycles by itself; from it on it may map pages
constexpr int64_t kPoolLimit = int64_t{2} << 30;     // a step holds one gradient of logits: 8192 x 65536 in float32

// Uninitialized and contiguous, on the CPU, from PyTorch's own allocator.
torch::stable::Tensor empty(const std::vector<int64_t>& shape, torch::headeronly::ScalarType dtype);

// The same, from the pool where it is large.
torch::stable::Tensor empty_gradient(const std::vector<int64_t>& shape, torch::headeronly::ScalarType dtype);

// Gives what the pool holds back to the system; returns how many bytes that was.
int64_t empty_pool();

}  // namespace kdfast
