// What the backward's first kernel keeps of a row for the weight gradients, in one record: dz, r h, and an edge with r,
// m2 and s. Without a post-norm, r is 1 and m2 and s are 0. The records of a unit are what the weight gradients load
// into shared memory, byte for byte: ldmatrix can read dz and r h there without bank conflicts.
//
// The edge is more columns of r h to a tensor core. Its product with g gives the sums of r g and of g, which would
// otherwise need more instructions than the products themselves.
#pragma once

#include <type_traits>

#include "common.cuh"

namespace hyperformer_fast {

template <class S, int BB>
struct RowRecord {
  using T = typename S::T;
  // In float16, r h may overflow or underflow. There it stays float32, and its product is one of tf32, whose mantissa
  // is as long as float16's.
  using H = std::conditional_t<S::kShortRange, float, T>;
  static constexpr bool kWide = sizeof(H) == 4;
  // Columns of the edge: those that the sums of r g come from, and that of the sum of g. A bfloat16 holds r in two
  // parts.
  static constexpr int kOnes = kWide ? 3 : 2;
  static constexpr int kAtH = BB * int(sizeof(T)), kAtEdge = kAtH + BB * int(sizeof(H));
  static constexpr int kBytes = kAtEdge + (sizeof(T) == 4 ? 32 : 16);
  static_assert(BB % 16 == 0 && kAtH % 16 == 0 && kBytes % 16 == 0);
  static_assert(sizeof(T) == 4 ? kBytes / 4 % 32 == 8 : kBytes / 16 % 2 == 1, "a warp reads from different banks");

  static __device__ __forceinline__ T& dz(unsigned char* record, int j) { return reinterpret_cast<T*>(record)[j]; }
  static __device__ __forceinline__ float dz(const unsigned char* record, int j) {
    return S::wide(reinterpret_cast<const T*>(record)[j]);
  }
  static __device__ __forceinline__ void put_h(unsigned char* record, int j, float h) {
    if constexpr (S::kShortRange)
      reinterpret_cast<float*>(record + kAtH)[j] = bits<float>(F32::large(bits<uint32_t>(h)));
    else
      reinterpret_cast<T*>(record + kAtH)[j] = S::narrow(h);
  }
  static __device__ __forceinline__ float h(const unsigned char* record, int j) {
    if constexpr (kWide)
      return reinterpret_cast<const float*>(record + kAtH)[j];
    else
      return S::wide(reinterpret_cast<const T*>(record + kAtH)[j]);
  }
  static __device__ __forceinline__ void put_edge(unsigned char* record, float r, float m2, float s) {
    float* const edge = reinterpret_cast<float*>(record + kAtEdge);
    if constexpr (kWide) {
      edge[0] = r, edge[1] = m2, edge[2] = s, edge[3] = 1.0f;
    } else {
      const T large = S::narrow(r), small = S::narrow(r - S::wide(large));
      edge[0] = bits<float>(large | uint32_t(small) << 16), edge[1] = bits<float>(uint32_t(S::narrow(1.0f)));
      edge[2] = m2, edge[3] = s;
    }
  }
  static __device__ __forceinline__ float r(const unsigned char* record) {
    if constexpr (kWide) {
      return reinterpret_cast<const float*>(record + kAtEdge)[0];
    } else {
      const T* const parts = reinterpret_cast<const T*>(record + kAtEdge);
      return S::wide(parts[0]) + S::wide(parts[1]);
    }
  }
  static __device__ __forceinline__ float m2(const unsigned char* record) {
    return reinterpret_cast<const float*>(record + kAtEdge)[kWide ? 1 : 2];
  }
  static __device__ __forceinline__ float s(const unsigned char* record) {
    return reinterpret_cast<const float*>(record + kAtEdge)[kWide ? 2 : 3];
  }
};

}  // namespace hyperformer_fast
