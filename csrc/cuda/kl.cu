// torch.ops.kdfast.kl_cluster: forward and reverse KL of long rows, each by a cluster of thread blocks (sm_90 and later).
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include "cuda/cluster.cuh"
#include "cuda/kl_cluster.cuh"

namespace {

using kdfast::gpu::KlArguments;
using torch::stable::Tensor;

constexpr int kThreads = 256;
// Blocks a row, as many as every device that has clusters allows. 128256 bfloat16 logits on either side are 64 KB a
// block then, and three blocks fit on an SM.
constexpr int kBlocks = 8;

template <class T, bool REVERSE>
__global__ void __launch_bounds__(kThreads, 2) kl_cluster_kernel(const KlArguments arguments) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ uint4 slice[];
  __shared__ kdfast::PairSums of_warps[kThreads / 32], of_block;
  kdfast::gpu::kl_cluster<T, REVERSE, kThreads>(arguments, slice, of_warps, &of_block);
#endif
}

void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "kdfast::kl_cluster: ", what, ": ", cudaGetErrorString(error));
}

template <class T, bool REVERSE>
void launch(const KlArguments& arguments, int64_t rows, int32_t device, cudaStream_t stream) {
  const int64_t chunks = arguments.classes / kdfast::gpu::Chunk<T>::kSize;
  const int bytes = static_cast<int>(2 * 16 * ((chunks + kBlocks - 1) / kBlocks));
  int most = 0;
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory");
  STD_TORCH_CHECK(bytes + 1024 <= most, "kdfast::kl_cluster: rows of ", arguments.classes, " classes do not fit in ",
                  kBlocks, " blocks");
  const auto kernel = kl_cluster_kernel<T, REVERSE>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "shared memory");
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kBlocks, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(rows * kBlocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, arguments), "launch");
}

template <class T>
void launch(bool reverse, const KlArguments& arguments, int64_t rows, int32_t device, cudaStream_t stream) {
  if (reverse)
    launch<T, true>(arguments, rows, device, stream);
  else
    launch<T, false>(arguments, rows, device, stream);
}

template <class T>
const T* data_of(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->data_ptr()) : nullptr;
}

// (rows, classes) tensors whose rows are contiguous and begin at multiples of 16 bytes; kdfast/ops/kl/cluster.py sees to
// it. float32 losses (rows,); grad, mask, weights and the count's factor may be absent.
void kl_cluster(Tensor student, Tensor teacher, std::optional<Tensor> grad, Tensor losses, std::optional<Tensor> mask,
                std::optional<Tensor> row_weight, std::optional<Tensor> count_factor, double temperature, bool reverse,
                double scale, double weight) {
  using torch::headeronly::ScalarType;
  const int32_t device = student.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const int64_t rows = student.size(0);
  STD_TORCH_CHECK(rows * kBlocks < (int64_t{1} << 31), "kdfast::kl_cluster: too many rows: ", rows);
  const double log2e = 1.4426950408889634;
  const KlArguments arguments{
      student.data_ptr(), teacher.data_ptr(), grad ? grad->data_ptr() : nullptr, static_cast<float*>(losses.data_ptr()),
      data_of<uint8_t>(mask), data_of<double>(row_weight), data_of<float>(count_factor),
      student.stride(0), teacher.stride(0), static_cast<int32_t>(student.size(1)),
      static_cast<float>(log2e / temperature), static_cast<float>(scale), static_cast<float>(scale / temperature),
      static_cast<float>(weight)};
  const auto on = static_cast<cudaStream_t>(stream);
  switch (student.scalar_type()) {
    case ScalarType::Float: return launch<float>(reverse, arguments, rows, device, on);
    case ScalarType::Half: return launch<c10::Half>(reverse, arguments, rows, device, on);
    case ScalarType::BFloat16: return launch<c10::BFloat16>(reverse, arguments, rows, device, on);
    default: STD_TORCH_CHECK(false, "kdfast::kl_cluster takes float16, bfloat16 or float32");
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(kdfast, m) {
  m.def(
      "kl_cluster(Tensor student, Tensor teacher, Tensor(a!)? grad, Tensor(b!) losses, Tensor? mask, Tensor? row_weight, "
      "Tensor? count_factor, float temperature, bool reverse, float scale, float weight) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(kdfast, CUDA, m) { m.impl("kl_cluster", TORCH_BOX(&kl_cluster)); }
