// torch.ops.kdfast.graph_select: the best columns of each row, from tiles of the product.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "cuda/warp.cuh"

#include "cuda/graph_select.cuh"

namespace {

using kdfast::gpu::SelectArguments;
using torch::stable::Tensor;

constexpr int kWarps = 4;  // a block, which share the columns' coefficients in L1 and nothing else

template <int METRIC, int Q>
__global__ void __launch_bounds__(32 * kWarps) graph_select_kernel(const SelectArguments arguments) {
  __shared__ kdfast::gpu::SelectMemory memory[kWarps];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int row = static_cast<int>(blockIdx.x) * kWarps + warp;
  if (row < arguments.rows) kdfast::gpu::graph_select<METRIC, Q>(arguments, memory[warp], row, lane);
}

template <int METRIC, int Q>
void launch(const SelectArguments& arguments, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>((arguments.rows + kWarps - 1) / kWarps));
  config.blockDim = dim3(32 * kWarps);
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, graph_select_kernel<METRIC, Q>, arguments);
  STD_TORCH_CHECK(error == cudaSuccess, "kdfast::graph_select: launch: ", cudaGetErrorString(error));
}

template <int METRIC>
void launch(const SelectArguments& arguments, cudaStream_t stream) {
  switch (kdfast::gpu::registers_for(METRIC, arguments.k)) {
    case 1: return launch<METRIC, 1>(arguments, stream);
    case 2: return launch<METRIC, 2>(arguments, stream);
    case 4: return launch<METRIC, 4>(arguments, stream);
    default:
      if constexpr (METRIC == kdfast::gpu::kEuclidean) launch<METRIC, 8>(arguments, stream);
  }
}

// Contiguous tensors but for products, whose rows may be apart; kdfast/ops/graph/select.py makes them. ``row`` and
// ``column``: where the tile begins among all rows and all ``m`` columns.
void graph_select(Tensor products, Tensor a, Tensor b, std::optional<Tensor> labels, Tensor keys, Tensor values,
                  std::optional<Tensor> counts, int64_t k, int64_t metric, int64_t row, int64_t column, int64_t m,
                  bool itself, double error) {
  const int32_t device = products.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  STD_TORCH_CHECK(0 < k && k <= 128, "kdfast::graph_select keeps up to 128 columns, not ", k);
  STD_TORCH_CHECK(products.stride(0) % 4 == 0 && column % 4 == 0, "kdfast::graph_select reads 16 bytes at a time");
  const int64_t width = products.size(1), columns = m - column < width ? m - column : width;
  const SelectArguments arguments{
      static_cast<const float*>(products.data_ptr()), products.stride(0),
      static_cast<const float*>(a.data_ptr()), static_cast<const float*>(b.data_ptr()),
      labels ? static_cast<const int64_t*>(labels->data_ptr()) : nullptr,
      static_cast<int64_t*>(keys.data_ptr()), keys.stride(0), static_cast<float*>(values.data_ptr()),
      counts ? static_cast<int32_t*>(counts->data_ptr()) : nullptr, row, column,
      static_cast<int32_t>(products.size(0)), static_cast<int32_t>(columns), static_cast<int32_t>(k), itself,
      column + columns == m, static_cast<float>(error)};
  const auto on = static_cast<cudaStream_t>(stream);
  switch (metric) {
    case kdfast::gpu::kCosine: return launch<kdfast::gpu::kCosine>(arguments, on);
    case kdfast::gpu::kDot: return launch<kdfast::gpu::kDot>(arguments, on);
    case kdfast::gpu::kEuclidean: return launch<kdfast::gpu::kEuclidean>(arguments, on);
    default: STD_TORCH_CHECK(false, "kdfast::graph_select: no such metric: ", metric);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(kdfast, m) {
  m.def(
      "graph_select(Tensor products, Tensor a, Tensor b, Tensor? labels, Tensor(a!) keys, Tensor(b!) values, "
      "Tensor(c!)? counts, int k, int metric, int row, int column, int m, bool itself, float error) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(kdfast, CUDA, m) { m.impl("graph_select", TORCH_BOX(&graph_select)); }
