// The instructions that need PTX or an intrinsic: 16-bit conversions, asynchronous copies, ldmatrix, mma.sync. Where
// the compiler is not nvcc, the tests' emulator defines them instead.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#define HFF_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

namespace hyperformer_fast {

__device__ __forceinline__ float wide_bf16(uint16_t x) { return __uint_as_float(uint32_t(x) << 16); }
__device__ __forceinline__ uint16_t narrow_bf16(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
__device__ __forceinline__ float wide_f16(uint16_t x) { return __half2float(__ushort_as_half(x)); }
__device__ __forceinline__ uint16_t narrow_f16(float x) { return __half_as_ushort(__float2half_rn(x)); }

// Starts to copy kBytes (4 or 16) from global to shared memory, or as many zeros where `there` is false.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool there) {
  static_assert(kBytes == 4 || kBytes == 16);
  const uint32_t address = uint32_t(__cvta_generic_to_shared(to));
  const int bytes = there ? kBytes : 0;
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}
// Closes the group of the copies that this thread started since the last call.
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all but the last LEFT groups have arrived.
template <int LEFT>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// ldmatrix_x4: loads four 8x8 matrices of 16-bit numbers. Lane l gives the address of row l % 8 of matrix l / 8.
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

// d += a b on tensor cores, with the fragments that PTX defines for each shape.
#define HFF_MMA(NAME, SHAPE)                                                                              \
  __device__ __forceinline__ void NAME(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { \
    asm volatile("mma.sync.aligned." SHAPE " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"       \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                         \
  }
HFF_MMA(mma_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
HFF_MMA(mma_f16, "m16n8k16.row.col.f32.f16.f16.f32")
HFF_MMA(mma_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef HFF_MMA

// The same in float64, m8n8k4: a is A[lane / 4][lane % 4], b is B[lane % 4][lane / 4], d[e] is D[lane / 4][2 (lane % 4)
// + e].
__device__ __forceinline__ void mma_f64(double (&d)[2], double a, double b) {
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};"
               : "+d"(d[0]), "+d"(d[1])
               : "d"(a), "d"(b));
}

}  // namespace hyperformer_fast
#else
#include "cuda_emulator.h"
#endif
