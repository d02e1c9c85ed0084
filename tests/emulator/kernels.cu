// Small kernels that try the emulator, right ones and faulty ones. Each call runs one and returns what went wrong, "".
#include <cstdint>

#include "../../csrc/cuda/launch.cuh"

namespace {

using namespace hyperformer_fast;

constexpr int THREADS = 64;

enum Fault { NONE, NO_BARRIER, NO_WAIT, DIVERGENT, HALF, BEYOND, BEFORE, LANES, LEFT_OVER, MISALIGNED, GLOBAL };

struct Params {
  const float* from;
  float* to;
  int fault;
};

// to[i] = from[THREADS - 1 - i], through shared memory.
__global__ void reverse_kernel(const Params p) {
  HFF_SHARED(shared);
  float* const values = reinterpret_cast<float*>(shared);
  const int i = threadIdx.x, fault = p.fault;
  copy_async<4>(values + i, p.from + i, true);
  copy_commit();
  if (fault != NO_WAIT && fault != LEFT_OVER) copy_wait<0>();
  if (fault == MISALIGNED) copy_async<4>(shared + 1, p.from, true);
  if (fault == BEYOND) values[THREADS + i % 2] = 0;
  if (fault == BEFORE && i == 0) values[-1] = 0;
  if (fault == LANES && i % 32 < 16) __shfl_xor_sync(~0u, i, 1);
  if (fault == HALF) {
    if (i < 32) __syncthreads();
  } else if (fault == DIVERGENT && i < 32) {
    __syncthreads();
  } else if (fault != NO_BARRIER) {
    __syncthreads();
  }
  p.to[i + (fault == GLOBAL ? THREADS : 0)] = values[THREADS - 1 - i];
  if (fault == NO_WAIT) copy_wait<0>();
}

struct GridParams {
  int* counts;  // [3]: added to by all threads; the largest block; blocks that saw all of the first
  int fault;
};

// Threads of all blocks count, wait for one another, and look.
__global__ void count_kernel(const GridParams p) {
  const int all = int(gridDim.x * blockDim.x), fault = p.fault;
  atomicAdd(p.counts, 1);
  atomicMax(p.counts + 1, int(blockIdx.x));
  if (fault == DIVERGENT) {
    if (blockIdx.x == 0) wait_for_grid();
  } else if (fault == HALF) {
    blockIdx.x == 0 ? wait_for_grid() : wait_for_grid();
    if (blockIdx.x != 0) wait_for_grid();
  } else if (fault != NO_BARRIER) {
    wait_for_grid();
  }
  if (threadIdx.x == 0 && p.counts[0] == all) atomicAdd(p.counts + 2, 1);
}

// Every block adds; no barrier between them.
__global__ void add_kernel(const GridParams p) {
  for (int i = 0; i < 100; ++i) atomicAdd(p.counts, 1);
  int seen = 0;
  while (atomicCAS(p.counts + 1, seen, seen + 1) != seen) seen = p.counts[1];
  atomicMax(p.counts + 2, int(blockIdx.x * blockDim.x + threadIdx.x));
}

struct ProductParams {
  const uint16_t* a;  // [16, 16]
  const uint16_t* b;  // [16, 8]
  float* c;           // [16, 8]
  int half;           // float16, else bfloat16
};

// C = A B as the adapter's kernels make it: A by ldmatrix, B by its transposing form.
__global__ void product_kernel(const ProductParams p) {
  HFF_SHARED(shared);
  auto* const A = reinterpret_cast<uint16_t*>(shared);
  auto* const B = A + 16 * 16;
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) A[i] = p.a[i];
  for (int i = lane; i < 256; i += 32) B[i] = i % 16 < 8 ? p.b[i / 16 * 8 + i % 16] : 0;
  __syncwarp();
  uint32_t a[4], b[4];
  load_matrices<false>(a, A + lane % 16 * 16 + lane / 16 * 8);
  load_matrices<true>(b, B + lane % 16 * 16 + lane / 16 * 8);
  float c[4] = {};
  p.half ? mma_f16(c, a, b[0], b[1]) : mma_bf16(c, a, b[0], b[1]);
  for (int e = 0; e < 4; ++e) p.c[(lane / 4 + e / 2 * 8) * 8 + lane % 4 * 2 + e % 2] = c[e];
}

struct Tf32Params {
  const float* a;  // [16, 8]
  const float* b;  // [8, 8]
  float* c;        // [16, 8]
};

__global__ void tf32_kernel(const Tf32Params p) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  uint32_t a[4], b[2];
  for (int e = 0; e < 4; ++e) std::memcpy(a + e, p.a + (g + e % 2 * 8) * 8 + t + e / 2 * 4, 4);
  for (int e = 0; e < 2; ++e) std::memcpy(b + e, p.b + (t + e * 4) * 8 + g, 4);
  float c[4] = {};
  mma_tf32(c, a, b[0], b[1]);
  for (int e = 0; e < 4; ++e) p.c[(g + e / 2 * 8) * 8 + t * 2 + e % 2] = c[e];
}

template <class F>
const char* outcome(F run) {
  static thread_local std::string message;
  message.clear();
  try {
    run();
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

}  // namespace

#define HFF_EXPORT extern "C" __attribute__((visibility("default")))

HFF_EXPORT const char* reverse(const float* from, float* to, int fault) {
  return outcome([&] { launch<reverse_kernel>("", dim3{1, 1, 1}, THREADS, THREADS * 4, {}, Params{from, to, fault}); });
}

// blocks 0: a launch that is not cooperative.
HFF_EXPORT const char* count(int* counts, int blocks, int fault) {
  return outcome([&] {
    if (blocks == 0)
      launch<count_kernel>("", dim3{2, 1, 1}, THREADS, 0, {}, GridParams{counts, fault});
    else
      launch_together<count_kernel>("", blocks, THREADS, 0, {}, GridParams{counts, fault});
  });
}

HFF_EXPORT const char* add(int* counts, int blocks) {
  return outcome([&] { launch<add_kernel>("", dim3{unsigned(blocks), 1, 1}, THREADS, 0, {}, GridParams{counts, 0}); });
}

HFF_EXPORT const char* product(const uint16_t* a, const uint16_t* b, float* c, int half) {
  return outcome([&] { launch<product_kernel>("", dim3{1, 1, 1}, 32, 1024, {}, ProductParams{a, b, c, half}); });
}

HFF_EXPORT const char* product_tf32(const float* a, const float* b, float* c) {
  return outcome([&] { launch<tf32_kernel>("", dim3{1, 1, 1}, 32, 0, {}, Tf32Params{a, b, c}); });
}

#ifdef HFF_MAIN
#include <vector>

// For AddressSanitizer: a fault's number.
int main(int, char** argv) {
  std::vector<float> from(THREADS, 1.0f), to(THREADS);
  return reverse(from.data(), to.data(), std::atoi(argv[1]))[0] != 0;
}
#endif
