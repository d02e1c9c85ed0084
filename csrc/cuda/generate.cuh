// Generation: packed = E G^T + g0 in float32. A block makes 128 numbers of up to 64 embeddings, so that G, which is
// nearly all that is read, is read once for 64 embeddings. A thread has two numbers of sixteen embeddings: what it
// reads from shared memory then takes less time than its multiply-adds.
#pragma once

#include "common.cuh"

namespace hyperformer_fast {

struct GenerateTraits {
  static constexpr int kThreads = 256, kNumbers = 128, kEmbeddings = 64, kDepth = 64;
  static constexpr int kEach = 2, kStride = kNumbers / kEach;  // a thread's numbers, and how far apart they are
  static constexpr int kGroups = kThreads / kStride, kOfAThread = kEmbeddings / kGroups;
  static constexpr int kPitch = kDepth + 4;  // floats; 4 more than kDepth put neighbouring rows into different banks
  static constexpr int kBytes = (kNumbers * kPitch + kEmbeddings * kDepth) * 4;

  static_assert(kNumbers % kEach == 0 && kThreads % kStride == 0 && kEmbeddings % kGroups == 0);
  static_assert(kDepth % 4 == 0 && kPitch % 4 == 0, "rows are copied and read 16 bytes at a time");
  static_assert(kBytes <= kMostSharedBytes);
};

__host__ __device__ __forceinline__ int64_t groups_of(const GenerateParams& p) {
  return (p.n + GenerateTraits::kEmbeddings - 1) / GenerateTraits::kEmbeddings;
}

__host__ __device__ __forceinline__ int64_t stripes_of(const GenerateParams& p) {
  return (p.P + GenerateTraits::kNumbers - 1) / GenerateTraits::kNumbers;
}

// Copies numbers k0 .. k0 + kDepth of kRows rows of `from` [rows, k] to a tile; zeros beyond `rows` and k.
template <int kCopy, int kRows, int kPitch>
__device__ __forceinline__ void fetch_rows(float* tile, const float* from, int64_t rows, int64_t k, int64_t k0) {
  constexpr int kOfRow = GenerateTraits::kDepth / kCopy;
  for (int i = threadIdx.x; i < kRows * kOfRow; i += GenerateTraits::kThreads) {
    const int row = i / kOfRow, c = i % kOfRow * kCopy;
    const bool there = row < rows && k0 + c < k;
    copy_async<kCopy * 4>(tile + row * kPitch + c, there ? from + row * k + k0 + c : from, there);
  }
}

// Makes stripe `stripe` of the numbers of one group of embeddings; groups are counted over all Q.
__device__ __forceinline__ void generate_tile(const GenerateParams& p, int64_t stripe, int64_t group,
                                              unsigned char* shared) {
  using Traits = GenerateTraits;
  constexpr int kNumbers = Traits::kNumbers, kEmbeddings = Traits::kEmbeddings, kDepth = Traits::kDepth,
                kPitch = Traits::kPitch;
  float* const g = reinterpret_cast<float*>(shared);  // [kNumbers, kPitch]
  float* const e = g + kNumbers * kPitch;             // [kEmbeddings, kDepth]
  const int thread = threadIdx.x, number = thread % Traits::kStride;
  const int mine = thread / Traits::kStride;  // the first of this thread's embeddings, which are kGroups apart
  const int64_t q = group / groups_of(p), first = (group - q * groups_of(p)) * kEmbeddings;
  const int64_t from = stripe * kNumbers;
  const float* const G = p.G + (q * p.P + from) * p.k;
  const float* const E = p.E + (q * p.n + first) * p.k;
  const int count = p.n - first < kEmbeddings ? int(p.n - first) : kEmbeddings;
  float sum[Traits::kEach][Traits::kOfAThread] = {};
  for (int64_t k = 0; k < p.k; k += kDepth) {
    if (p.aligned) {
      fetch_rows<4, kNumbers, kPitch>(g, G, p.P - from, p.k, k);
      fetch_rows<4, kEmbeddings, kDepth>(e, E, count, p.k, k);
    } else {
      fetch_rows<1, kNumbers, kPitch>(g, G, p.P - from, p.k, k);
      fetch_rows<1, kEmbeddings, kDepth>(e, E, count, p.k, k);
    }
    copy_commit();
    copy_wait<0>();
    __syncthreads();
#pragma unroll 2
    for (int c = 0; c < kDepth; c += 4) {
      float4 w[Traits::kEach];
      for (int u = 0; u < Traits::kEach; ++u)
        w[u] = *reinterpret_cast<const float4*>(g + (number + u * Traits::kStride) * kPitch + c);
#pragma unroll
      for (int i = 0; i < Traits::kOfAThread; ++i) {
        const int embedding = mine + Traits::kGroups * i;
        if (embedding >= count) break;
        const float4 v = *reinterpret_cast<const float4*>(e + embedding * kDepth + c);
        for (int u = 0; u < Traits::kEach; ++u) sum[u][i] += w[u].x * v.x + w[u].y * v.y + w[u].z * v.z + w[u].w * v.w;
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int u = 0; u < Traits::kEach; ++u) {
    const int64_t at = from + number + u * Traits::kStride;
    if (at >= p.P) break;
    const float bias = p.g0[q * p.P + at];
#pragma unroll
    for (int i = 0; i < Traits::kOfAThread; ++i) {
      const int embedding = mine + Traits::kGroups * i;
      if (embedding < count) p.packed[(q * p.n + first + embedding) * p.P + at] = sum[u][i] + bias;
    }
  }
}

}  // namespace hyperformer_fast
