#include "adapter_forward.cuh"

template void hyperformer_fast::forward_of<hyperformer_fast::F32>(const ForwardParams&, const Stream&);
