#include "weight_gradients.cuh"

template void hyperformer_fast::weight_gradients_of<hyperformer_fast::BF16>(const WeightGradientParams&, const Stream&);
