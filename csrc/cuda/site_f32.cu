#include "site.cuh"

template void hyperformer_fast::few_rows_of<hyperformer_fast::F32>(const ForwardParams&, void*);
template void hyperformer_fast::site_of<hyperformer_fast::F32>(const SiteParams&, void*);
