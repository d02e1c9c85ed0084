#include "adapter_backward.cuh"

template void hyperformer_fast::backward_of<hyperformer_fast::BF16>(const BackwardParams&, const Stream&);
