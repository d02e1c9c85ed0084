// What the rows add up to in the weights' gradients: dz^T x, (r h)^T g and smaller sums, over fixed stretches of rows.
// finish.cu makes dpacked of them.
//
// A block has 256 bytes of every row's columns, one task and one stretch, and takes the rows of its own task alone: no
// sort, no count of rows per task. Further blocks have the sums without a d-wide side. The rows come in by cp.async,
// double-buffered; ldmatrix turns both operands, for the sum runs over rows.
#pragma once

#include "launch.cuh"
#include "row_tile.cuh"

namespace hyperformer_fast {

template <class S, int BB>
struct WeightTraits {
  using T = typename S::T;
  static constexpr bool FLOAT = sizeof(T) == 4;
  static constexpr int WARPS = 8, THREADS = 32 * WARPS, BUFFERS = 2, PIECE = kPiece<S>;
  static constexpr int COLUMNS = 256 / int(sizeof(T)), PIECES = 16;  // of a row in a block
  static constexpr int TILES = COLUMNS / WARPS / 8;                  // of 8 columns in a warp
  static constexpr int BLOCKS = BB / 16;                             // of 16 bottleneck numbers
  // Row lengths in bytes that put what the lanes of a warp read at a time into different banks.
  static constexpr int X_ROW = 256 + (FLOAT ? 32 : 16);
  static constexpr int DZ_ROW = FLOAT ? (BB + 8) * 4 : BB * 2 + 16;
  // r h may pass float16's range either way, so there it is float32 and its product one of tf32, whose mantissa is as
  // long as float16's.
  static constexpr int H_ROW = S::SHORT_RANGE ? (BB + 4) * 4 : DZ_ROW;
  static constexpr int STAGE = kUnit * X_ROW;
  static constexpr int AT_DZ = 2 * BUFFERS * STAGE;
  static constexpr int AT_H = AT_DZ + kUnit * DZ_ROW;
  static constexpr int AT_R = AT_H + kUnit * H_ROW;
  static constexpr int BYTES = AT_R + kUnit * 4;
  static constexpr int GRAM = BB < 32 ? BB : 32;  // columns of M that a block of the small sums has

  static_assert(COLUMNS == WARPS * TILES * 8 && TILES == (FLOAT ? 1 : 2),
                "a warp has one 8-column tile of tf32, or two");
  static_assert(PIECES * PIECE == COLUMNS && BB % 16 == 0 && BB % GRAM == 0 && GRAM % 16 == 0);
  static_assert(X_ROW % 16 == 0 && DZ_ROW % 16 == 0 && H_ROW % 16 == 0,
                "ldmatrix and 16-byte copies need aligned rows");
  static_assert(STAGE % 16 == 0 && AT_DZ % 16 == 0 && AT_H % 16 == 0 && AT_R % 16 == 0);
  static_assert(BB < THREADS && THREADS == 16 * 16, "one thread beyond the bottleneck's has the corner of M");
  static_assert((kUnit * (BB + 1) + 3 * kUnit) * 4 <= BYTES, "the small sums' r h, r, m2 and s fit, too");
  static_assert(BYTES <= kMostSharedBytes);
};

// The units of a stretch whose rows are one task's, in order.
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

// Sums of a stretch that have no d-wide side: columns `gram` * GRAM .. of M; the first block all the others, too.
template <class S, int BB>
__device__ void small_sums(const WeightGradientParams& p, Stretch stretch, int gram, float* out, float* shared) {
  using Traits = WeightTraits<S, BB>;
  using T = typename S::T;
  constexpr int ROW = BB + 1, LINES = BB / 16, GRAM = Traits::GRAM / 16;
  float* const h = shared;  // r h: [kUnit, ROW]
  float* const r = h + kUnit * ROW;
  float* const m2 = r + kUnit;
  float* const s = m2 + kUnit;
  const int b = p.b, thread = threadIdx.x;
  float M[LINES][GRAM] = {}, border = 0.0f, by_s = 0.0f, dz_sum = 0.0f;
  for (; stretch.more(); stretch.next()) {
    const Place place = stretch.place();
    if (p.post_norm) {
      for (int i = thread; i < kUnit; i += Traits::THREADS) {
        const bool there = i < place.rows;
        r[i] = there ? p.r[place.flat + i] : 0.0f;
        m2[i] = there ? p.m2[place.flat + i] : 0.0f;
        s[i] = there ? p.s[place.flat + i] : 0.0f;
      }
      __syncthreads();
      for (int i = thread; i < kUnit * BB; i += Traits::THREADS) {
        const int line = i / BB, j = i % BB;
        h[line * ROW + j] = line < place.rows && j < b ? saved_h<S>(p, place, line, j) * r[line] : 0.0f;
      }
      __syncthreads();
      for (int line = 0; line < kUnit; ++line) {
        const float* const of = h + line * ROW;
        float left[LINES];
        for (int a = 0; a < LINES; ++a) left[a] = m2[line] * of[thread / 16 + 16 * a];
        for (int e = 0; e < GRAM; ++e) {
          const float right = of[gram * Traits::GRAM + thread % 16 + 16 * e];
          for (int a = 0; a < LINES; ++a) M[a][e] += left[a] * right;
        }
      }
    }
    if (gram == 0 && thread < b)
      for (int line = 0; line < place.rows; ++line) {
        dz_sum += S::wide(static_cast<const T*>(p.dz)[(place.flat + line) * b + thread]);
        if (!p.post_norm) continue;
        border += m2[line] * r[line] * h[line * ROW + thread];
        by_s += s[line] * h[line * ROW + thread];
      }
    if (gram == 0 && p.post_norm && thread == Traits::THREADS - 1)  // beyond the bottleneck's threads
      for (int line = 0; line < place.rows; ++line) {
        border += m2[line] * r[line] * r[line];
        by_s += s[line] * r[line];
      }
    __syncthreads();
  }
  out += (2 * int64_t(b) + 2) * p.d;
  for (int a = 0; a < LINES; ++a)
    for (int e = 0; e < GRAM; ++e) {
      const int j = thread / 16 + 16 * a, i = gram * Traits::GRAM + thread % 16 + 16 * e;
      if (p.post_norm && j < b && i < b) out[j * b + i] = M[a][e];
    }
  out += b * b;
  if (gram == 0 && thread < b) out[thread] = border, out[b + thread] = by_s, out[2 * b + thread] = dz_sum;
  if (gram == 0 && thread == Traits::THREADS - 1) out[3 * b] = border, out[3 * b + 1] = by_s;
}

template <class S, int BB, bool ALIGNED>
__global__ void __launch_bounds__(256, 1) weight_gradients_kernel(const WeightGradientParams p) {
  using Traits = WeightTraits<S, BB>;
  using T = typename S::T;
  constexpr int TILES = Traits::TILES, BLOCKS = Traits::BLOCKS;
  HF_SHARED(shared);
  unsigned char* const DZ = shared + Traits::AT_DZ;
  unsigned char* const H = shared + Traits::AT_H;
  float* const R = reinterpret_cast<float*>(shared + Traits::AT_R);
  const int d = p.d, b = p.b, thread = threadIdx.x, lane = thread % 32, warp = thread / 32, quad = lane / 4,
            t = lane % 4;
  const int chunks = (d + Traits::COLUMNS - 1) / Traits::COLUMNS;
  const int of_a_split = chunks + (p.post_norm ? BB / Traits::GRAM : 1);
  const int split = blockIdx.x / of_a_split, chunk = blockIdx.x % of_a_split;
  const int64_t task = blockIdx.y;
  float* const out = part_of(p, split, task);
  Stretch stretch(p, split, task);
  if (chunk >= chunks) return small_sums<S, BB>(p, stretch, chunk - chunks, out, reinterpret_cast<float*>(shared));

  const int column = chunk * Traits::COLUMNS;
  const auto stage = [&](int matrix, int buffer) { return shared + (2 * buffer + matrix) * Traits::STAGE; };
  // Thread by thread the same pieces of x and g as `normalise` takes.
  const auto each_piece = [&](auto body) {
    for (int i = thread; i < kUnit * Traits::PIECES; i += Traits::THREADS)
      body(i / Traits::PIECES, i % Traits::PIECES * Traits::PIECE);
  };
  const auto fetch = [&](const Place& place, int buffer) {
    for (int matrix = 0; matrix < 2; ++matrix) {
      const Rows& rows = matrix ? p.g : p.x;
      const T* const data = start_of<T>(rows, place) + column;
      each_piece([&](int line, int at) {
        unsigned char* const to = stage(matrix, buffer) + line * Traits::X_ROW + at * sizeof(T);
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

  float down[BLOCKS][TILES][4] = {}, up[BLOCKS][TILES][4] = {}, by_r[TILES] = {}, g_sum[TILES] = {};
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
        unsigned char* const piece = stage(0, buffer) + line * Traits::X_ROW + at * sizeof(T);
        *reinterpret_cast<Piece*>(piece) = normalised<S>(*reinterpret_cast<const Piece*>(piece), column + at, d,
                                                         p.pre_mean[place.flat + line], p.pre_rstd[place.flat + line]);
      });
    for (int i = thread; i < kUnit * BB; i += Traits::THREADS) {
      const int line = i / BB, j = i % BB;
      const bool there = line < place.rows && j < b;
      float h = there ? saved_h<S>(p, place, line, j) : 0.0f;
      if (there && p.post_norm) h *= p.r[place.flat + line];
      if constexpr (S::SHORT_RANGE)
        reinterpret_cast<float*>(H + line * Traits::H_ROW)[j] = bits<float>(F32::large(bits<uint32_t>(h)));
      else
        reinterpret_cast<T*>(H + line * Traits::H_ROW)[j] = S::narrow(h);
      reinterpret_cast<T*>(DZ + line * Traits::DZ_ROW)[j] =
          there ? static_cast<const T*>(p.dz)[(place.flat + line) * b + j] : T(0);
    }
    for (int i = thread; i < kUnit; i += Traits::THREADS)
      R[i] = i >= place.rows ? 0.0f : p.post_norm ? p.r[place.flat + i] : 1.0f;
    __syncthreads();
    const unsigned char* const X = stage(0, buffer);
    const unsigned char* const G = stage(1, buffer);
    if constexpr (Traits::FLOAT) {
      const auto at = [](const unsigned char* row, int i) { return reinterpret_cast<const uint32_t*>(row)[i]; };
#pragma unroll(BB > 64 ? 1 : kUnit)  // more would spill
      for (int k = 0; k < kUnit; k += 8) {
        const int here = warp * 8 + quad, line = k + t;
        const uint32_t x[2] = {at(X + line * Traits::X_ROW, here), at(X + (line + 4) * Traits::X_ROW, here)};
        const uint32_t g[2] = {at(G + line * Traits::X_ROW, here), at(G + (line + 4) * Traits::X_ROW, here)};
        for (int i = 0; i < 2; ++i) add_column(0, R[line + 4 * i], bits<float>(g[i]));
#pragma unroll
        for (int m = 0; m < BLOCKS; ++m) {
          uint32_t a[4], h[4];
          for (int e = 0; e < 4; ++e) {
            const int row = line + e / 2 * 4, j = m * 16 + quad + e % 2 * 8;
            a[e] = at(DZ + row * Traits::DZ_ROW, j), h[e] = at(H + row * Traits::H_ROW, j);
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
        const int of_x = (k + lane % 16) * Traits::X_ROW + (warp * 16 + lane / 16 * 8) * 2;
        uint32_t x[4], g[4];
        load_matrices<true>(x, X + of_x);
        load_matrices<true>(g, G + of_x);
        for (int i = 0; i < 4; ++i) {
          const float* const r = R + k + i % 2 * 8 + 2 * t;
          add_column(i / 2, r[0], low(g[i]));
          add_column(i / 2, r[1], high(g[i]));
        }
#pragma unroll
        for (int m = 0; m < BLOCKS; ++m) {
          const int line = k + lane % 8 + lane / 16 * 8, j = m * 16 + lane / 8 % 2 * 8;
          uint32_t a[4];
          load_matrices<true>(a, DZ + line * Traits::DZ_ROW + j * 2);
          for (int i = 0; i < TILES; ++i) S::mma(down[m][i], a, x[2 * i], x[2 * i + 1]);
          if constexpr (S::SHORT_RANGE) {
            for (int half = 0; half < 2; ++half) {
              for (int e = 0; e < 4; ++e) {
                const int row = k + half * 8 + 2 * t + e / 2, i = m * 16 + quad + e % 2 * 8;
                a[e] = reinterpret_cast<const uint32_t*>(H + row * Traits::H_ROW)[i];
              }
              for (int i = 0; i < TILES; ++i)
                mma_tf32(up[m][i], a, bits<uint32_t>(low(g[2 * i + half])), bits<uint32_t>(high(g[2 * i + half])));
            }
          } else {
            load_matrices<true>(a, H + line * Traits::H_ROW + j * 2);
            for (int i = 0; i < TILES; ++i) S::mma(up[m][i], a, g[2 * i], g[2 * i + 1]);
          }
        }
      }
    }
    __syncthreads();
  }

  const int64_t matrix = int64_t(b) * d;
#pragma unroll
  for (int i = 0; i < TILES; ++i) {
    const int tile = column + (warp * TILES + i) * 8;
#pragma unroll
    for (int m = 0; m < BLOCKS; ++m)
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
    const int64_t chunks = (p.d + Traits::COLUMNS - 1) / Traits::COLUMNS;
    const int64_t blocks = p.splits * (chunks + (p.post_norm ? BB / Traits::GRAM : 1));
    if (blocks > INT32_MAX || p.tasks.T > 65535)
      throw std::runtime_error("adapter_backward: too many tasks or columns for one launch");
    launch(weight_gradients_kernel<S, BB, ALIGNED>, "adapter_backward (weights)",
           dim3{unsigned(blocks), unsigned(p.tasks.T), 1}, Traits::THREADS, Traits::BYTES, stream, p);
  }
};

template <class S>
void weight_gradients_of(const WeightGradientParams& p, void* stream) {
  choose_tile<S, false>(p.d, p.b, p.aligned, LaunchWeightGradients<S>{p, stream});
}

template <class S>
int weight_gradients_bytes(int b) {
  return b <= 16   ? WeightTraits<S, 16>::BYTES
         : b <= 32 ? WeightTraits<S, 32>::BYTES
         : b <= 64 ? WeightTraits<S, 64>::BYTES
                   : WeightTraits<S, kLargestBottleneck>::BYTES;
}

extern template void weight_gradients_of<F32>(const WeightGradientParams&, void*);
extern template void weight_gradients_of<BF16>(const WeightGradientParams&, void*);
extern template void weight_gradients_of<F16>(const WeightGradientParams&, void*);

}  // namespace hyperformer_fast
