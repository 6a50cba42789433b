// torch.ops.kdfast.graph_bounds and graph_hits: both looks at the similarities of half types, in a product of our own.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "cuda/warp.cuh"

#include "cuda/graph_product.cuh"

namespace {

using kdfast::gpu::BoundsArguments;
using kdfast::gpu::HitsArguments;
using kdfast::gpu::HitsMemory;
using torch::stable::Tensor;

extern __shared__ uint4 shared[];

template <int ROWS>
constexpr int kBlocks = 256 / ROWS;  // on an SM

template <bool BFLOAT16, int METRIC, int ROWS>
__global__ void __launch_bounds__(kdfast::gpu::kTileThreads<ROWS>, kBlocks<ROWS>)
    graph_bounds_kernel(const BoundsArguments arguments) {
  kdfast::gpu::graph_bounds<BFLOAT16, METRIC, ROWS>(arguments, reinterpret_cast<HitsMemory<ROWS>*>(shared)->stages,
                                                    static_cast<int>(blockIdx.x), static_cast<int>(threadIdx.x));
}

template <bool BFLOAT16, int METRIC, int ROWS>
__global__ void __launch_bounds__(kdfast::gpu::kTileThreads<ROWS>, kBlocks<ROWS>)
    graph_hits_kernel(const HitsArguments arguments) {
  kdfast::gpu::graph_hits<BFLOAT16, METRIC, ROWS>(arguments, *reinterpret_cast<HitsMemory<ROWS>*>(shared), blockIdx.x,
                                                  static_cast<int>(threadIdx.x));
}

void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "kdfast::graph_product: ", what, ": ", cudaGetErrorString(error));
}

template <int ROWS, class Arguments>
void launch(void (*kernel)(Arguments), const Arguments& arguments, int64_t blocks, cudaStream_t stream) {
  constexpr size_t bytes = sizeof(HitsMemory<ROWS>);
  STD_TORCH_CHECK(blocks <= INT32_MAX, "kdfast::graph_product: too many tiles: ", blocks);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "shared memory");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
        "shared memory");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kdfast::gpu::kTileThreads<ROWS>);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, arguments), "launch");
}

template <bool BFLOAT16, int METRIC, int ROWS>
void launch(const BoundsArguments& arguments, cudaStream_t stream) {
  const int64_t tiles = kdfast::gpu::tiles_of(arguments.product.factors.n, ROWS);
  launch<ROWS>(graph_bounds_kernel<BFLOAT16, METRIC, ROWS>, arguments, tiles * arguments.splits, stream);
}
template <bool BFLOAT16, int METRIC, int ROWS>
void launch(const HitsArguments& arguments, cudaStream_t stream) {
  const int64_t blocks = kdfast::gpu::hits_blocks<ROWS>(arguments);
  launch<ROWS>(graph_hits_kernel<BFLOAT16, METRIC, ROWS>, arguments, blocks, stream);
}

template <bool BFLOAT16, int METRIC, class Arguments>
void launch(int64_t rows, const Arguments& arguments, cudaStream_t stream) {
  switch (rows) {
    case 128: return launch<BFLOAT16, METRIC, 128>(arguments, stream);
    case 256: return launch<BFLOAT16, METRIC, 256>(arguments, stream);
    default: STD_TORCH_CHECK(false, "kdfast::graph_product: no tiles of ", rows, " rows");
  }
}

template <bool BFLOAT16, class Arguments>
void launch(int64_t metric, int64_t rows, const Arguments& arguments, cudaStream_t stream) {
  switch (metric) {
    case kdfast::gpu::kCosine: return launch<BFLOAT16, kdfast::gpu::kCosine>(rows, arguments, stream);
    case kdfast::gpu::kDot: return launch<BFLOAT16, kdfast::gpu::kDot>(rows, arguments, stream);
    case kdfast::gpu::kEuclidean: return launch<BFLOAT16, kdfast::gpu::kEuclidean>(rows, arguments, stream);
    default: STD_TORCH_CHECK(false, "kdfast::graph_product: no such metric: ", metric);
  }
}

template <class Arguments>
void launch(const Tensor& x, int64_t metric, int64_t rows, const Arguments& arguments) {
  using torch::headeronly::ScalarType;
  const int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const auto on = static_cast<cudaStream_t>(stream);
  switch (x.scalar_type()) {
    case ScalarType::Half: return launch<false>(metric, rows, arguments, on);
    case ScalarType::BFloat16: return launch<true>(metric, rows, arguments, on);
    default: STD_TORCH_CHECK(false, "kdfast::graph_product takes float16 or bfloat16");
  }
}

kdfast::gpu::ProductArguments product_of(const Tensor& x, const Tensor& y, const Tensor& a, const Tensor& b,
                                         const std::optional<Tensor>& labels, bool itself) {
  const auto address = [](const Tensor& t) { return reinterpret_cast<uintptr_t>(t.data_ptr()); };
  STD_TORCH_CHECK(x.size(1) % 8 == 0 && address(x) % 16 == 0 && address(y) % 16 == 0,
                  "kdfast::graph_product reads 16 bytes at a time");
  // Tiles begin at numbers of 32 bits, and one may go past the end; so do the bytes from a tile's first row to its last.
  STD_TORCH_CHECK(x.size(0) < 1 << 30 && y.size(0) < 1 << 30 && x.size(1) <= 1 << 22,
                  "kdfast::graph_product takes fewer than 2^30 rows and columns, and up to 2^22 features");
  return {{static_cast<const uint16_t*>(x.data_ptr()), static_cast<const uint16_t*>(y.data_ptr()),
           static_cast<int32_t>(x.size(0)), static_cast<int32_t>(y.size(0)), static_cast<int32_t>(x.size(1))},
          static_cast<const float*>(a.data_ptr()), static_cast<const float*>(b.data_ptr()),
          labels ? static_cast<const int64_t*>(labels->data_ptr()) : nullptr, itself};
}

// Contiguous tensors; kdfast/ops/graph/product.py makes them. ``rows``: of a tile.
void graph_bounds(Tensor x, Tensor y, Tensor a, Tensor b, std::optional<Tensor> labels, Tensor bins, int64_t metric,
                  bool itself, int64_t stride, int64_t rows) {
  STD_TORCH_CHECK(bins.size(1) % kdfast::gpu::kBins == 0 && stride > 0, "kdfast::graph_bounds: no bins of ", bins.size(1));
  const BoundsArguments arguments{product_of(x, y, a, b, labels, itself), static_cast<float*>(bins.data_ptr()),
                                  static_cast<int32_t>(stride),
                                  static_cast<int32_t>(bins.size(1) / kdfast::gpu::kBins)};
  launch(x, metric, rows, arguments);
}

// ``counts`` are 0; ``symmetric``: x and y are one.
void graph_hits(Tensor x, Tensor y, Tensor a, Tensor b, std::optional<Tensor> labels, Tensor limits, Tensor counts,
                Tensor found, int64_t metric, bool itself, bool symmetric, int64_t rows) {
  const HitsArguments arguments{product_of(x, y, a, b, labels, itself), static_cast<const float*>(limits.data_ptr()),
                                static_cast<int32_t*>(counts.data_ptr()), static_cast<int64_t*>(found.data_ptr()),
                                static_cast<int32_t>(found.size(1)), symmetric};
  launch(x, metric, rows, arguments);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(kdfast, m) {
  m.def(
      "graph_bounds(Tensor x, Tensor y, Tensor a, Tensor b, Tensor? labels, Tensor(a!) bins, int metric, bool itself, "
      "int stride, int rows) -> ()");
  m.def(
      "graph_hits(Tensor x, Tensor y, Tensor a, Tensor b, Tensor? labels, Tensor limits, Tensor(a!) counts, "
      "Tensor(b!) found, int metric, bool itself, bool symmetric, int rows) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(kdfast, CUDA, m) {
  m.impl("graph_bounds", TORCH_BOX(&graph_bounds));
  m.impl("graph_hits", TORCH_BOX(&graph_hits));
}
