// Launches of kernels, and the barrier of a whole grid. Where the compiler is not nvcc, the tests' emulator defines
// them instead.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "common.cuh"

#ifdef __CUDACC__
#include <cooperative_groups.h>
#endif

namespace hyperformer_fast {

#ifdef __CUDACC__

// Waits until all blocks of a launch_together are here. Each then sees what the others wrote.
__device__ __forceinline__ void wait_for_grid() { cooperative_groups::this_grid().sync(); }

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // else the next launch of this thread would report it
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Asks for the shared memory of a launch, because the driver gives more than 48 KiB only to kernels that ask. Every
// launch asks for the same maximum: were it for what it needs, one host thread could lower what another has just asked
// for the same kernel.
template <class P>
void ask_for_shared(void (*kernel)(P), const char* name, size_t shared) {
  if (shared > 48 << 10)
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostSharedBytes), name);
}

// Launches `kernel`. Throws a std::runtime_error that names what the driver refused.
template <class P>
void launch(void (*kernel)(P), const char* name, dim3 blocks, int threads, size_t shared, void* stream, const P& p) {
  ask_for_shared(kernel, name, shared);
  kernel<<<blocks, threads, shared, static_cast<cudaStream_t>(stream)>>>(p);
  check_cuda(cudaGetLastError(), name);
}

// Launches blocks that may wait for one another: `useful` of them, or as many as the device holds at a time.
template <class P>
void launch_together(void (*kernel)(P), const char* name, int64_t useful, int threads, size_t shared, void* stream,
                     const P& p) {
  int device = 0, able = 0, multiprocessors = 0, fit = 0;
  ask_for_shared(kernel, name, shared);
  check_cuda(cudaGetDevice(&device), name);
  check_cuda(cudaDeviceGetAttribute(&able, cudaDevAttrCooperativeLaunch, device), name);
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), name);
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fit, kernel, threads, shared), name);
  if (!able) throw std::runtime_error(std::string(name) + ": this device has no cooperative launches");
  if (!fit) throw std::runtime_error(std::string(name) + ": a block does not fit on this device");
  const unsigned blocks = unsigned(std::min<int64_t>(useful, int64_t(fit) * multiprocessors));
  void* arguments[] = {const_cast<P*>(&p)};
  check_cuda(
      cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), dim3{blocks, 1, 1},
                                  dim3{unsigned(threads), 1, 1}, arguments, shared, static_cast<cudaStream_t>(stream)),
      name);
}

#endif  // __CUDACC__

// One block for each unit of rows.
inline unsigned blocks_of(const Tasks& tasks, const char* name) {
  const int64_t blocks = units_of(tasks);
  if (blocks > INT32_MAX) throw std::runtime_error(std::string(name) + ": too many rows for one launch");
  return unsigned(blocks);
}

}  // namespace hyperformer_fast
