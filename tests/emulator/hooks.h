// Lets a test take launches in the emulator's place, for example to run other code of the same kernel.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

#define HFF_EMULATOR_EXPORT extern "C" inline __attribute__((used, visibility("default")))

namespace emulator {

// Gets the kernel's function, the grid (x, y, z), the threads and the shared bytes of a block, and the parameters.
// Returns 0 when the launch is done.
using TakeLaunch = int (*)(const void* kernel, const unsigned* grid, int threads, size_t shared, const void* parameters,
                           size_t bytes);
inline TakeLaunch take_launch = nullptr;

// Gets the first byte and the number of bytes of every tensor that an op makes.
using NoteMemory = void (*)(const void* address, size_t bytes);
inline NoteMemory note_memory = nullptr;

// Whether a test took the launch.
template <class P>
bool taken(void (*kernel)(P), unsigned x, unsigned y, unsigned z, int threads, size_t shared, const P& p) {
  if (take_launch == nullptr) return false;
  const unsigned grid[3] = {x, y, z};
  if (take_launch(reinterpret_cast<const void*>(kernel), grid, threads, shared, &p, sizeof(P)))
    throw std::runtime_error("emulator: the test that took a launch failed");
  return true;
}

}  // namespace emulator

// Null gives the launches back to the emulator.
HFF_EMULATOR_EXPORT void hff_emulator_take(emulator::TakeLaunch take, emulator::NoteMemory note) {
  emulator::take_launch = take;
  emulator::note_memory = note;
}
