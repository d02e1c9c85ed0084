// The sums over rows that make the weight gradients: dz^T x, (r h)^T g and smaller ones, over segments of rows of one
// task (schedule.cuh). finish.cu turns them into dpacked.
//
// A block has 256 bytes of every row's columns and one segment. Further blocks compute the sums that have no d-wide
// side (bottleneck_sums.cuh). Rows and their records are loaded by cp.async, several units ahead. ldmatrix transposes
// both operands, because the sum runs over rows.
#pragma once

#include "bottleneck_sums.cuh"
#include "launch.cuh"

namespace hyperformer_fast {

template <class S, int BB>
struct WeightTraits {
  using T = typename S::T;
  using Record = RowRecord<S, BB>;
  static constexpr bool kFloat = sizeof(T) == 4;
  static constexpr int kWarps = 8, kThreads = 32 * kWarps, kPiece = kPieceNumbers<S>;
  static constexpr int kColumns = 256 / int(sizeof(T)), kPieces = 16;  // columns and pieces of a row in a block
  static constexpr int kTiles = kColumns / kWarps / 8;                 // 8-column tiles of a warp
  static constexpr int kBlocks = BB / 16;                              // blocks of 16 bottleneck numbers
  // The length of a row of x or g in bytes, padded so that the lanes of a warp read from different banks.
  static constexpr int kXRow = 256 + (kFloat ? 32 : 16);
  // A stage has a unit's rows of x and of g, and their records.
  static constexpr int kAtG = kUnit * kXRow, kAtRecords = 2 * kAtG, kStage = kAtRecords + kUnit * Record::kBytes;
  static constexpr int kBuffers = 3 * kStage <= kMostSharedBytes ? 3 : 2 * kStage <= kMostSharedBytes ? 2 : 1;
  static constexpr int kBytes =
      kBuffers * kStage > BottleneckTraits<S, BB>::kBytes ? kBuffers * kStage : BottleneckTraits<S, BB>::kBytes;

  static_assert(kColumns == kWarps * kTiles * 8 && kTiles == (kFloat ? 1 : 2),
                "a warp has one 8-column tile of tf32, or two");
  static_assert(kPieces * kPiece == kColumns && kThreads == BottleneckTraits<S, BB>::kThreads);
  static_assert(kXRow % 16 == 0 && kStage % 16 == 0, "ldmatrix and 16-byte copies need aligned rows");
  static_assert(kBytes <= kMostSharedBytes);
};

// Mixed batches have a few segments more than multiprocessors, so two blocks should fit on one where they can.
template <class S, int BB, bool ALIGNED>
__global__ void __launch_bounds__(256, sizeof(typename S::T) == 2 && BB <= 32 ? 2 : 1)
    weight_gradients_kernel(const WeightGradientParams p) {
  using Traits = WeightTraits<S, BB>;
  using Record = typename Traits::Record;
  using T = typename S::T;
  constexpr int kTiles = Traits::kTiles, kBlocks = Traits::kBlocks, kBuffers = Traits::kBuffers;
  HFF_SHARED(shared);
  const int d = p.d, b = p.b, thread = threadIdx.x, lane = thread % 32, warp = thread / 32, quad = lane / 4,
            t = lane % 4;
  const int chunks = (d + Traits::kColumns - 1) / Traits::kColumns;
  const int of_a_segment = chunks + (p.post_norm ? BottleneckTraits<S, BB>::kBlocks : 1);
  const int number = blockIdx.x / of_a_segment, chunk = blockIdx.x % of_a_segment;
  const Segment segment = segment_of(p.tasks, p.schedule, number);
  if (segment.count == 0) return;
  float* const out = p.part + number * partial_sums(d, b);
  if (chunk >= chunks) return bottleneck_sums<S, BB>(p, segment, chunk - chunks, out, shared);

  const int column = chunk * Traits::kColumns;
  const auto stage = [&](int i) { return shared + i % kBuffers * Traits::kStage; };
  const auto place = [&](int i) { return scheduled_place(p.tasks, p.schedule, segment.first + i); };
  // Calls body(line, column) for this thread's pieces. A thread normalises the very pieces of x that it copied.
  const auto each_piece = [&](auto body) {
    for (int i = thread; i < kUnit * Traits::kPieces; i += Traits::kThreads)
      body(i / Traits::kPieces, i % Traits::kPieces * Traits::kPiece);
  };
  const auto fetch = [&](const Place& from, unsigned char* to) {
    for (int matrix = 0; matrix < 2; ++matrix) {
      const Rows& rows = matrix ? p.g : p.x;
      const T* const data = start_of<T>(rows, from) + column;
      each_piece([&](int line, int at) {
        unsigned char* const piece_at = to + matrix * Traits::kAtG + line * Traits::kXRow + at * sizeof(T);
        const bool there = line < from.rows && column + at < d;
        const T* const piece_of = data + line * rows.stride_row + at;
        if constexpr (ALIGNED) {
          copy_async<16>(piece_at, there ? piece_of : data - column, there);
        } else {
          const Piece piece = load_piece<S, false>(piece_of - column - at, column + at, d, there);
          memcpy(piece_at, &piece, 16);
        }
      });
    }
    fetch_records<Record>(to + Traits::kAtRecords, p.records, from);
  };

  // edge: the sums of r g and of g, as a product of the records' edges; in float32, where that would be three products,
  // they are added one by one.
  float down[kBlocks][kTiles][4] = {}, up[kBlocks][kTiles][4] = {}, edge[kTiles][4] = {};
  Place next = place(0);  // looked up one unit ahead of its copies, because their addresses wait for it
  for (int i = 0; i < kBuffers - 1; ++i) {
    if (i < segment.count) fetch(next, stage(i));
    copy_commit();
    if (i + 1 < segment.count) next = place(i + 1);
  }
  for (int i = 0; i < segment.count; ++i) {
    unsigned char* const X = stage(i);
    const unsigned char* const G = X + Traits::kAtG;
    const unsigned char* const records = X + Traits::kAtRecords;
    if constexpr (kBuffers == 1) {
      fetch(place(i), X);
      copy_commit();
    }
    copy_wait<(kBuffers > 2 ? kBuffers - 2 : 0)>();
    if (p.pre_norm) {
      const Place here = place(i);
      each_piece([&](int line, int at) {
        if (line >= here.rows) return;
        Piece* const piece = reinterpret_cast<Piece*>(X + line * Traits::kXRow + at * sizeof(T));
        *piece = normalised<S>(*piece, column + at, d, p.pre_mean[here.flat + line], p.pre_rstd[here.flat + line]);
      });
    }
    __syncthreads();
    if constexpr (kBuffers > 1) {  // into the stage that all have read since the barrier before this one
      if (i + kBuffers - 1 < segment.count) fetch(next, stage(i + kBuffers - 1));
      copy_commit();
      if (i + kBuffers < segment.count) next = place(i + kBuffers);
    }
    if constexpr (Traits::kFloat) {
      const auto at = [](const unsigned char* row, int i) { return reinterpret_cast<const uint32_t*>(row)[i]; };
#pragma unroll(BB > 64 ? 1 : kUnit)  // unrolling more would spill
      for (int k = 0; k < kUnit; k += 8) {
        const int here = warp * 8 + quad, line = k + t;
        const uint32_t x[2] = {at(X + line * Traits::kXRow, here), at(X + (line + 4) * Traits::kXRow, here)};
        const uint32_t g[2] = {at(G + line * Traits::kXRow, here), at(G + (line + 4) * Traits::kXRow, here)};
        for (int e = 0; e < 2; ++e) {
          edge[0][0] += Record::r(records + (line + 4 * e) * Record::kBytes) * bits<float>(g[e]);
          edge[0][1] += bits<float>(g[e]);
        }
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) {
          uint32_t a[4], h[4];
          for (int e = 0; e < 4; ++e) {
            const unsigned char* const record = records + (line + e / 2 * 4) * Record::kBytes;
            const int j = m * 16 + quad + e % 2 * 8;
            a[e] = at(record, j), h[e] = at(record + Record::kAtH, j);
          }
          S::mma(down[m][0], a, x[0], x[1]);
          S::mma(up[m][0], h, g[0], g[1]);
        }
      }
    } else {
      const auto low = [](uint32_t pair) { return bits<uint32_t>(S::wide(uint16_t(pair))); };
      const auto high = [](uint32_t pair) { return bits<uint32_t>(S::wide(uint16_t(pair >> 16))); };
#pragma unroll
      for (int k = 0; k < kUnit; k += 16) {
        const int of_x = (k + lane % 16) * Traits::kXRow + (warp * 16 + lane / 16 * 8) * 2;
        uint32_t x[4], g[4];
        load_matrices<true>(x, X + of_x);
        load_matrices<true>(g, G + of_x);
        // Multiplies 16 columns of r h, or the edge's, by g.
        const auto by_g = [&](int j, bool is_edge, float (&sum)[kTiles][4]) {
          if constexpr (Record::kWide) {
            for (int half = 0; half < 2; ++half) {
              uint32_t a[4];
              for (int e = 0; e < 4; ++e) {
                const unsigned char* const record = records + (k + half * 8 + 2 * t + e / 2) * Record::kBytes;
                const bool there = !is_edge || (e % 2 == 0 && quad < 4);
                a[e] = there ? reinterpret_cast<const uint32_t*>(record + Record::kAtH)[j + quad + e % 2 * 8] : 0;
              }
              for (int i = 0; i < kTiles; ++i) mma_tf32(sum[i], a, low(g[2 * i + half]), high(g[2 * i + half]));
            }
          } else {
            uint32_t a[4];
            const int line = k + (is_edge ? lane % 16 : lane % 8 + lane / 16 * 8), at = is_edge ? 0 : lane / 8 % 2 * 8;
            load_matrices<true>(a, records + line * Record::kBytes + Record::kAtH + (j + at) * 2);
            if (is_edge) a[2] = a[1], a[1] = a[3] = 0;  // the edge has eight columns
            for (int i = 0; i < kTiles; ++i) S::mma(sum[i], a, g[2 * i], g[2 * i + 1]);
          }
        };
        by_g(BB, true, edge);
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) {
          const int line = k + lane % 8 + lane / 16 * 8, j = m * 16 + lane / 8 % 2 * 8;
          uint32_t a[4];
          load_matrices<true>(a, records + line * Record::kBytes + j * 2);
          for (int i = 0; i < kTiles; ++i) S::mma(down[m][i], a, x[2 * i], x[2 * i + 1]);
          by_g(m * 16, false, up[m]);
        }
      }
    }
    if constexpr (kBuffers == 1) __syncthreads();
  }
  copy_wait<0>();

  const int64_t matrix = int64_t(b) * d;
  float* const by_r = out + 2 * matrix;
  float* const g_sum = by_r + d;
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
    if constexpr (Traits::kFloat) {
      const float of_r = lane_sum<4>(edge[i][0]), of_g = lane_sum<4>(edge[i][1]);
      if (t == 0 && tile + quad < d) by_r[tile + quad] = of_r, g_sum[tile + quad] = of_g;
    } else {
      for (int e = 0; e < 2; ++e) {
        const int at = tile + t * 2 + e;
        // The lanes of row 0 add row 1, which has the small part of a bfloat16's r.
        const float of_r = edge[i][e] + (Record::kWide ? 0.0f : __shfl_xor_sync(~0u, edge[i][e], 4));
        if (quad == 0 && at < d) by_r[at] = of_r;
        if (quad == Record::kOnes && at < d) g_sum[at] = edge[i][e];
      }
    }
  }
}

template <class S>
struct LaunchWeightGradients {
  const WeightGradientParams& p;
  const Stream& stream;

  template <int BB, int, bool ALIGNED>
  void at() const {
    using Traits = WeightTraits<S, BB>;
    const int64_t chunks = (p.d + Traits::kColumns - 1) / Traits::kColumns;
    const int64_t blocks = p.schedule.segments * (chunks + (p.post_norm ? BottleneckTraits<S, BB>::kBlocks : 1));
    if (blocks > INT32_MAX) throw std::runtime_error("adapter_backward: too many tasks or columns for one launch");
    launch<weight_gradients_kernel<S, BB, ALIGNED>>("adapter_backward (weights)", dim3{unsigned(blocks), 1, 1},
                                                    Traits::kThreads, Traits::kBytes, stream, p);
  }
};

template <class S>
void weight_gradients_of(const WeightGradientParams& p, const Stream& stream) {
  choose_tile<S, false>(p.d, p.b, p.aligned, LaunchWeightGradients<S>{p, stream});
}

template <class S>
int weight_gradients_bytes(int b) {
  return b <= 16   ? WeightTraits<S, 16>::kBytes
         : b <= 32 ? WeightTraits<S, 32>::kBytes
         : b <= 64 ? WeightTraits<S, 64>::kBytes
                   : WeightTraits<S, kLargestBottleneck>::kBytes;
}

extern template void weight_gradients_of<F32>(const WeightGradientParams&, const Stream&);
extern template void weight_gradients_of<BF16>(const WeightGradientParams&, const Stream&);
extern template void weight_gradients_of<F16>(const WeightGradientParams&, const Stream&);

}  // namespace hyperformer_fast
