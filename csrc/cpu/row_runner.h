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

// An element of a row's gradient that is not made like the others.
struct Patch {
  int64_t at;
  double value;
};

// Blocks, scratch and block results of the rows a thread works on together (or all threads on one long row).
class Workspace {
 public:
  // `kept`: numbers kept of a class. Short rows are worked on several at a time, if `together`.
  Workspace(const Output& out, double inverse_temperature, int kept, bool together = true)
      : blocks_per_row(num_blocks(out.classes)) {
    const int64_t size = compute_size(out.storage), row_bytes = whole_lines(out.classes * size);
    // Two inputs, a gradient and scratch: together they stay in the L1 cache.
    const int64_t most = kTogetherBytes / std::max<int64_t>(1, (3 + kept) * row_bytes);
    capacity_ = together ? std::clamp<int64_t>(std::min(most, out.count), 1, kMostRows) : 1;
    // A streamed gradient reads scratch from where its own rows are aligned: up to a vector beyond the end.
    memory_ = uninitialized<char>(capacity_ * kept * row_bytes + static_cast<int64_t>(kLine));
    const int64_t count = capacity_ * blocks_per_row;
    rows.reserve(capacity_), blocks.reserve(count), stats.resize(count), coefficients.resize(count);
    for (int64_t row = 0; row < capacity_; ++row) {
      for (int64_t i = 0; i < blocks_per_row; ++i) {
        const int64_t begin = i * kBlock;
        const auto scratch = [&](int number) {
          return number < kept ? memory_.get() + (row * kept + number) * row_bytes + begin * size : nullptr;
        };
        blocks.push_back({nullptr, nullptr, nullptr, begin, std::min(kBlock, out.classes - begin), inverse_temperature,
                          inverse_temperature, nullptr, 0, scratch(0), scratch(1), scratch(2)});
      }
    }
  }

  bool is_full() const { return static_cast<int64_t>(rows.size()) == capacity_; }
  int64_t first_block(int64_t row) const { return row * blocks_per_row; }
  int64_t num_laid_out() const { return first_block(rows.size()); }

  // Lays the blocks over `rows`, without holes; without a teacher none is read.
  void place(const Rows& student, const Rows* teacher, const Output& out) {
    Block* block = blocks.data();
    for (const int64_t r : rows) {
      const char *const s = student.row(r), *const t = teacher ? teacher->row(r) : nullptr;
      char* const g = out.wants_grad() ? out.grad.row(r) : nullptr;
      for (int64_t i = 0; i < blocks_per_row; ++i, ++block) {
        block->student = s + block->begin * student.element_size;
        block->teacher = t ? t + block->begin * student.element_size : nullptr;
        block->grad = g ? g + block->begin * out.grad.element_size : nullptr;
        block->num_holes = 0;
      }
    }
  }

  RowStats merged(int64_t row, Form form) const {
    return merge(blocks[first_block(row)], &stats[first_block(row)], blocks_per_row, form);
  }

  const int64_t blocks_per_row;
  std::vector<int64_t> rows;
  std::vector<Block> blocks;  // of the first row, of the second, ...
  std::vector<BlockStats> stats;
  std::vector<Coefficients> coefficients;
  std::vector<Patch> patches;  // none, or one a row
  std::vector<MixSums> mixed;
  std::vector<Moments> student_moments, teacher_moments;

 private:
  static constexpr int64_t kTogetherBytes = 40 << 10;

  int64_t capacity_;
  Array<char> memory_;
};

// body(first, last) over the blocks laid out, by all threads if `shared`.
template <class Body> void each_block(const Workspace& w, bool shared, const Body& body) {
  const int64_t count = w.num_laid_out();
  if (shared)
    torch::stable::parallel_for(0, count, grain(kSoftmaxCost * kBlock), body);
  else
    body(0, count);
}

// work(workspace, shared) on workspace.rows, for all rows that count; the others get loss 0 and gradient 0 and are not read.
template <class MakeWorkspace, class Work>
void each_row(Output& out, const MakeWorkspace& make_workspace, const Work& work) {
  const auto run = [&](int64_t begin, int64_t end, bool shared) {
    auto w = make_workspace();
    for (int64_t r = begin; r < end;) {
      w.rows.clear();
      for (; r < end && !w.is_full(); ++r) {
        if (out.mask == nullptr || out.mask[r]) {
          w.rows.push_back(r);
          continue;
        }
        out.loss[r] = 0;
        if (out.wants_grad()) std::memset(out.grad_row(r), 0, out.classes * out.grad.element_size);
      }
      if (!w.rows.empty()) work(w, shared);
    }
  };
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t portions = num_blocks(out.classes) / grain(kSoftmaxCost * kBlock);
  if (out.count < threads && out.count < portions)  // a row alone keeps more threads busy than all rows side by side
    run(0, out.count, true);
  else
    torch::stable::parallel_for(0, out.count, grain(kSoftmaxCost * out.classes),
                                [&](int64_t begin, int64_t end) { run(begin, end, false); });
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
