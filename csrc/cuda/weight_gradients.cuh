// The sums over rows that make the weight gradients: dz^T x, (r h)^T g and smaller ones, over fixed stretches of rows.
// finish.cu turns them into dpacked.
//
// A block has 256 bytes of every row's columns, one task and one stretch. It skips the rows of other tasks, so that
// rows need neither be sorted nor counted by task. Further blocks compute the sums that have no d-wide side. Rows are
// loaded by cp.async, double-buffered. ldmatrix transposes both operands, because the sum runs over rows.
#pragma once

#include "launch.cuh"
#include "row_tile.cuh"

namespace hyperformer_fast {

template <class S, int BB>
struct WeightTraits {
  using T = typename S::T;
  static constexpr bool kFloat = sizeof(T) == 4;
  static constexpr int kWarps = 8, kThreads = 32 * kWarps, kBuffers = 2, kPiece = kPieceNumbers<S>;
  static constexpr int kColumns = 256 / int(sizeof(T)), kPieces = 16;  // columns and pieces of a row in a block
  static constexpr int kTiles = kColumns / kWarps / 8;                 // 8-column tiles of a warp
  static constexpr int kBlocks = BB / 16;                              // blocks of 16 bottleneck numbers
  // Row lengths in bytes. They are padded so that the lanes of a warp read from different banks.
  static constexpr int kXRow = 256 + (kFloat ? 32 : 16);
  static constexpr int kDzRow = kFloat ? (BB + 8) * 4 : BB * 2 + 16;
  // In float16, r h may overflow or underflow. There it stays float32, and its product is one of tf32, whose mantissa
  // is as long as float16's.
  static constexpr int kHRow = S::kShortRange ? (BB + 4) * 4 : kDzRow;
  static constexpr int kStage = kUnit * kXRow;
  static constexpr int kAtDz = 2 * kBuffers * kStage;
  static constexpr int kAtH = kAtDz + kUnit * kDzRow;
  static constexpr int kAtR = kAtH + kUnit * kHRow;
  static constexpr int kBytes = kAtR + kUnit * 4;
  static constexpr int kGram = BB < 32 ? BB : 32;  // columns of M in a block of the small sums

  static_assert(kColumns == kWarps * kTiles * 8 && kTiles == (kFloat ? 1 : 2),
                "a warp has one 8-column tile of tf32, or two");
  static_assert(kPieces * kPiece == kColumns && BB % 16 == 0 && BB % kGram == 0 && kGram % 16 == 0);
  static_assert(kXRow % 16 == 0 && kDzRow % 16 == 0 && kHRow % 16 == 0,
                "ldmatrix and 16-byte copies need aligned rows");
  static_assert(kStage % 16 == 0 && kAtDz % 16 == 0 && kAtH % 16 == 0 && kAtR % 16 == 0);
  static_assert(BB < kThreads && kThreads == 16 * 16, "one thread beyond the bottleneck's has the corner of M");
  static_assert((kUnit * (BB + 1) + 3 * kUnit) * 4 <= kBytes, "the small sums' r h, r, m2 and s fit, too");
  static_assert(kBytes <= kMostSharedBytes);
};

// Walks over those units of a stretch whose rows belong to one task.
struct Stretch {
  const Tasks& tasks;
  int64_t task, unit, last;

  __device__ __forceinline__ Stretch(const WeightGradientParams& p, int64_t split, int64_t task)
      : tasks(p.tasks), task(task), unit(split * p.units_per_split) {
    const int64_t all = units_of(tasks);
    last = unit + p.units_per_split < all ? unit + p.units_per_split : all;
    skip();
  }
  __device__ __forceinline__ bool more() const { return unit < last; }
  __device__ __forceinline__ Place place() const { return place_of(tasks, unit); }
  __device__ __forceinline__ void next() { ++unit, skip(); }

 private:
  __device__ __forceinline__ void skip() {
    while (unit < last && task_of(tasks, place().sample) != task) ++unit;
  }
};

__device__ __forceinline__ float* part_of(const WeightGradientParams& p, int64_t split, int64_t task) {
  return p.part + (split * p.tasks.T + task) * partial_sums(p.d, p.b);
}

template <class S>
__device__ __forceinline__ float saved_h(const WeightGradientParams& p, const Place& place, int line, int j) {
  return activate(S::wide(static_cast<const typename S::T*>(p.z)[(place.flat + line) * p.b + j]), p.activation);
}

// The sums of a stretch that have no d-wide side: kGram columns of M, from column `gram` * kGram on. The first block
// (gram = 0) also computes all the others.
template <class S, int BB>
__device__ void small_sums(const WeightGradientParams& p, Stretch stretch, int gram, float* out, float* shared) {
  using Traits = WeightTraits<S, BB>;
  using T = typename S::T;
  constexpr int kRow = BB + 1, kLines = BB / 16, kGram = Traits::kGram / 16;
  float* const h = shared;  // r h: [kUnit, kRow]
  float* const r = h + kUnit * kRow;
  float* const m2 = r + kUnit;
  float* const s = m2 + kUnit;
  const int b = p.b, thread = threadIdx.x;
  float M[kLines][kGram] = {}, border = 0.0f, by_s = 0.0f, dz_sum = 0.0f;
  for (; stretch.more(); stretch.next()) {
    const Place place = stretch.place();
    if (p.post_norm) {
      for (int i = thread; i < kUnit; i += Traits::kThreads) {
        const bool there = i < place.rows;
        r[i] = there ? p.r[place.flat + i] : 0.0f;
        m2[i] = there ? p.m2[place.flat + i] : 0.0f;
        s[i] = there ? p.s[place.flat + i] : 0.0f;
      }
      __syncthreads();
      for (int i = thread; i < kUnit * BB; i += Traits::kThreads) {
        const int line = i / BB, j = i % BB;
        h[line * kRow + j] = line < place.rows && j < b ? saved_h<S>(p, place, line, j) * r[line] : 0.0f;
      }
      __syncthreads();
      for (int line = 0; line < kUnit; ++line) {
        const float* const of = h + line * kRow;
        float left[kLines];
        for (int a = 0; a < kLines; ++a) left[a] = m2[line] * of[thread / 16 + 16 * a];
        for (int e = 0; e < kGram; ++e) {
          const float right = of[gram * Traits::kGram + thread % 16 + 16 * e];
          for (int a = 0; a < kLines; ++a) M[a][e] += left[a] * right;
        }
      }
    }
    if (gram == 0 && thread < b)
      for (int line = 0; line < place.rows; ++line) {
        dz_sum += S::wide(static_cast<const T*>(p.dz)[(place.flat + line) * b + thread]);
        if (!p.post_norm) continue;
        border += m2[line] * r[line] * h[line * kRow + thread];
        by_s += s[line] * h[line * kRow + thread];
      }
    if (gram == 0 && p.post_norm && thread == Traits::kThreads - 1)  // a thread that no bottleneck number uses
      for (int line = 0; line < place.rows; ++line) {
        border += m2[line] * r[line] * r[line];
        by_s += s[line] * r[line];
      }
    __syncthreads();
  }
  out += (2 * int64_t(b) + 2) * p.d;
  for (int a = 0; a < kLines; ++a)
    for (int e = 0; e < kGram; ++e) {
      const int j = thread / 16 + 16 * a, i = gram * Traits::kGram + thread % 16 + 16 * e;
      if (p.post_norm && j < b && i < b) out[j * b + i] = M[a][e];
    }
  out += b * b;
  if (gram == 0 && thread < b) out[thread] = border, out[b + thread] = by_s, out[2 * b + thread] = dz_sum;
  if (gram == 0 && thread == Traits::kThreads - 1) out[3 * b] = border, out[3 * b + 1] = by_s;
}

template <class S, int BB, bool ALIGNED>
__global__ void __launch_bounds__(256, 1) weight_gradients_kernel(const WeightGradientParams p) {
  using Traits = WeightTraits<S, BB>;
  using T = typename S::T;
  constexpr int kTiles = Traits::kTiles, kBlocks = Traits::kBlocks;
  HFF_SHARED(shared);
  unsigned char* const DZ = shared + Traits::kAtDz;
  unsigned char* const H = shared + Traits::kAtH;
  float* const R = reinterpret_cast<float*>(shared + Traits::kAtR);
  const int d = p.d, b = p.b, thread = threadIdx.x, lane = thread % 32, warp = thread / 32, quad = lane / 4,
            t = lane % 4;
  const int chunks = (d + Traits::kColumns - 1) / Traits::kColumns;
  const int of_a_split = chunks + (p.post_norm ? BB / Traits::kGram : 1);
  const int split = blockIdx.x / of_a_split, chunk = blockIdx.x % of_a_split;
  const int64_t task = blockIdx.y;
  float* const out = part_of(p, split, task);
  Stretch stretch(p, split, task);
  if (chunk >= chunks) return small_sums<S, BB>(p, stretch, chunk - chunks, out, reinterpret_cast<float*>(shared));

  const int column = chunk * Traits::kColumns;
  const auto stage = [&](int matrix, int buffer) { return shared + (2 * buffer + matrix) * Traits::kStage; };
  // Calls body(line, column) for this thread's pieces. A thread normalises the very pieces of x that it copied.
  const auto each_piece = [&](auto body) {
    for (int i = thread; i < kUnit * Traits::kPieces; i += Traits::kThreads)
      body(i / Traits::kPieces, i % Traits::kPieces * Traits::kPiece);
  };
  const auto fetch = [&](const Place& place, int buffer) {
    for (int matrix = 0; matrix < 2; ++matrix) {
      const Rows& rows = matrix ? p.g : p.x;
      const T* const data = start_of<T>(rows, place) + column;
      each_piece([&](int line, int at) {
        unsigned char* const to = stage(matrix, buffer) + line * Traits::kXRow + at * sizeof(T);
        const bool there = line < place.rows && column + at < d;
        const T* const from = data + line * rows.stride_row + at;
        if constexpr (ALIGNED) {
          copy_async<16>(to, there ? from : data - column, there);
        } else {
          const Piece piece = load_piece<S, false>(from - column - at, column + at, d, there);
          memcpy(to, &piece, 16);
        }
      });
    }
    copy_commit();
  };

  float down[kBlocks][kTiles][4] = {}, up[kBlocks][kTiles][4] = {}, by_r[kTiles] = {}, g_sum[kTiles] = {};
  const auto add_column = [&](int tile, float r, float g) { by_r[tile] += r * g, g_sum[tile] += g; };
  if (stretch.more()) fetch(stretch.place(), 0);
  for (int buffer = 0; stretch.more(); buffer ^= 1) {
    const Place place = stretch.place();
    stretch.next();
    if (stretch.more()) {
      fetch(stretch.place(), buffer ^ 1);
      copy_wait<1>();
    } else {
      copy_wait<0>();
    }
    if (p.pre_norm)
      each_piece([&](int line, int at) {
        if (line >= place.rows) return;
        unsigned char* const piece = stage(0, buffer) + line * Traits::kXRow + at * sizeof(T);
        *reinterpret_cast<Piece*>(piece) = normalised<S>(*reinterpret_cast<const Piece*>(piece), column + at, d,
                                                         p.pre_mean[place.flat + line], p.pre_rstd[place.flat + line]);
      });
    for (int i = thread; i < kUnit * BB; i += Traits::kThreads) {
      const int line = i / BB, j = i % BB;
      const bool there = line < place.rows && j < b;
      float h = there ? saved_h<S>(p, place, line, j) : 0.0f;
      if (there && p.post_norm) h *= p.r[place.flat + line];
      if constexpr (S::kShortRange)
        reinterpret_cast<float*>(H + line * Traits::kHRow)[j] = bits<float>(F32::large(bits<uint32_t>(h)));
      else
        reinterpret_cast<T*>(H + line * Traits::kHRow)[j] = S::narrow(h);
      reinterpret_cast<T*>(DZ + line * Traits::kDzRow)[j] =
          there ? static_cast<const T*>(p.dz)[(place.flat + line) * b + j] : T(0);
    }
    for (int i = thread; i < kUnit; i += Traits::kThreads)
      R[i] = i >= place.rows ? 0.0f : p.post_norm ? p.r[place.flat + i] : 1.0f;
    __syncthreads();
    const unsigned char* const X = stage(0, buffer);
    const unsigned char* const G = stage(1, buffer);
    if constexpr (Traits::kFloat) {
      const auto at = [](const unsigned char* row, int i) { return reinterpret_cast<const uint32_t*>(row)[i]; };
#pragma unroll(BB > 64 ? 1 : kUnit)  // unrolling more would spill
      for (int k = 0; k < kUnit; k += 8) {
        const int here = warp * 8 + quad, line = k + t;
        const uint32_t x[2] = {at(X + line * Traits::kXRow, here), at(X + (line + 4) * Traits::kXRow, here)};
        const uint32_t g[2] = {at(G + line * Traits::kXRow, here), at(G + (line + 4) * Traits::kXRow, here)};
        for (int i = 0; i < 2; ++i) add_column(0, R[line + 4 * i], bits<float>(g[i]));
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) {
          uint32_t a[4], h[4];
          for (int e = 0; e < 4; ++e) {
            const int row = line + e / 2 * 4, j = m * 16 + quad + e % 2 * 8;
            a[e] = at(DZ + row * Traits::kDzRow, j), h[e] = at(H + row * Traits::kHRow, j);
          }
          S::mma(down[m][0], a, x[0], x[1]);
          S::mma(up[m][0], h, g[0], g[1]);
        }
      }
    } else {
      const auto low = [](uint32_t pair) { return S::wide(uint16_t(pair)); };
      const auto high = [](uint32_t pair) { return S::wide(uint16_t(pair >> 16)); };
#pragma unroll
      for (int k = 0; k < kUnit; k += 16) {
        const int of_x = (k + lane % 16) * Traits::kXRow + (warp * 16 + lane / 16 * 8) * 2;
        uint32_t x[4], g[4];
        load_matrices<true>(x, X + of_x);
        load_matrices<true>(g, G + of_x);
        for (int i = 0; i < 4; ++i) {
          const float* const r = R + k + i % 2 * 8 + 2 * t;
          add_column(i / 2, r[0], low(g[i]));
          add_column(i / 2, r[1], high(g[i]));
        }
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) {
          const int line = k + lane % 8 + lane / 16 * 8, j = m * 16 + lane / 8 % 2 * 8;
          uint32_t a[4];
          load_matrices<true>(a, DZ + line * Traits::kDzRow + j * 2);
          for (int i = 0; i < kTiles; ++i) S::mma(down[m][i], a, x[2 * i], x[2 * i + 1]);
          if constexpr (S::kShortRange) {
            for (int half = 0; half < 2; ++half) {
              for (int e = 0; e < 4; ++e) {
                const int row = k + half * 8 + 2 * t + e / 2, i = m * 16 + quad + e % 2 * 8;
                a[e] = reinterpret_cast<const uint32_t*>(H + row * Traits::kHRow)[i];
              }
              for (int i = 0; i < kTiles; ++i)
                mma_tf32(up[m][i], a, bits<uint32_t>(low(g[2 * i + half])), bits<uint32_t>(high(g[2 * i + half])));
            }
          } else {
            load_matrices<true>(a, H + line * Traits::kHRow + j * 2);
            for (int i = 0; i < kTiles; ++i) S::mma(up[m][i], a, g[2 * i], g[2 * i + 1]);
          }
        }
      }
    }
    __syncthreads();
  }

  const int64_t matrix = int64_t(b) * d;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int tile = column + (warp * kTiles + i) * 8;
#pragma unroll
    for (int m = 0; m < kBlocks; ++m)
      for (int e = 0; e < 4; ++e) {
        const int j = m * 16 + quad + e / 2 * 8, at = tile + t * 2 + e % 2;
        if (j >= b || at >= d) continue;
        out[int64_t(j) * d + at] = down[m][i][e];
        out[matrix + int64_t(j) * d + at] = up[m][i][e];
      }
    const float by_r_whole = lane_sum<4>(by_r[i]), g_whole = lane_sum<4>(g_sum[i]);
    if (t != 0 || tile + quad >= d) continue;
    out[2 * matrix + tile + quad] = by_r_whole;
    out[2 * matrix + d + tile + quad] = g_whole;
  }
}

template <class S>
struct LaunchWeightGradients {
  const WeightGradientParams& p;
  void* stream;

  template <int BB, int, bool ALIGNED>
  void at() const {
    using Traits = WeightTraits<S, BB>;
    const int64_t chunks = (p.d + Traits::kColumns - 1) / Traits::kColumns;
    const int64_t blocks = p.splits * (chunks + (p.post_norm ? BB / Traits::kGram : 1));
    if (blocks > INT32_MAX || p.tasks.T > 65535)
      throw std::runtime_error("adapter_backward: too many tasks or columns for one launch");
    launch(weight_gradients_kernel<S, BB, ALIGNED>, "adapter_backward (weights)",
           dim3{unsigned(blocks), unsigned(p.tasks.T), 1}, Traits::kThreads, Traits::kBytes, stream, p);
  }
};

template <class S>
void weight_gradients_of(const WeightGradientParams& p, void* stream) {
  choose_tile<S, false>(p.d, p.b, p.aligned, LaunchWeightGradients<S>{p, stream});
}

template <class S>
int weight_gradients_bytes(int b) {
  return b <= 16   ? WeightTraits<S, 16>::kBytes
         : b <= 32 ? WeightTraits<S, 32>::kBytes
         : b <= 64 ? WeightTraits<S, 64>::kBytes
                   : WeightTraits<S, kLargestBottleneck>::kBytes;
}

extern template void weight_gradients_of<F32>(const WeightGradientParams&, void*);
extern template void weight_gradients_of<BF16>(const WeightGradientParams&, void*);
extern template void weight_gradients_of<F16>(const WeightGradientParams&, void*);

}  // namespace hyperformer_fast
