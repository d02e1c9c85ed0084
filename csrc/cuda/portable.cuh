// The few things of CUDA that need PTX. Where the compiler is not nvcc, an emulator's header has them instead, for
// tests.
#pragma once

#ifdef __CUDACC__
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#define HF_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

namespace hyperformer_fast {

constexpr int kMostSharedBytes = 99 << 10;  // of a block

__device__ __forceinline__ float wide_bf16(uint16_t x) { return __uint_as_float(uint32_t(x) << 16); }
__device__ __forceinline__ uint16_t narrow_bf16(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
__device__ __forceinline__ float wide_f16(uint16_t x) { return __half2float(__ushort_as_half(x)); }
__device__ __forceinline__ uint16_t narrow_f16(float x) { return __half_as_ushort(__float2half_rn(x)); }

// BYTES (4 or 16) from global to shared memory, or as many zeros where `there` is false.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool there) {
  const uint32_t address = uint32_t(__cvta_generic_to_shared(to));
  const int bytes = there ? BYTES : 0;
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// Four 8x8 matrices of 16-bit numbers; lane l gives the address of row l % 8 of matrix l / 8.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  const uint32_t address = uint32_t(__cvta_generic_to_shared(row));
  if constexpr (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

#define HF_MMA(NAME, SHAPE)                                                                               \
  __device__ __forceinline__ void NAME(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { \
    asm volatile("mma.sync.aligned." SHAPE " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"       \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                         \
  }
HF_MMA(mma_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
HF_MMA(mma_f16, "m16n8k16.row.col.f32.f16.f16.f32")
HF_MMA(mma_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef HF_MMA

// Until all blocks of a launch_together are here, and each sees what the others wrote.
__device__ __forceinline__ void wait_for_grid() { cooperative_groups::this_grid().sync(); }

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // or the next launch of this thread, a good one, would find it
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// More than 48 KiB are given only to kernels that ask. Each asks for the most that every architecture gives (8.6 and
// 8.9): of two host threads at one kernel, the one that needs less must not lower what the other asked for.
template <class P>
void ask_for_shared(void (*kernel)(P), const char* name, size_t shared) {
  if (shared > 48 << 10)
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostSharedBytes), name);
}

// Launches `kernel`; std::runtime_error names what the driver refused.
template <class P>
void launch(void (*kernel)(P), const char* name, dim3 blocks, int threads, size_t shared, void* stream, const P& p) {
  ask_for_shared(kernel, name, shared);
  kernel<<<blocks, threads, shared, static_cast<cudaStream_t>(stream)>>>(p);
  check_cuda(cudaGetLastError(), name);
}

// Launches up to `useful` blocks that may wait for one another: as many as the device holds at a time.
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

}  // namespace hyperformer_fast
#else
#include "cuda_emulator.h"
#endif
