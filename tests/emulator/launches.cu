// Prints how many calls of the CUDA run-time launches make; linked with fake_runtime.cpp instead of CUDA's.
#include <cstdio>

#include "../../csrc/cuda/launch.cuh"

extern "C" int fake_calls, fake_device;

namespace {

struct Nothing {};
template <int>
__global__ void small_kernel(const Nothing) {}
template <int>
__global__ void large_kernel(const Nothing) {}

template <class Run>
void count(const char* what, int device, const Run& run) {
  fake_device = device;
  const hyperformer_fast::Stream stream{nullptr, device};
  for (int time = 0; time < 2; ++time) {
    fake_calls = 0;
    run(stream);
    std::printf("%s, device %d, %s: %d\n", what, device, time ? "again" : "first", fake_calls);
  }
}

}  // namespace

int main() {
  using namespace hyperformer_fast;
  for (const int device : {0, 1, kDevices}) {
    count("small", device, [](const Stream& s) { launch<small_kernel<0>>("k", dim3(1), 32, 1 << 10, s, Nothing{}); });
    count("large", device, [](const Stream& s) { launch<large_kernel<0>>("k", dim3(1), 32, 60 << 10, s, Nothing{}); });
    count("together", device,
          [](const Stream& s) { launch_together<large_kernel<1>>("k", 100, 32, 60 << 10, s, Nothing{}); });
  }
  // Another size of shared memory holds another number of blocks.
  count("less shared", 0,
        [](const Stream& s) { launch_together<large_kernel<1>>("k", 100, 32, 1 << 10, s, Nothing{}); });
}
