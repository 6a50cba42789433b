// Drives the kernels over the rows of a problem: rows shared by threads, or the blocks of a row where rows are few.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "cpu/array.h"
#include "cpu/merge.h"
#include "cpu/rows.h"
#include "cpu/scalar.h"

namespace kdfast {

// A thread is woken for about this many elements that are added or multiplied, as for PyTorch's own ops. One that has worked
// within the last milliseconds comes at once; one that sleeps takes longer than such work.
constexpr int64_t kGrain = 32768;
// What an element of two softmaxes costs beside those.
constexpr int64_t kSoftmaxCost = 5;

// Items a thread is woken for, when each costs as much as `elements`.
inline int64_t grain(int64_t elements) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements)); }

// The numbers of REDUCTIONS in kdfast/ops/autograd.py.
enum class Reduction : int64_t { none = 0, sum = 1, mean = 2, batchmean = 3 };

// Where gradients go and how losses are reduced: what every op of the family shares.
struct Output {
  Storage storage;
  int64_t count, classes, kept;
  Reduction reduction;
  Rows grad;             // where the gradient goes; no data where none is wanted
  bool streamed;         // past the caches
  const bool* mask;      // or null
  const double* weight;  // or null
  std::vector<double> loss;

  double divisor() const {
    const double rows = static_cast<double>(std::max<int64_t>(kept, 1));
    return reduction == Reduction::mean ? rows * classes : reduction == Reduction::batchmean ? rows : 1;
  }
  double row_weight(int64_t r) const { return weight ? weight[r] : 1.0; }
  bool wants_grad() const { return grad.data != nullptr; }
  void* grad_row(int64_t r) const { return grad.row(r); }
};

// Scratch and block results of one thread (or of all, where they share a row).
class Workspace {
 public:
  Workspace(int64_t classes, Storage storage, int kept)
      : stats(num_blocks(classes)), coefficients(num_blocks(classes)), mixed(num_blocks(classes)),
        moments(num_blocks(classes)), bytes_(whole_lines(classes * compute_size(storage))),
        memory_(uninitialized<char>(kept * bytes_)), kept_(kept) {}

  Scratch scratch() const { return {part(0), part(1), part(2)}; }

  std::vector<BlockStats> stats;
  std::vector<Coefficients> coefficients;
  std::vector<MixSums> mixed;
  std::vector<Moments> moments;

 private:
  void* part(int i) const { return i < kept_ ? memory_.get() + i * bytes_ : nullptr; }

  int64_t bytes_;
  Array<char> memory_;
  int kept_;
};

// body(first, last) over the blocks of a row, by all threads if `shared`.
template <class Body> void each_block(int64_t classes, bool shared, const Body& body) {
  const int64_t blocks = num_blocks(classes);
  if (shared)
    torch::stable::parallel_for(0, blocks, grain(kSoftmaxCost * kBlock), body);
  else
    body(0, blocks);
}

// row(r, workspace, shared) for every row that counts; the others get loss 0 and gradient 0 and are not read.
template <class MakeWorkspace, class OneRow>
void each_row(Output& out, const MakeWorkspace& make_workspace, const OneRow& row) {
  const auto run = [&](int64_t r, auto& workspace, bool shared) {
    if (out.mask == nullptr || out.mask[r]) {
      out.loss[r] = row(r, workspace, shared);
      return;
    }
    out.loss[r] = 0;
    if (out.wants_grad()) std::memset(out.grad_row(r), 0, out.classes * out.grad.element_size);
  };
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t portions = num_blocks(out.classes) / grain(kSoftmaxCost * kBlock);
  if (out.count < threads && out.count < portions) {  // a row alone keeps more threads busy than all rows side by side
    auto workspace = make_workspace();
    for (int64_t r = 0; r < out.count; ++r) run(r, workspace, true);
    return;
  }
  torch::stable::parallel_for(0, out.count, grain(kSoftmaxCost * out.classes), [&](int64_t begin, int64_t end) {
    auto workspace = make_workspace();
    for (int64_t r = begin; r < end; ++r) run(r, workspace, false);
  });
}

// The gradient for `needs_grad`: empty, or of the student's shape. Of the student's dtype where no other is given.
torch::stable::Tensor make_grad(const torch::stable::Tensor& student, bool needs_grad,
                                std::optional<torch::headeronly::ScalarType> dtype = std::nullopt);

// Whether a gradient is so large that it leaves the caches before it is used: it need not come through them.
constexpr int64_t kStreamed = int64_t{32} << 20;  // bytes
inline bool is_streamed(const torch::stable::Tensor& grad) {
  return grad.numel() * static_cast<int64_t>(grad.element_size()) >= kStreamed;
}

// Losses go to `loss`, gradients to `grad` (nowhere if it is empty); counts the rows `mask` keeps.
Output make_output(const Rows& student, const torch::stable::Tensor& grad, const std::optional<torch::stable::Tensor>& mask,
                   const std::optional<torch::stable::Tensor>& row_weight, int64_t reduction);

// The row losses as `reduction` asks.
torch::stable::Tensor reduced(const Output& out, const torch::stable::Tensor& student);

}  // namespace kdfast
