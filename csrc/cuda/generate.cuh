// Generation: packed = E G^T + g0, float32. A block makes 128 numbers of up to 16 embeddings: G, which is nearly all
// that is read, is read once for sixteen of them.
#pragma once

#include "common.cuh"

namespace hyperformer_fast {

struct GenerateTraits {
  static constexpr int THREADS = 256, NUMBERS = 128, EMBEDDINGS = 16, DEPTH = 64;
  static constexpr int OF_A_THREAD = EMBEDDINGS * NUMBERS / THREADS;
  static constexpr int PITCH = DEPTH + 4;  // floats; 16 bytes from one row to the next bank over
  static constexpr int BYTES = (NUMBERS * PITCH + EMBEDDINGS * DEPTH) * 4;
};

__host__ __device__ __forceinline__ int64_t groups_of(const GenerateParams& p) {
  return (p.n + GenerateTraits::EMBEDDINGS - 1) / GenerateTraits::EMBEDDINGS;
}

__host__ __device__ __forceinline__ int64_t stripes_of(const GenerateParams& p) {
  return (p.P + GenerateTraits::NUMBERS - 1) / GenerateTraits::NUMBERS;
}

// Stripe `stripe` of the numbers of the embeddings of `group`, counted over all Q.
template <bool ALIGNED>
__device__ __forceinline__ void generate_tile(const GenerateParams& p, int64_t stripe, int64_t group,
                                              unsigned char* shared) {
  using Traits = GenerateTraits;
  constexpr int DEPTH = Traits::DEPTH, PITCH = Traits::PITCH, COPY = ALIGNED ? 4 : 1, OF_ROW = DEPTH / COPY;
  float* const g = reinterpret_cast<float*>(shared);  // [NUMBERS, PITCH]
  float* const e = g + Traits::NUMBERS * PITCH;       // [EMBEDDINGS, DEPTH]
  const int thread = threadIdx.x, number = thread % Traits::NUMBERS;
  const int mine = thread / Traits::NUMBERS * Traits::OF_A_THREAD;  // of the embeddings
  const int64_t q = group / groups_of(p), first = (group - q * groups_of(p)) * Traits::EMBEDDINGS;
  const int64_t from = stripe * Traits::NUMBERS, at = from + number;
  const float* const G = p.G + (q * p.P + from) * p.k;
  const float* const E = p.E + (q * p.n + first) * p.k;
  float sum[Traits::OF_A_THREAD] = {};
  for (int64_t k = 0; k < p.k; k += DEPTH) {
    for (int i = thread; i < Traits::NUMBERS * OF_ROW; i += Traits::THREADS) {
      const int row = i / OF_ROW, c = i % OF_ROW * COPY;
      const bool there = from + row < p.P && k + c < p.k;
      copy_async<COPY * 4>(g + row * PITCH + c, there ? G + row * p.k + k + c : G, there);
    }
    for (int i = thread; i < Traits::EMBEDDINGS * OF_ROW; i += Traits::THREADS) {
      const int row = i / OF_ROW, c = i % OF_ROW * COPY;
      const bool there = first + row < p.n && k + c < p.k;
      copy_async<COPY * 4>(e + row * DEPTH + c, there ? E + row * p.k + k + c : E, there);
    }
    copy_commit();
    copy_wait<0>();
    __syncthreads();
#pragma unroll 4
    for (int c = 0; c < DEPTH; c += 4) {
      const float4 w = *reinterpret_cast<const float4*>(g + number * PITCH + c);
#pragma unroll
      for (int i = 0; i < Traits::OF_A_THREAD; ++i) {
        const float4 v = *reinterpret_cast<const float4*>(e + (mine + i) * DEPTH + c);
        sum[i] += w.x * v.x + w.y * v.y + w.z * v.z + w.w * v.w;
      }
    }
    __syncthreads();
  }
  if (at >= p.P) return;
  const float bias = p.g0[q * p.P + at];
#pragma unroll
  for (int i = 0; i < Traits::OF_A_THREAD; ++i)
    if (first + mine + i < p.n) p.packed[(q * p.n + first + mine + i) * p.P + at] = sum[i] + bias;
}

}  // namespace hyperformer_fast
