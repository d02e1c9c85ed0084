// The sums of a segment that have no d-wide side, from the rows' records alone: M = sum m2 (r h) (r h)^T with its
// border and corner, (r h)^T s, r . s and sum dz.
//
// A block has kGram columns of M; the first one also has all that is not M. M and what borders it are one product of
// tensor cores, (r h)^T times the columns m2 r h, m2 r and s. It is one of tf32: the left operand, a bfloat16 or a
// tf32, is exact there. In float32 it is three, as everywhere.
#pragma once

#include "row_record.cuh"
#include "row_tile.cuh"
#include "schedule.cuh"

namespace hyperformer_fast {

template <class S, int BB>
struct BottleneckTraits {
  static constexpr int kWarps = 8, kThreads = 32 * kWarps, kBuffers = 2;
  static constexpr int kGram = BB < 32 ? BB : 32, kBlocks = BB / kGram;  // columns of M in a block; blocks
  // Tiles of 16 by 8: M's, and for the first block those of the border. A warp has every eighth.
  static constexpr int kTall = BB / 16, kWide = kGram / 8, kMine = (kTall * (kWide + 1) + kWarps - 1) / kWarps;
  static constexpr int kStage = kUnit * RowRecord<S, BB>::kBytes;
  static constexpr int kBytes = kBuffers * kStage;
  static_assert(kThreads % BB == 0 && kThreads * 4 <= kBytes, "the sums of dz are added up in place of the records");
  static_assert(kUnit == 32, "a lane has a row for the corner");
};

// Starts to copy a unit's records to shared memory; zeros for rows that do not exist.
template <class Record>
__device__ __forceinline__ void fetch_records(unsigned char* to, const void* records, const Place& place) {
  const unsigned char* const from = static_cast<const unsigned char*>(records) + place.flat * Record::kBytes;
  const int bytes = place.rows * Record::kBytes;
  for (int at = threadIdx.x * 16; at < kUnit * Record::kBytes; at += blockDim.x * 16)
    copy_async<16>(to + at, at < bytes ? from + at : from, at < bytes);
}

template <class S, int BB>
__device__ void bottleneck_sums(const WeightGradientParams& p, const Segment& segment, int gram, float* out,
                                unsigned char* shared) {
  using Traits = BottleneckTraits<S, BB>;
  using Record = RowRecord<S, BB>;
  constexpr int kMine = Traits::kMine, kTall = Traits::kTall, kWide = Traits::kWide;
  const int b = p.b, thread = threadIdx.x, lane = thread % 32, warp = thread / 32, quad = lane / 4, t = lane % 4;
  const int tiles = !p.post_norm ? 0 : kTall * (kWide + (gram == 0));
  const auto stage = [&](int i) { return shared + i % Traits::kBuffers * Traits::kStage; };
  const auto fetch = [&](int i) {
    fetch_records<Record>(stage(i), p.records, scheduled_place(p.tasks, p.schedule, segment.first + i));
  };
  float sum[kMine][4] = {}, corner = 0.0f, r_by_s = 0.0f, dz_sum = 0.0f;
  fetch(0);
  copy_commit();
  for (int unit = 0; unit < segment.count; ++unit) {
    copy_wait<0>();
    __syncthreads();
    if (unit + 1 < segment.count) fetch(unit + 1);
    copy_commit();
    const unsigned char* const records = stage(unit);
    for (int k = 0; k < kUnit; k += 8) {
      const unsigned char* const near = records + (k + t) * Record::kBytes;
      const unsigned char* const far = near + 4 * Record::kBytes;
      const auto right = [&](const unsigned char* record, int n) {
        // The columns of the last tile are m2 r and s, once more and without meaning for quad > 1.
        const float value = n == kWide ? quad == 0 ? Record::m2(record) * Record::r(record) : Record::s(record)
                                       : Record::m2(record) * Record::h(record, gram * Traits::kGram + n * 8 + quad);
        return bits<uint32_t>(value);
      };
#pragma unroll
      for (int i = 0; i < kMine; ++i) {
        const int tile = warp + Traits::kWarps * i, j = tile % kTall * 16 + quad, n = tile / kTall;
        if (tile >= tiles) break;
        const uint32_t a[4] = {bits<uint32_t>(Record::h(near, j)), bits<uint32_t>(Record::h(near, j + 8)),
                               bits<uint32_t>(Record::h(far, j)), bits<uint32_t>(Record::h(far, j + 8))};
        const uint32_t b0 = right(near, n), b1 = right(far, n);
        if constexpr (sizeof(typename S::T) == 4)
          S::mma(sum[i], a, b0, b1);
        else
          mma_tf32(sum[i], a, F32::large(b0), F32::large(b1));
      }
    }
    if (gram != 0) continue;
    if (warp == 0) {
      const unsigned char* const record = records + lane * Record::kBytes;
      const float r = Record::r(record);
      corner += Record::m2(record) * r * r;
      r_by_s += Record::s(record) * r;
    }
    for (int line = thread / BB; line < kUnit; line += Traits::kThreads / BB)
      dz_sum += Record::dz(records + line * Record::kBytes, thread % BB);
  }
  copy_wait<0>();

  float* const M = out + (2 * int64_t(b) + 2) * p.d;
  float* const border = M + b * b;
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const int tile = warp + Traits::kWarps * i, n = tile / kTall;
    if (tile >= tiles) break;
    for (int e = 0; e < 4; ++e) {
      const int j = tile % kTall * 16 + quad + e / 2 * 8, of_tile = t * 2 + e % 2;
      const int column = gram * Traits::kGram + n * 8 + of_tile;
      if (j >= b) continue;
      if (n < kWide && column < b) M[j * b + column] = sum[i][e];
      if (n == kWide && of_tile < 2) border[of_tile * b + j] = sum[i][e];
    }
  }
  if (gram != 0) return;
  corner = lane_sum<32>(corner), r_by_s = lane_sum<32>(r_by_s);
  if (thread == 0) border[3 * b] = corner, border[3 * b + 1] = r_by_s;
  float* const parts = reinterpret_cast<float*>(shared);
  __syncthreads();
  parts[thread] = dz_sum;
  __syncthreads();
  if (thread >= b) return;
  for (int i = thread + BB; i < Traits::kThreads; i += BB) dz_sum += parts[i];
  border[2 * b + thread] = dz_sum;
}

}  // namespace hyperformer_fast
