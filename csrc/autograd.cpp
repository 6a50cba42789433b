// The autograd node of losses on CPU tensors, whose ops have made the gradient by the time the loss is there. On short rows
// a node in Python takes as long as the arithmetic. kdfast/ops/autograd.py is what this does, and does it where this is not:
// nodes are not in PyTorch's stable ABI, so they are a binary of their own, for the PyTorch it was built with.
#include "module.h"

#include <ATen/SavedTensorHooks.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

namespace kdfast {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What is handed on without being a node's input. Of an input its output would be a view, which nobody could write.
struct Held {
  Tensor tensor;
};

// Between the gradient and all that it depends on, so that the derivative of it by any of that comes by here.
struct RefuseSecondDerivative : torch::autograd::Function<RefuseSecondDerivative> {
  static Tensor forward(AutogradContext*, const Tensor& student, const Tensor& grad_output, const Held& gradient) {
    return gradient.tensor;
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false, "kdfast losses can be differentiated once: double backward needs kdfast.backends.use('reference')");
  }
};

// What an op returns, likewise.
struct Result {
  Tensor loss, gradient;
};

struct LossBackward : torch::autograd::Function<LossBackward> {
  static constexpr bool is_traceable = true;  // by compiled autograd: backward looks at no value where that traces

  static Tensor forward(AutogradContext* context, const Tensor&, const Result& result) {
    context->save_for_backward({result.gradient});
    if (at::SavedTensorDefaultHooks::get_hooks()) context->saved_data["packed"] = true;
    return result.loss;
  }

  // What is given away belongs to the caller, who may write it: a retained graph gives a copy, and so does what a hook has
  // packed, as what it unpacks is its own.
  static variable_list backward(AutogradContext* context, const variable_list& grad_outputs) {
    const Tensor saved = context->get_saved_variables().front(), grad_output = grad_outputs.front();
    const bool kept = torch::autograd::get_current_graph_task_keep_graph() || !context->saved_data.empty();
    const Tensor gradient = scaled(saved, grad_output, kept);
    if (!at::GradMode::is_enabled()) return {gradient, {}};
    const Tensor student = at::empty({0}, gradient.options());  // in its place in the graph, without its values
    torch::autograd::impl::set_gradient_edge(student, torch::autograd::get_current_node()->next_edge(0));
    return {RefuseSecondDerivative::apply(student, grad_output, Held{gradient.detach()}), {}};
  }

 private:
  static Tensor scaled(const Tensor& gradient, const Tensor& factor, bool kept) {
    const at::NoGradGuard guard;
    if (at::areAnyTensorSubclassLike({gradient, factor})) return gradient.mul(factor);  // whose values nobody can look at
    const Tensor mine = kept ? gradient.clone() : gradient;
    return factor.item<double>() == 1 ? mine : mine.mul_(factor);
  }
};

// op(student, ..., needs_grad) -> (loss, gradient), and the loss remembers the student where autograd records.
static void differentiable(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const size_t first = stack->size() - op.schema().arguments().size();
  const Tensor student = (*stack)[first].toTensor();
  const bool records = stack->back().toBool() && at::GradMode::is_enabled() && student.requires_grad();
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
  }
  if (!records) return;
  const Result result{(*stack)[first].toTensor(), stack->back().toTensor()};
  (*stack)[first] = LossBackward::apply(student, result);
}

}  // namespace kdfast

TORCH_LIBRARY_IMPL(kdfast, AutogradCPU, m) {
  for (const char* loss : {"kl", "topk_kl", "graph_kl", "rkd", "rkd_sequence", "attention", "feature_mse", "crd", "pkt",
                           "similarity_preserving", "kernel_alignment"})
    m.impl(loss, torch::CppFunction::makeFromBoxedFunction<&kdfast::differentiable>());
}

KDFAST_EMPTY_MODULE()
