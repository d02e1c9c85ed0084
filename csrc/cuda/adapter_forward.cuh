// The adapter's forward (docs/design.md). A block takes 32 rows of one sample; few_rows.cuh has the kernel for batches
// of few rows.
#pragma once

#include "launch.cuh"
#include "row_tile.cuh"

namespace hyperformer_fast {

template <class S, bool ALIGNED>
__device__ void pass_forward(const ForwardParams& p, const Place& place, bool none) {
  using T = typename S::T;
  pass<S, ALIGNED>(start_of<T>(p.x, place), p.x.stride_row, static_cast<T*>(p.out) + place.flat * p.d, place.rows, p.d,
                   none);
  if (p.z == nullptr) return;
  const float saved = none ? 0.0f : bits<float>(0x7FC00000u);
  for (int i = threadIdx.x; i < place.rows * p.b; i += blockDim.x)
    static_cast<T*>(p.z)[place.flat * p.b + i] = S::narrow(saved);
  for (int i = threadIdx.x; i < place.rows; i += blockDim.x) {
    if (p.post_norm) p.r[place.flat + i] = saved;
    if (p.pre_norm) p.pre_mean[place.flat + i] = p.pre_rstd[place.flat + i] = saved;
  }
}

template <class S, int BB, int KEPT, bool ALIGNED>
__device__ __forceinline__ void forward_rows(const ForwardParams& p, const Place& place, unsigned char* shared) {
  using Tile = RowTile<S, BB, KEPT, ALIGNED>;
  using Traits = typename Tile::Traits;
  using T = typename S::T;
  constexpr int kPiece = Traits::kPiece, kChunk = Traits::kChunk, kRows = Traits::kRows;
  float* const partial = reinterpret_cast<float*>(shared);
  float* const H = reinterpret_cast<float*>(shared + Traits::kAtH);
  unsigned char* const W = shared + Traits::kAtW;
  float* const R = reinterpret_cast<float*>(shared + Traits::kAtR);
  float* const sums = reinterpret_cast<float*>(shared + Traits::kAtSums);

  const int d = p.d, b = p.b, thread = threadIdx.x;
  const int64_t flat = place.flat, task = task_of(p.tasks, place.sample);
  if (task < 0 || task >= p.tasks.T) return pass_forward<S, ALIGNED>(p, place, task == -1);

  const TaskWeights<T> weights(p, p.folded, task);
  const Tile tile(start_of<T>(p.x, place), p.x.stride_row, place.rows, d, b);
  const int rows = place.rows;

  float mean[2] = {0, 0}, rstd[2] = {0, 0};
  if (p.pre_norm) {
    tile.each_chunk([&](int, const Piece& above, const Piece& below) {
      for (int i = 0; i < kPiece; ++i) mean[0] += number<S>(above, i), mean[1] += number<S>(below, i);
    });
    tile.sum_rows(mean, sums);
    for (float& m : mean) m /= float(d);
    tile.each_chunk([&](int chunk, const Piece& above, const Piece& below) {
      for (int i = 0; i < kPiece; ++i) {
        if (tile.mine + chunk * kChunk + i >= d) continue;
        const float u = number<S>(above, i) - mean[0], v = number<S>(below, i) - mean[1];
        rstd[0] += u * u, rstd[1] += v * v;
      }
    });
    tile.sum_rows(rstd, sums);
    for (int i = 0; i < 2; ++i) {
      rstd[i] = rsqrtf(rstd[i] / float(d) + kEps);
      if (p.z == nullptr || tile.part != 0 || tile.t != 0 || tile.row[i] >= rows) continue;
      p.pre_mean[flat + tile.row[i]] = mean[i];
      p.pre_rstd[flat + tile.row[i]] = rstd[i];
    }
  }
  tile.down(weights.wd, partial, [&](const Piece& piece, int chunk, int i, bool) {
    return p.pre_norm ? normalised<S>(piece, tile.mine + chunk * kChunk, d, mean[i], rstd[i]) : piece;
  });
  __syncthreads();

  for (int i = thread; i < kRows * BB; i += Traits::kThreads) {
    const int line = i / BB, j = i % BB;
    float h = 0.0f;
    if (j < b) {
      const float sum =
          partial[i] + partial[kRows * BB + i] + partial[2 * kRows * BB + i] + partial[3 * kRows * BB + i];
      // The backward only has the rounded z, and both must compute the same h.
      const T rounded = S::narrow(sum + weights.down_bias[j]);
      h = activate(S::wide(rounded), p.activation);
      if (p.z != nullptr && line < rows) static_cast<T*>(p.z)[(flat + line) * b + j] = rounded;
    }
    H[line * Traits::kHRow + j] = h;
  }
  __syncthreads();

  if (p.post_norm) {
    const int line = thread / 8;
    float squares = 0.0f;
    for (int i = thread % 8; i < b; i += 8) {
      const float q = root_row(weights.root, b, i, H + line * Traits::kHRow);
      squares += q * q;
    }
    squares = lane_sum<8>(squares);
    const float last = weights.root[b * (b + 1) + b], r = rsqrtf(squares + last * last + kEps);
    if (thread % 8 == 0) {
      R[line] = r;
      if (p.z != nullptr && line < rows) p.r[flat + line] = r;
    }
    __syncthreads();
  }
  for (int i = thread; i < kRows * BB; i += Traits::kThreads) {
    const int line = i / BB, j = i % BB;
    float w = H[line * Traits::kHRow + j];
    // Scaled in float32 before it is rounded: r h may leave float16's range, but the scaled row does not.
    if (p.post_norm && j < b) w *= weights.scale[j] * R[line];
    reinterpret_cast<T*>(W + line * Traits::kWRow)[j] = S::narrow(w);
  }

  tile.up(weights.wg, shared, W, [&](int chunk, const Piece& above, const Piece& below, const auto& y) {
    const int column = tile.mine + chunk * kChunk;
    // Read before the first row is stored: the compiler must assume that the store aliases them.
    float bias[kPiece], beta[kPiece];
    for (int c = 0; c < kPiece; ++c) {
      const bool there = (ALIGNED ? column : column + c) < d;
      bias[c] = there ? weights.up_bias[column + c] : 0.0f;
      beta[c] = there && p.post_norm ? weights.beta[column + c] : 0.0f;
    }
    for (int i = 0; i < 2; ++i) {
      const Piece& from = i ? below : above;
      const float r = p.post_norm ? R[tile.row[i]] : 1.0f;
      float value[kPiece];
      for (int c = 0; c < kPiece; ++c)
        value[c] = number<S>(from, c) + (y[c / 2][2 * i + c % 2] + r * bias[c] + beta[c]);
      store_piece<S, ALIGNED>(static_cast<T*>(p.out) + (flat + tile.row[i]) * d, column, d, tile.row[i] < rows,
                              pack<S>(value));
    }
  });
}

template <class S, int BB, int KEPT, bool ALIGNED>
__global__ void __launch_bounds__(256, 1) forward_kernel(const ForwardParams p) {
  HFF_SHARED(shared);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  constexpr bool kSpills = sizeof(typename S::T) == 4;  // ptxas spills for Blackwell where pieces are kept
#else
  constexpr bool kSpills = false;
#endif
  forward_rows<S, BB, kSpills ? 0 : KEPT, ALIGNED>(p, place_of(p.tasks, blockIdx.x), shared);
}

template <class S>
struct LaunchForward {
  const ForwardParams& p;
  const Stream& stream;

  template <int BB, int KEPT, bool ALIGNED>
  void at() const {
    launch<forward_kernel<S, BB, KEPT, ALIGNED>>("adapter_forward", dim3{blocks_of(p.tasks, "adapter_forward"), 1, 1},
                                                 TileTraits<S, BB>::kThreads, TileTraits<S, BB>::kBytes, stream, p);
  }
};

template <class S>
void forward_of(const ForwardParams& p, const Stream& stream) {
  choose_tile<S, true>(p.d, p.b, p.aligned, LaunchForward<S>{p, stream});
}

// Each number type has a translation unit of its own, so that they compile in parallel.
extern template void forward_of<F32>(const ForwardParams&, const Stream&);
extern template void forward_of<BF16>(const ForwardParams&, const Stream&);
extern template void forward_of<F16>(const ForwardParams&, const Stream&);

}  // namespace hyperformer_fast
