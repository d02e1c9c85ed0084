// Generation: packed = E G^T + g0 in float32. A block makes 128 numbers of up to 32 embeddings, so that G, which is
// nearly all that is read, is read once for 32 embeddings.
#pragma once

#include "common.cuh"

namespace hyperformer_fast {

struct GenerateTraits {
  static constexpr int THREADS = 256, NUMBERS = 128, EMBEDDINGS = 32, DEPTH = 64;
  static constexpr int HALVES = THREADS / NUMBERS, OF_A_THREAD = EMBEDDINGS / HALVES;
  static constexpr int PITCH = DEPTH + 4;  // floats; 4 more than DEPTH put neighbouring rows into different banks
  static constexpr int BYTES = (NUMBERS * PITCH + EMBEDDINGS * DEPTH) * 4;

  static_assert(THREADS % NUMBERS == 0 && EMBEDDINGS % HALVES == 0);
  static_assert(DEPTH % 4 == 0 && PITCH % 4 == 0, "rows are copied and read 16 bytes at a time");
  static_assert(BYTES <= kMostSharedBytes);
};

__host__ __device__ __forceinline__ int64_t groups_of(const GenerateParams& p) {
  return (p.n + GenerateTraits::EMBEDDINGS - 1) / GenerateTraits::EMBEDDINGS;
}

__host__ __device__ __forceinline__ int64_t stripes_of(const GenerateParams& p) {
  return (p.P + GenerateTraits::NUMBERS - 1) / GenerateTraits::NUMBERS;
}

// Copies numbers k0 .. k0 + DEPTH of ROWS rows of `from` [rows, k] to a tile; zeros beyond `rows` and k.
template <int COPY, int ROWS, int PITCH>
__device__ __forceinline__ void fetch_rows(float* tile, const float* from, int64_t rows, int64_t k, int64_t k0) {
  constexpr int OF_ROW = GenerateTraits::DEPTH / COPY;
  for (int i = threadIdx.x; i < ROWS * OF_ROW; i += GenerateTraits::THREADS) {
    const int row = i / OF_ROW, c = i % OF_ROW * COPY;
    const bool there = row < rows && k0 + c < k;
    copy_async<COPY * 4>(tile + row * PITCH + c, there ? from + row * k + k0 + c : from, there);
  }
}

// Makes stripe `stripe` of the numbers of one group of embeddings; groups are counted over all Q.
__device__ __forceinline__ void generate_tile(const GenerateParams& p, int64_t stripe, int64_t group,
                                              unsigned char* shared) {
  using Traits = GenerateTraits;
  constexpr int NUMBERS = Traits::NUMBERS, EMBEDDINGS = Traits::EMBEDDINGS, DEPTH = Traits::DEPTH,
                PITCH = Traits::PITCH;
  float* const g = reinterpret_cast<float*>(shared);  // [NUMBERS, PITCH]
  float* const e = g + NUMBERS * PITCH;               // [EMBEDDINGS, DEPTH]
  const int thread = threadIdx.x, number = thread % NUMBERS;
  const int mine = thread / NUMBERS;  // the first of this thread's embeddings, which are HALVES apart
  const int64_t q = group / groups_of(p), first = (group - q * groups_of(p)) * EMBEDDINGS;
  const int64_t from = stripe * NUMBERS, at = from + number;
  const float* const G = p.G + (q * p.P + from) * p.k;
  const float* const E = p.E + (q * p.n + first) * p.k;
  const int count = p.n - first < EMBEDDINGS ? int(p.n - first) : EMBEDDINGS;
  float sum[Traits::OF_A_THREAD] = {};
  for (int64_t k = 0; k < p.k; k += DEPTH) {
    if (p.aligned) {
      fetch_rows<4, NUMBERS, PITCH>(g, G, p.P - from, p.k, k);
      fetch_rows<4, EMBEDDINGS, DEPTH>(e, E, count, p.k, k);
    } else {
      fetch_rows<1, NUMBERS, PITCH>(g, G, p.P - from, p.k, k);
      fetch_rows<1, EMBEDDINGS, DEPTH>(e, E, count, p.k, k);
    }
    copy_commit();
    copy_wait<0>();
    __syncthreads();
#pragma unroll 4
    for (int c = 0; c < DEPTH; c += 4) {
      const float4 w = *reinterpret_cast<const float4*>(g + number * PITCH + c);
#pragma unroll
      for (int i = 0; i < Traits::OF_A_THREAD; ++i) {
        const int embedding = mine + Traits::HALVES * i;
        if (embedding >= count) break;
        const float4 v = *reinterpret_cast<const float4*>(e + embedding * DEPTH + c);
        sum[i] += w.x * v.x + w.y * v.y + w.z * v.z + w.w * v.w;
      }
    }
    __syncthreads();
  }
  if (at >= p.P) return;
  const float bias = p.g0[q * p.P + at];
#pragma unroll
  for (int i = 0; i < Traits::OF_A_THREAD; ++i) {
    const int embedding = mine + Traits::HALVES * i;
    if (embedding < count) p.packed[(q * p.n + first + embedding) * p.P + at] = sum[i] + bias;
  }
}

}  // namespace hyperformer_fast
