// Runs CUDA kernels on the CPU: a stack per thread, one block after the other. For tests: slow, and strict.
//
// Shared memory starts as NaN and is guarded; an asynchronous copy arrives at its wait and not before, or, as it may on
// a GPU too, at once (HF_EMULATOR_COPIES "late" or "early"); threads run in the order of HF_EMULATOR_ORDER ("forward",
// "reverse" or a seed), each until it must wait. A barrier that not all threads reach at the same place, a warp-wide
// operation that not all lanes reach, copies never waited for, and writes beyond shared memory end the launch with a
// std::runtime_error.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/cpu/convert.h"
#include "context.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define HF_SHARED(name) unsigned char* name = ::emulator::block->shared

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

struct alignas(16) float4 {
  float x, y, z, w;
};

namespace emulator {

using Where = std::source_location;

struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool there;
};

struct Thread {
  Context context;
  dim3 index;
  int rank = 0;
  enum { READY, BARRIER, WARP, DONE } state = READY;
  Where where;
  std::vector<Copy> copies;
  std::vector<std::vector<Copy>> groups;
};

struct Warp {
  int arrived = 0;
  void* argument[32];
};

constexpr size_t kGuard = 256;
constexpr unsigned char kGuardByte = 0xA5;

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<int> order;
  dim3 index, size, grid;
  unsigned char* shared = nullptr;
  int arrived = 0, done = 0;
  bool early_copies = false;
  std::string fault;
  std::function<void()> kernel;
  Context scheduler;
};

inline thread_local Block* block;
inline thread_local Thread* self;

inline std::string name_of(const Thread& t) {
  return "thread " + std::to_string(t.rank) + " of block " + std::to_string(block->index.x);
}

inline std::string place(const Where& where) {
  return std::string(where.file_name()) + ":" + std::to_string(where.line());
}

// Ends the launch: the scheduler throws. Never returns.
[[noreturn]] inline void fail(const std::string& message) {
  block->fault = message;
  self->context.switch_to(block->scheduler);
  std::abort();
}

inline void wait_as(decltype(Thread::state) state, const Where& where) {
  self->state = state;
  self->where = where;
  self->context.switch_to(block->scheduler);
}

inline bool same_place(const Where& a, const Where& b) {
  return a.line() == b.line() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

inline void barrier(const Where& where) {
  Block& b = *block;
  for (const Thread& t : b.threads)
    if (t.state == Thread::BARRIER && !same_place(t.where, where))
      fail("divergent barrier: " + name_of(t) + " waits at " + place(t.where) + ", " + name_of(*self) + " at " +
           place(where));
  if (b.done) fail("divergent barrier: " + std::to_string(b.done) + " threads ended before " + place(where));
  if (++b.arrived < int(b.threads.size())) return wait_as(Thread::BARRIER, where);
  b.arrived = 0;
  for (Thread& t : b.threads)
    if (t.state == Thread::BARRIER) t.state = Thread::READY;
}

// All 32 lanes of a warp arrive with an argument each; the last one runs `together` on all of them.
template <class Argument, class Together>
void warp_wide(Argument& argument, const Where& where, Together together) {
  Block& b = *block;
  const int first = self->rank / 32 * 32;
  Warp& warp = b.warps[self->rank / 32];
  for (int i = first; i < first + 32; ++i)
    if (b.threads[i].state == Thread::WARP && !same_place(b.threads[i].where, where))
      fail("divergent warp: " + name_of(b.threads[i]) + " is at " + place(b.threads[i].where) + ", " + name_of(*self) +
           " at " + place(where));
  warp.argument[self->rank % 32] = &argument;
  if (++warp.arrived < 32) return wait_as(Thread::WARP, where);
  warp.arrived = 0;
  Argument* all[32];
  for (int i = 0; i < 32; ++i) all[i] = static_cast<Argument*>(warp.argument[i]);
  together(all);
  for (int i = first; i < first + 32; ++i)
    if (b.threads[i].state == Thread::WARP) b.threads[i].state = Thread::READY;
}

inline void entry() {
  block->kernel();
  if (!self->copies.empty() || !self->groups.empty())
    fail(name_of(*self) + " ended with asynchronous copies in flight");
  if (block->arrived) fail("divergent barrier: " + name_of(*self) + " ended while others wait at one");
  ++block->done;
  wait_as(Thread::DONE, Where::current());
}

inline void run_block(Block& b) {
  block = &b;
  b.arrived = b.done = 0;
  for (Warp& w : b.warps) w.arrived = 0;
  for (Thread& t : b.threads) {
    t.state = Thread::READY;
    t.copies.clear(), t.groups.clear();
    t.context.start(entry);
  }
  while (b.done < int(b.threads.size())) {
    bool progress = false;
    for (const int i : b.order) {
      if (b.threads[i].state != Thread::READY) continue;
      progress = true;
      self = &b.threads[i];
      b.scheduler.switch_to(self->context);
      if (!b.fault.empty()) throw std::runtime_error("emulator: " + b.fault);
    }
    if (progress) continue;
    for (const Thread& t : b.threads)
      if (t.state != Thread::DONE)
        throw std::runtime_error("emulator: " + name_of(t) + " waits for ever at " + place(t.where));
  }
}

inline std::vector<int> thread_order(int n) {
  std::vector<int> order(n);
  std::iota(order.begin(), order.end(), 0);
  const char* asked = std::getenv("HF_EMULATOR_ORDER");
  const std::string name = asked ? asked : "forward";
  if (name == "reverse")
    std::reverse(order.begin(), order.end());
  else if (name != "forward")
    std::shuffle(order.begin(), order.end(), std::mt19937(std::stoul(name)));
  return order;
}

inline void run_grid(dim3 blocks, int threads, size_t shared, const std::function<void()>& kernel) {
  if (threads < 32 || threads > 1024 || threads % 32) throw std::runtime_error("emulator: bad block size");
  if (shared > 227 << 10) throw std::runtime_error("emulator: too much shared memory");
  Block b;
  b.threads = std::vector<Thread>(threads);
  b.warps.resize(threads / 32);
  b.order = thread_order(threads);
  const char* copies = std::getenv("HF_EMULATOR_COPIES");
  b.early_copies = copies != nullptr && std::string(copies) == "early";
  b.size = {unsigned(threads), 1, 1};
  b.grid = blocks;
  b.kernel = kernel;
  for (int i = 0; i < threads; ++i) b.threads[i].rank = i, b.threads[i].index = {unsigned(i), 0, 0};
  const std::unique_ptr<unsigned char, void (*)(void*)> memory(
      static_cast<unsigned char*>(std::aligned_alloc(128, (shared + 2 * kGuard + 127) / 128 * 128)), std::free);
  b.shared = memory.get() + kGuard;
  for (unsigned y = 0; y < blocks.y; ++y)
    for (unsigned x = 0; x < blocks.x; ++x) {
      b.index = {x, y, 0};
      std::memset(memory.get(), kGuardByte, shared + 2 * kGuard);
      std::memset(b.shared, 0xFF, shared);  // NaN in every type
      run_block(b);
      for (size_t i = 0; i < kGuard; ++i)
        if (memory.get()[i] != kGuardByte || b.shared[shared + i] != kGuardByte)
          throw std::runtime_error("emulator: block " + std::to_string(x) + " wrote beyond shared memory");
    }
}

}  // namespace emulator

#define threadIdx (::emulator::self->index)
#define blockIdx (::emulator::block->index)
#define blockDim (::emulator::block->size)
#define gridDim (::emulator::block->grid)

inline void __syncthreads(const emulator::Where& where = emulator::Where::current()) { emulator::barrier(where); }

inline void __syncwarp(const emulator::Where& where = emulator::Where::current()) {
  int nothing = 0;
  emulator::warp_wide(nothing, where, [](int**) {});
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, const emulator::Where& where = emulator::Where::current()) {
  struct Exchange {
    T mine, theirs;
    int lanes;
  } exchange{value, value, lanes};
  if (mask != ~0u) emulator::fail("a mask that is not of the whole warp");
  emulator::warp_wide(exchange, where, [](Exchange** all) {
    for (int i = 0; i < 32; ++i) all[i]->theirs = all[i ^ all[i]->lanes]->mine;
  });
  return exchange.theirs;
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }

#include "tensor_core.h"

namespace hyperformer_fast {

template <class P>
void launch(void (*kernel)(P), const char*, dim3 blocks, int threads, size_t shared, void*, const P& p) {
  emulator::run_grid(blocks, threads, shared, [&] { kernel(p); });
}

}  // namespace hyperformer_fast
