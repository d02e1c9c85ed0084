// A CUDA run-time that launches nothing and counts its calls, for launches.cu: no GPU is needed. It refuses a launch
// with more shared memory than its kernel was given on that device.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <set>
#include <utility>

extern "C" {
int fake_calls = 0, fake_device = 0;
}

static std::set<std::pair<int, const void*>> large;  // kernels that asked for more than 48 KiB, by device

extern "C" {
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int) {
  return ++fake_calls, large.insert({fake_device, kernel}), cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) { return ++fake_calls, *device = fake_device, cudaSuccess; }
cudaError_t cudaGetLastError() { return ++fake_calls, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return ++fake_calls, *value = 10, cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t shared) {
  return ++fake_calls, *blocks = shared > (48 << 10) ? 1 : 2, cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* kernel, dim3, dim3, void**, size_t shared, cudaStream_t) {
  ++fake_calls;
  return shared > (48 << 10) && !large.count({fake_device, kernel}) ? cudaErrorInvalidValue : cudaSuccess;
}
cudaError_t cudaLaunchCooperativeKernel(const void* kernel, dim3 blocks, dim3, void**, size_t shared, cudaStream_t) {
  std::printf("together %u\n", blocks.x);
  return cudaLaunchKernel(kernel, blocks, dim3(), nullptr, shared, nullptr);
}
const char* cudaGetErrorString(cudaError_t) { return "refused"; }
}

// What nvcc's start-up code and kernel stubs refer to; none but the first is called for its result. Toolkits declare
// some of them, each in its own way, so they are named for the linker alone.
#define STUB(name)                \
  void* stub_##name() asm(#name); \
  void* stub_##name() { return nullptr; }
STUB(__cudaRegisterFatBinary)
STUB(__cudaRegisterFatBinaryEnd)
STUB(__cudaUnregisterFatBinary)
STUB(__cudaRegisterFunction)
STUB(__cudaInitModule)
STUB(__cudaGetKernel)
STUB(__cudaLaunchKernel)
STUB(__cudaPushCallConfiguration)
STUB(__cudaPopCallConfiguration)
