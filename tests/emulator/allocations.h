// Included before every source of the emulated library: the tensors that its ops make are filled with NaN, so that what
// a kernel leaves unwritten is seen, and reported to the test that takes launches.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstring>

#include "hooks.h"

namespace emulator {

inline AOTITorchError empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                    int32_t device_type, int32_t device_index, AtenTensorHandle* made) {
  if (const auto error = aoti_torch_empty_strided(dims, sizes, strides, dtype, device_type, device_index, made))
    return error;
  int64_t bytes = 0;
  void* data = nullptr;
  if (const auto error = aoti_torch_get_storage_size(*made, &bytes)) return error;
  if (const auto error = aoti_torch_get_data_ptr(*made, &data)) return error;
  if (bytes > 0) std::memset(data, 0xFF, bytes);
  if (bytes > 0 && note_memory != nullptr) note_memory(data, bytes);
  return 0;
}

}  // namespace emulator

#define aoti_torch_empty_strided ::emulator::empty_strided
