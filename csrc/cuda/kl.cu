// torch.ops.kdfast.kl_cluster: forward and reverse KL of long rows, each by a cluster of thread blocks (sm_90 and later).
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>

#include "cuda/cluster.cuh"
#include "cuda/kl_cluster.cuh"

namespace {

using kdfast::gpu::KlArguments;
using torch::stable::Tensor;

constexpr int kThreads = 256;
using Inbox = kdfast::gpu::Inbox<kThreads>;
// Of a row in a block, if kMostBlocks are enough for that: three such blocks fit on an SM. 128256 bfloat16 logits on
// either side take 8 blocks then, 32000 take 2.
constexpr int kBytes = 1 << 16;

template <class T, bool REVERSE>
__global__ void __launch_bounds__(kThreads, 3) kl_cluster_kernel(const KlArguments arguments) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ uint4 slice[];
  __shared__ Inbox inboxes[2];
  kdfast::gpu::kl_cluster<T, REVERSE, kThreads>(arguments, slice, inboxes);
#endif
}

void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "kdfast::kl_cluster: ", what, ": ", cudaGetErrorString(error));
}

template <class T, bool REVERSE>
void launch(const KlArguments& arguments, int32_t device, cudaStream_t stream) {
  const int64_t chunks = arguments.classes / kdfast::gpu::Chunk<T>::kSize;
  const auto bytes_of = [&](int blocks) { return 2 * 16 * ((chunks + blocks - 1) / blocks); };
  int blocks = 1, most = 0, clusters = 0;  // few blocks wait less for one another
  while (blocks < kdfast::gpu::kMostBlocks && bytes_of(blocks) > kBytes) blocks *= 2;
  const auto kernel = kl_cluster_kernel<T, REVERSE>;
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory");
  most -= static_cast<int>(2 * sizeof(Inbox));
  STD_TORCH_CHECK(bytes_of(blocks) <= most, "kdfast::kl_cluster: rows of ", arguments.classes,
                  " classes do not fit in ", blocks, " blocks");
  // The same for every call, as other threads may launch the same kernel for other rows.
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), "shared memory");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
        "shared memory");
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(bytes_of(blocks));
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  // As many as run at once, not blocks that fit by blocks a cluster: a cluster stays within one part of the device, and
  // one too many would begin its rows when the others have ended theirs.
  check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), "clusters");
  STD_TORCH_CHECK(clusters > 0, "kdfast::kl_cluster: no cluster of ", blocks, " blocks fits on the device");
  config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>(arguments.rows, clusters) * blocks));
  check(cudaLaunchKernelEx(&config, kernel, arguments), "launch");
}

template <class T>
void launch(bool reverse, const KlArguments& arguments, int32_t device, cudaStream_t stream) {
  if (reverse)
    launch<T, true>(arguments, device, stream);
  else
    launch<T, false>(arguments, device, stream);
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
  const double log2e = 1.4426950408889634;
  const KlArguments arguments{
      student.data_ptr(), teacher.data_ptr(), grad ? grad->data_ptr() : nullptr, static_cast<float*>(losses.data_ptr()),
      data_of<uint8_t>(mask), data_of<double>(row_weight), data_of<float>(count_factor),
      student.stride(0), teacher.stride(0), student.size(0), static_cast<int32_t>(student.size(1)),
      static_cast<float>(log2e / temperature), static_cast<float>(scale), static_cast<float>(scale / temperature),
      static_cast<float>(weight)};
  const auto on = static_cast<cudaStream_t>(stream);
  switch (student.scalar_type()) {
    case ScalarType::Float: return launch<float>(reverse, arguments, device, on);
    case ScalarType::Half: return launch<c10::Half>(reverse, arguments, device, on);
    case ScalarType::BFloat16: return launch<c10::BFloat16>(reverse, arguments, device, on);
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
