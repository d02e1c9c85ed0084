// Launches of kernels, and the barrier of a whole grid. Where the compiler is not nvcc, the tests' emulator defines
// them instead.
#pragma once

#include <algorithm>
#include <atomic>
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

// Where asking the driver about a kernel costs more than a launch, it is asked once for each device and kernel.
constexpr int kDevices = 64;  // beyond this many, it is asked at every launch

// Asks for the shared memory of a launch, because the driver gives more than 48 KiB only to kernels that ask. Every
// launch asks for the same maximum: were it for what it needs, one host thread could lower what another has just asked
// for the same kernel.
template <auto kernel>
void ask_for_shared(const char* name, size_t shared, int device) {
  static std::atomic<bool> asked[kDevices];
  if (shared <= 48 << 10 || (device < kDevices && asked[device].load(std::memory_order_relaxed))) return;
  check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  kMostSharedBytes),
             name);
  if (device < kDevices) asked[device].store(true, std::memory_order_relaxed);
}

// How many blocks of a cooperative launch the device holds at a time.
template <auto kernel>
int64_t resident_blocks(const char* name, int threads, size_t shared, int device) {
  struct Known {
    std::atomic<uint64_t> value{0};  // shared memory, and above it how many blocks fit; 0 where nothing is known
  };
  static Known known[kDevices];
  const uint64_t seen = device < kDevices ? known[device].value.load(std::memory_order_relaxed) : 0;
  if (seen != 0 && uint32_t(seen) == shared) return int64_t(seen >> 32);
  int able = 0, multiprocessors = 0, fit = 0;
  check_cuda(cudaDeviceGetAttribute(&able, cudaDevAttrCooperativeLaunch, device), name);
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), name);
  check_cuda(
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fit, reinterpret_cast<const void*>(kernel), threads, shared),
      name);
  if (!able) throw std::runtime_error(std::string(name) + ": this device has no cooperative launches");
  if (!fit) throw std::runtime_error(std::string(name) + ": a block does not fit on this device");
  const int64_t blocks = int64_t(fit) * multiprocessors;
  if (device < kDevices)
    known[device].value.store(uint64_t(blocks) << 32 | uint32_t(shared), std::memory_order_relaxed);
  return blocks;
}

// Launches `kernel`, with one call of the run-time where the kernel ran on this device before. Throws a
// std::runtime_error that names what the driver refused.
template <auto kernel, class P>
void launch(const char* name, dim3 blocks, int threads, size_t shared, const Stream& stream, const P& p) {
  ask_for_shared<kernel>(name, shared, stream.device);
  void* arguments[] = {const_cast<P*>(&p)};
  check_cuda(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), blocks, dim3(unsigned(threads)), arguments, shared,
                              static_cast<cudaStream_t>(stream.handle)),
             name);
}

// Launches blocks that may wait for one another: `useful` of them, or as many as the device holds at a time.
template <auto kernel, class P>
void launch_together(const char* name, int64_t useful, int threads, size_t shared, const Stream& stream, const P& p) {
  ask_for_shared<kernel>(name, shared, stream.device);
  const int64_t fit = resident_blocks<kernel>(name, threads, shared, stream.device);
  void* arguments[] = {const_cast<P*>(&p)};
  check_cuda(
      cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), dim3(unsigned(std::min<int64_t>(useful, fit))),
                                  dim3(unsigned(threads)), arguments, shared, static_cast<cudaStream_t>(stream.handle)),
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
