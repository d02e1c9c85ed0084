#include "site.cuh"

template void hyperformer_fast::few_rows_of<hyperformer_fast::F32>(const ForwardParams&, const Stream&);
template void hyperformer_fast::site_of<hyperformer_fast::F32>(const SiteParams&, const Stream&);
