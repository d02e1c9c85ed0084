// The few things of CUDA that need PTX. Where the compiler is not nvcc, an emulator's header has them instead, for
// tests.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#define HF_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

namespace hyperformer_fast {

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

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Launches `kernel`; std::runtime_error names what the driver refused.
template <class P>
void launch(void (*kernel)(P), const char* name, dim3 blocks, int threads, size_t shared, void* stream, const P& p) {
  if (shared > 48 << 10)  // more is given only to those that ask
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)), name);
  kernel<<<blocks, threads, shared, static_cast<cudaStream_t>(stream)>>>(p);
  check_cuda(cudaGetLastError(), name);
}

}  // namespace hyperformer_fast
#else
#include "cuda_emulator.h"
#endif
