// The order in which the weight gradients take the rows: units grouped by task, and cut into segments of at most
// `share` units of one task. Every block of the weight gradients then has about as much to do, however the tasks are
// mixed. The number of segments is bounded by sizes alone, nothing is read by the host, and the order of summation
// depends on nothing but the tasks.
#pragma once

#include "common.cuh"

namespace hyperformer_fast {

// Writes what `schedule` holds of one task, with all 256 threads of a block. `shared` has room for 256 + 16 integers.
//
// Of n samples of lower tasks with u units, which come first, this task needs to know no more than their numbers: its
// segments start at number u / share + min(n, task). The next task's, by the same rule, then leave room for all of this
// one's, of which only one is not full. What room is left over has empty segments.
__device__ __forceinline__ void schedule_task(const Tasks& tasks, const Schedule& schedule, int task, int* shared) {
  constexpr int kThreads = 256;
  int* const of_lane = shared;  // [kThreads]: the samples of this task that a thread has
  int* const of_warp = shared + kThreads;
  int* const lower_of_warp = of_warp + kThreads / 32;
  const int thread = threadIdx.x, warp = thread / 32;
  // Each thread has a run of neighbouring samples, so that the order of the samples is kept.
  const int64_t each = (tasks.B + kThreads - 1) / kThreads;
  const int64_t from = thread * each < tasks.B ? thread * each : tasks.B;
  const int64_t to = from + each < tasks.B ? from + each : tasks.B;
  int mine = 0, lower = 0;
  for (int64_t sample = from; sample < to; ++sample) {
    const int64_t other = task_of(tasks, sample);
    mine += other == task;
    lower += other >= 0 && other < task;
  }
  of_lane[thread] = mine;
  const int warp_mine = lane_sum<32>(mine), warp_lower = lane_sum<32>(lower);
  if (thread % 32 == 0) of_warp[warp] = warp_mine, lower_of_warp[warp] = warp_lower;
  __syncthreads();
  int count = 0, base = 0, before = 0;
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w < warp) before += of_warp[w];
    count += of_warp[w], base += lower_of_warp[w];
  }
  for (int i = warp * 32; i < thread; ++i) before += of_lane[i];
  int* to_sample = schedule.samples + base + before;
  for (int64_t sample = from; sample < to; ++sample)
    if (task_of(tasks, sample) == task) *to_sample++ = int(sample);

  const int64_t per_sample = units_of(tasks) / tasks.B;
  const int64_t first_unit = base * per_sample, units = count * per_sample, share = schedule.share;
  const int first = int(first_unit / share) + (base < task ? base : task);
  const int next = int((first_unit + units) / share) + (base + count < task + 1 ? base + count : task + 1);
  const int end = task + 1 < tasks.T ? next : schedule.segments;
  for (int i = first + thread; i < end; i += kThreads) {
    const int64_t begin = (i - first) * share, left = units - begin;
    schedule.segment[i] = {task, int(first_unit + begin), int(left < 0 ? 0 : left < share ? left : share)};
  }
  if (thread == 0) schedule.of_task[task] = {first, int((units + share - 1) / share)};
}

__device__ __forceinline__ Segment segment_of(const Tasks& tasks, const Schedule& schedule, int i) {
  if (tasks.index != nullptr) return schedule.segment[i];
  const int64_t first = i * schedule.share, left = units_of(tasks) - first;
  return {0, int(first), int(left < schedule.share ? left : schedule.share)};
}

// The segments whose sums make the gradient of one task.
__device__ __forceinline__ Run segments_of(const Schedule& schedule, int64_t task) {
  return schedule.of_task != nullptr ? schedule.of_task[task] : Run{0, schedule.segments};
}

// Unit `unit` of those that are grouped by task.
__device__ __forceinline__ Place scheduled_place(const Tasks& tasks, const Schedule& schedule, int64_t unit) {
  if (tasks.index == nullptr) return place_of(tasks, unit);
  const int64_t per_sample = (tasks.M + kUnit - 1) / kUnit, i = unit / per_sample;
  return place_of(tasks, schedule.samples[i] * per_sample + (unit - i * per_sample));
}

}  // namespace hyperformer_fast
