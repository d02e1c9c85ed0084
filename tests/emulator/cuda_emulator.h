// Runs CUDA kernels on the CPU: a stack per thread, one block after the other, or all of a cooperative launch in turns.
// For tests: slow, and strict.
//
// Shared memory starts as NaN and is guarded; an asynchronous copy arrives at its wait and not before, or, as it may on
// a GPU too, at once (HFF_EMULATOR_COPIES "late" or "early"); threads, and blocks, run in the order of
// HFF_EMULATOR_ORDER
// ("forward", "reverse" or a seed), each until it must wait; by HFF_EMULATOR_TURNS "greedy" the first that may go on
// does, so that a warp runs ahead of the others as far as barriers let it, by "fair" the next in turn. A barrier that
// not all threads reach at the same place, a warp-wide operation that not all lanes reach, copies never waited for, and
// writes beyond shared memory end the launch with a std::runtime_error.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <source_location>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/rounding.h"
#include "context.h"
#include "hooks.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define HFF_SHARED(name) unsigned char* name = ::emulator::block->shared

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
  enum { READY, BARRIER, WARP, GRID, DONE } state = READY;
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
  int arrived = 0, at_grid = 0, done = 0;
  bool early_copies = false, together = false, fair = false, released = false;
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
  b.released = true;
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
  b.released = true;
  Argument* all[32];
  for (int i = 0; i < 32; ++i) all[i] = static_cast<Argument*>(warp.argument[i]);
  together(all);
  for (int i = first; i < first + 32; ++i)
    if (b.threads[i].state == Thread::WARP) b.threads[i].state = Thread::READY;
}

inline void grid_barrier(const Where& where) {
  if (!block->together) fail("a barrier of the grid in a launch that is not cooperative");
  ++block->at_grid;
  wait_as(Thread::GRID, where);
}

inline void entry() {
  block->kernel();
  if (!self->copies.empty() || !self->groups.empty())
    fail(name_of(*self) + " ended with asynchronous copies in flight");
  if (block->arrived) fail("divergent barrier: " + name_of(*self) + " ended while others wait at one");
  ++block->done;
  wait_as(Thread::DONE, Where::current());
}

inline void start(Block& b) {
  b.arrived = b.at_grid = b.done = 0;
  for (Warp& w : b.warps) w.arrived = 0;
  for (Thread& t : b.threads) {
    t.state = Thread::READY;
    t.copies.clear(), t.groups.clear();
    t.context.start(entry);
  }
}

// Runs b's threads until each has ended or waits for the grid.
inline void advance(Block& b) {
  block = &b;
  while (b.done + b.at_grid < int(b.threads.size())) {
    bool progress = b.released = false;
    for (const int i : b.order) {
      if (b.threads[i].state != Thread::READY) continue;
      progress = true;
      self = &b.threads[i];
      b.scheduler.switch_to(self->context);
      if (!b.fault.empty()) throw std::runtime_error("emulator: " + b.fault);
      if (b.released && !b.fair) break;  // those that go first may go on
    }
    if (progress) continue;
    for (const Thread& t : b.threads)
      if (t.state == Thread::BARRIER || t.state == Thread::WARP)
        throw std::runtime_error("emulator: " + name_of(t) + " waits for ever at " + place(t.where));
  }
}

// The value of an HFF_* variable. Its old HF_* name works for one release, and warns once.
inline std::string setting(const std::string& variable, const char* otherwise) {
  if (const char* asked = std::getenv(variable.c_str())) return asked;
  const std::string old = "HF_" + variable.substr(4);
  const char* asked = std::getenv(old.c_str());
  if (!asked) return otherwise;
  static std::once_flag warned;
  std::call_once(warned, [&] { std::fprintf(stderr, "%s is now called %s\n", old.c_str(), variable.c_str()); });
  return asked;
}

// Of a block's threads, and of a grid's blocks.
inline std::vector<int> order_of(int n) {
  std::vector<int> order(n);
  std::iota(order.begin(), order.end(), 0);
  const std::string name = setting("HFF_EMULATOR_ORDER", "forward");
  if (name == "reverse")
    std::reverse(order.begin(), order.end());
  else if (name != "forward")
    std::shuffle(order.begin(), order.end(), std::mt19937(std::stoul(name)));
  return order;
}

struct Launch {
  dim3 blocks;
  int threads;
  size_t shared;
  const std::function<void()>& kernel;
};

// A block and its shared memory.
struct Place {
  Block block;
  std::unique_ptr<unsigned char, void (*)(void*)> memory{nullptr, std::free};
  size_t shared;

  Place(const Launch& launch, bool together) : shared(launch.shared) {
    block.threads = std::vector<Thread>(launch.threads);
    block.warps.resize(launch.threads / 32);
    block.order = order_of(launch.threads);
    block.early_copies = setting("HFF_EMULATOR_COPIES", "late") == "early";
    block.fair = setting("HFF_EMULATOR_TURNS", "greedy") == "fair";
    block.together = together;
    block.size = {unsigned(launch.threads), 1, 1};
    block.grid = launch.blocks;
    block.kernel = launch.kernel;
    for (int i = 0; i < launch.threads; ++i) block.threads[i].rank = i, block.threads[i].index = {unsigned(i), 0, 0};
    memory.reset(static_cast<unsigned char*>(std::aligned_alloc(128, (shared + 2 * kGuard + 127) / 128 * 128)));
    block.shared = memory.get() + kGuard;
  }

  void begin(unsigned x, unsigned y) {
    block.index = {x, y, 0};
    std::memset(memory.get(), kGuardByte, shared + 2 * kGuard);
    std::memset(block.shared, 0xFF, shared);  // NaN in every type
    start(block);
  }

  void end() const {
    for (size_t i = 0; i < kGuard; ++i)
      if (memory.get()[i] != kGuardByte || block.shared[shared + i] != kGuardByte)
        throw std::runtime_error("emulator: block " + std::to_string(block.index.x) + " wrote beyond shared memory");
  }
};

inline void check(const Launch& launch) {
  if (launch.threads < 32 || launch.threads > 1024 || launch.threads % 32)
    throw std::runtime_error("emulator: bad block size");
  if (launch.shared > 227 << 10) throw std::runtime_error("emulator: too much shared memory");
}

// Block by block, on each of HFF_EMULATOR_THREADS host threads.
inline void run_grid(const Launch& launch) {
  check(launch);
  const int hosts = std::stoi(setting("HFF_EMULATOR_THREADS", "1"));
  const unsigned all = launch.blocks.x * launch.blocks.y;
  const std::vector<int> order = order_of(int(all));
  std::vector<std::exception_ptr> faults(hosts);
  const auto share = [&](int host) {
    try {
      Place place(launch, false);
      for (unsigned i = host; i < all; i += hosts) {
        place.begin(order[i] % launch.blocks.x, order[i] / launch.blocks.x);
        advance(place.block);
        place.end();
      }
    } catch (...) {
      faults[host] = std::current_exception();
    }
  };
  std::vector<std::thread> others;
  for (int host = 1; host < hosts; ++host) others.emplace_back(share, host);
  share(0);
  for (std::thread& other : others) other.join();
  for (const std::exception_ptr& fault : faults)
    if (fault) std::rethrow_exception(fault);
}

// All blocks at once, each until it ends or waits for the others.
inline void run_together(const Launch& launch) {
  check(launch);
  std::vector<std::unique_ptr<Place>> places;
  for (unsigned x = 0; x < launch.blocks.x; ++x) {
    places.push_back(std::make_unique<Place>(launch, true));
    places.back()->begin(x, 0);
  }
  const std::vector<int> order = order_of(int(places.size()));
  for (;;) {
    int done = 0;
    const Thread* waiting = nullptr;
    for (const int x : order) {
      Block& b = places[x]->block;
      advance(b);
      done += b.done;
      for (const Thread& t : b.threads)
        if (t.state == Thread::GRID) waiting = &t;
    }
    if (waiting == nullptr) break;
    const Where where = waiting->where;
    for (const auto& of : places) {
      for (Thread& t : of->block.threads) {
        if (done || !same_place(t.where, where))
          throw std::runtime_error("emulator: divergent barrier of the grid: not all threads came to " + place(where));
        t.state = Thread::READY;
      }
      of->block.at_grid = 0;
    }
  }
  for (const auto& of : places) of->end();
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

template <class T>
T atomicAdd(T* address, T value) {
  return std::atomic_ref<T>(*address).fetch_add(value);
}

template <class T>
T atomicMax(T* address, T value) {
  std::atomic_ref<T> all(*address);
  T seen = all.load();
  while (seen < value && !all.compare_exchange_weak(seen, value)) {
  }
  return seen;
}

template <class T>
T atomicCAS(T* address, T expected, T value) {
  std::atomic_ref<T>(*address).compare_exchange_strong(expected, value);
  return expected;
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }

#include "tensor_core.h"

namespace hyperformer_fast {

template <auto kernel, class P>
void launch(const char*, dim3 blocks, int threads, size_t shared, const Stream&, const P& p) {
  if (emulator::taken(kernel, blocks.x, blocks.y, blocks.z, threads, shared, p)) return;
  emulator::run_grid({blocks, threads, shared, [&] { kernel(p); }});
}

inline void wait_for_grid(const emulator::Where& where = emulator::Where::current()) { emulator::grid_barrier(where); }

// The device holds HFF_EMULATOR_BLOCKS at a time.
template <auto kernel, class P>
void launch_together(const char*, int64_t useful, int threads, size_t shared, const Stream&, const P& p) {
  const int64_t fit = std::stoi(emulator::setting("HFF_EMULATOR_BLOCKS", "3"));
  const unsigned blocks = unsigned(std::min(useful, fit));
  if (emulator::taken(kernel, blocks, 1, 1, threads, shared, p)) return;
  emulator::run_together({{blocks, 1, 1}, threads, shared, [&] { kernel(p); }});
}

}  // namespace hyperformer_fast
