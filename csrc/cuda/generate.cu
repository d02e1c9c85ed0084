// Generation for a whole stack: packed = E G^T + g0, float32. One block for 128 numbers of up to 16 embeddings: G,
// which is nearly all that is read, is read once for sixteen of them.
#include "common.cuh"

namespace hyperformer_fast {
namespace {

constexpr int NUMBERS = 128, EMBEDDINGS = 16, DEPTH = 32;

__global__ void __launch_bounds__(NUMBERS) generate_kernel(const GenerateParams p) {
  HF_SHARED(shared);
  float* const g = reinterpret_cast<float*>(shared);  // [NUMBERS, DEPTH + 1]
  float* const e = g + NUMBERS * (DEPTH + 1);         // [EMBEDDINGS, DEPTH]
  const int64_t groups = (p.n + EMBEDDINGS - 1) / EMBEDDINGS, q = blockIdx.y / groups;
  const int64_t first = (blockIdx.y - q * groups) * EMBEDDINGS, from = int64_t(blockIdx.x) * NUMBERS;
  const int64_t at = from + threadIdx.x;
  float sum[EMBEDDINGS] = {};
  for (int64_t k = 0; k < p.k; k += DEPTH) {
    for (int i = threadIdx.x; i < NUMBERS * DEPTH; i += NUMBERS) {
      const int row = i / DEPTH, c = i % DEPTH;
      g[row * (DEPTH + 1) + c] = from + row < p.P && k + c < p.k ? p.G[(q * p.P + from + row) * p.k + k + c] : 0.0f;
    }
    for (int i = threadIdx.x; i < EMBEDDINGS * DEPTH; i += NUMBERS) {
      const int row = i / DEPTH, c = i % DEPTH;
      e[i] = first + row < p.n && k + c < p.k ? p.E[(q * p.n + first + row) * p.k + k + c] : 0.0f;
    }
    __syncthreads();
    for (int c = 0; c < DEPTH; ++c) {
      const float weight = g[threadIdx.x * (DEPTH + 1) + c];
#pragma unroll
      for (int row = 0; row < EMBEDDINGS; ++row) sum[row] += weight * e[row * DEPTH + c];
    }
    __syncthreads();
  }
  if (at >= p.P) return;
  const float bias = p.g0[q * p.P + at];
#pragma unroll
  for (int row = 0; row < EMBEDDINGS; ++row)
    if (first + row < p.n) p.packed[(q * p.n + first + row) * p.P + at] = sum[row] + bias;
}

}  // namespace

void generate(const GenerateParams& p, void* stream) {
  const int64_t columns = (p.P + NUMBERS - 1) / NUMBERS, lines = p.Q * ((p.n + EMBEDDINGS - 1) / EMBEDDINGS);
  if (columns > INT32_MAX || lines > 65535)
    throw std::runtime_error("generate_weights: too many embeddings for one launch");
  launch(generate_kernel, "generate_weights", dim3{unsigned(columns), unsigned(lines), 1}, NUMBERS,
         generate_shared_bytes(), stream, p);
}

int generate_shared_bytes() { return (NUMBERS * (DEPTH + 1) + EMBEDDINGS * DEPTH) * int(sizeof(float)); }

}  // namespace hyperformer_fast
