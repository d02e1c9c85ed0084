#include "adapter_forward.cuh"

template void hyperformer_fast::forward_of<hyperformer_fast::BF16>(const ForwardParams&, const Stream&);
